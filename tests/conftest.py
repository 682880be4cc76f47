"""Shared by all tests. Being here, it also puts this folder on the import path for pytest."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # libraries read it when they are imported

import torch

# Tensors here are tiny: threads would only wait for each other, on a busy machine for minutes.
torch.set_num_threads(1)
