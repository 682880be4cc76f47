"""The sums that programs have computed of parts of the channels, made one."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Outputs of a program."""


@triton.jit
def add_splits_kernel(
    partial_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    num_elements,
    out_features,
    SCALE_PER_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums [SPLIT_K, T, N] to y, in one order: the same sums give the same bytes."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < num_elements
    total = tl.load(partial_ptr + element, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLIT_K):
        total += tl.load(partial_ptr + split * num_elements + element, mask=mask, other=0.0)
    output = element % out_features
    if not SCALE_PER_GROUP:
        total *= tl.load(weight_scale_ptr + output).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output).to(tl.float32)
    tl.store(y_ptr + element, total.to(y_ptr.dtype.element_ty), mask=mask)


def add_splits(partial: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Their sum, times the weights' scale if it is not in them yet, plus bias.

    partial: [S, T, N] float32; weight_scale: [1 or G, N]; bias: [N]; y: [T, N], written in place.
    """
    add_splits_kernel[(triton.cdiv(y.numel(), BLOCK),)](
        partial,
        weight_scale,
        bias,
        y,
        y.numel(),
        y.shape[1],
        SCALE_PER_GROUP=weight_scale.shape[0] > 1,
        HAS_BIAS=bias is not None,
        SPLIT_K=len(partial),
        BLOCK=BLOCK,
    )
