"""Where Triton interprets, as tests/kernels/test_triton.py has it, or on a GPU."""

from types import ModuleType

import numpy as np
import pytest
import torch
from triton import knobs

on_gpu = torch.cuda.is_available() and not knobs.runtime.interpret
collect_ignore_glob = [] if on_gpu or knobs.runtime.interpret else ["test_*.py"]

if on_gpu:
    torch.set_default_device("cuda")

np.seterr(all="ignore")  # as a GPU does; the interpreter calculates with numpy


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from vllm_offq.kernels import triton

    return triton
