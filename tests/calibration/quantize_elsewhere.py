"""Script: quantize on the pretended device. Arguments: a JSON list of [model, out, settings]."""

import json
import sys

from pretend_device import DEVICE, FromNumbers, computed

from calibration import pipeline
from calibration.settings import Settings

pipeline.usable_device = lambda name: DEVICE  # no build of PyTorch has it
with FromNumbers():
    for model, out, settings in json.loads(sys.argv[1]):
        settings["calibration"] = tuple(settings["calibration"])
        pipeline.quantize(model, out, Settings(**settings))
for product in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::addr_"):
    assert product in computed, f"{product} was never computed on the device"
