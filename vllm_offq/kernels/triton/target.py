"""What the kernels are compiled for."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from triton import knobs

MIN_CAPABILITY = (8, 0)
"""The first NVIDIA GPUs whose tensor cores multiply integers as the kernels need it."""
AMD_CAPABILITIES = {(9, 4): "gfx942", (9, 5): "gfx950"}
"""Of CDNA3 and CDNA4, whose matrix cores do."""


def why_not_usable(capability: tuple[int, int]) -> str | None:
    """What keeps a GPU of this compute capability from running the kernels; None: nothing."""
    found = ".".join(map(str, capability))
    if torch.version.hip is not None:
        if capability not in AMD_CAPABILITIES:
            names = " or ".join(AMD_CAPABILITIES.values())
            return f"are for AMD GPUs of {names}, and this one has compute capability {found}"
    elif capability < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        return f"need compute capability {least}, and this GPU has {found}"
    return None


class Gpu(NamedTuple):
    """What the kernels want to know of a GPU when they are compiled."""

    tensor_core: str
    """Which instruction multiplies tiles: mma, wgmma or mfma."""
    has_ptx: bool
    """Whether inline PTX can be used. The interpreter emulates what the kernels have of it."""
    keeps_ptx_in_place: bool
    """Whether PTX that must not be moved may stand in a loop that is pipelined."""
    converts_slowly: bool
    """Whether integers become floats at a quarter of the rate of other arithmetic."""
    float32_precision: str
    """Of a product of float32 tiles: three TF32 products are as exact as float32's own."""
    tf32_precision: str
    """Of a product of float32 tiles that have no more digits than TF32."""


AMD = Gpu("mfma", False, True, False, "ieee", "ieee")
INTERPRETER = Gpu("mma", True, True, True, "ieee", "tf32")
MULTIPLIES_IN_TENSOR_MEMORY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether Triton uses Blackwell's own instructions for integers; before, it took Ampere's."""


def nvidia(capability: tuple[int, int]) -> Gpu:
    """An NVIDIA GPU; of those supported, only an A100 (8.0) is slow to convert."""
    is_blackwell = capability[0] == 10
    is_wgmma = capability[0] == 9 or (is_blackwell and MULTIPLIES_IN_TENSOR_MEMORY)
    tensor_core = "wgmma" if is_wgmma else "mma"
    return Gpu(tensor_core, True, not is_blackwell, capability == (8, 0), "tf32x3", "tf32")


@cache
def gpu() -> Gpu:
    """The one that this process runs on."""
    if knobs.runtime.interpret:
        return INTERPRETER
    if torch.version.hip is not None:
        return AMD
    return nvidia(torch.cuda.get_device_capability())


@cache
def num_cores(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD)."""
    if knobs.runtime.interpret:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
