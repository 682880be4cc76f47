"""What vllm_offq.kernels.triton quantizes, for comparisons with the reference."""

import torch
from torch import Tensor

from vllm_offq.format import unpack_int4
from vllm_offq.kernels.triton.quantize_tile import Quantized


def assert_same_codes(quantized: Quantized, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """To the bit. expected: as reference.rotate_quantize returns them."""
    codes, scale, offset = expected
    is_wide = quantized.codes.dtype == torch.int8
    in_order = (
        quantized.codes.transpose(2, 3).flatten(1)
        if is_wide
        else unpack_int4(quantized.codes ^ 0x88)
    )
    assert torch.equal(in_order, codes)
    assert torch.equal(quantized.scale.T[: len(codes)], scale)
    assert torch.equal(quantized.offset.T[: len(codes)], offset)
