"""Script: quantize on the pretended devices.

Arguments: pretend_guard.cpp as a library, and a JSON list of [model, out, settings].
"""

import ctypes
import json
import sys

from pretend_device import DEVICES, FromNumbers, computed

from calibration import pipeline
from calibration.settings import Settings

ctypes.CDLL(sys.argv[1])  # after pretend_device, whose guard it takes the place of
pipeline.usable_devices = lambda name: DEVICES  # no build of PyTorch has them
with FromNumbers():
    for model, out, settings in json.loads(sys.argv[2]):
        settings["calibration"] = tuple(settings["calibration"])
        pipeline.quantize(model, out, Settings(**settings))
# The first computes blocks, both the whole model.
for device, products in zip(
    DEVICES, (("mm", "addmm", "addmm_", "bmm", "addr_"), ("mm", "bmm")), strict=True
):
    for product in products:
        assert (f"aten::{product}", device) in computed, f"{product} was never computed on {device}"
