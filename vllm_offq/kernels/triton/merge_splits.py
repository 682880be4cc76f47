"""The parts that programs have computed of one context, made one."""

import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.paged_attention_config import MAX_SPLITS

STEP = 8
"""Parts that are read at once."""


@triton.jit(do_not_specialize=["num_requests", "num_splits"])
def merge_splits_kernel(
    parts_ptr,
    lse_ptr,
    output_ptr,
    output_token_stride,
    output_head_stride,
    query_start_loc_ptr,
    num_requests,
    num_splits,
    HEAD_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One head of one token; see merge_splits."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_requests):
        return
    first = (token * tl.num_programs(1) + head) * num_splits
    every = tl.arange(0, MAX_SPLITS)
    infinity = float("inf")
    largest = tl.max(tl.load(lse_ptr + first + every, mask=every < num_splits, other=-infinity), 0)
    channel = tl.arange(0, COLUMNS)
    total = tl.zeros((STEP,), tl.float32)
    merged = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, num_splits, STEP):
        split = start + tl.arange(0, STEP)
        lse = tl.load(lse_ptr + first + split, mask=split < num_splits, other=-infinity)
        weight = tl.exp2(lse - largest)
        total += weight
        # Of a part that saw nothing there is no output. A NaN stays in the sum of weights.
        is_used = weight > 0.0
        part_ptrs = parts_ptr + (first + split)[:, None] * HEAD_SIZE + channel[None, :]
        mask = is_used[:, None] & (channel < HEAD_SIZE)[None, :]
        merged += tl.load(part_ptrs, mask=mask, other=0.0) * weight[:, None]
    output_ptrs = output_ptr + token * output_token_stride + head * output_head_stride + channel
    tl.store(output_ptrs, tl.sum(merged, 0) / tl.sum(total, 0), mask=channel < HEAD_SIZE)


def merge_splits(parts: Tensor, lse: Tensor, output: Tensor, query_start_loc: Tensor) -> None:
    """The average of the parts, each with 2 ** lse as weight.

    parts: [T, H, S, D] float32, contiguous; where lse is -inf it may hold anything; lse: [T, H, S]
    float32, S at most MAX_SPLITS; output: [T, H, D], written in place but for rows of no request;
    query_start_loc: [R + 1] int32.
    """
    tokens, num_heads, num_splits, head_size = parts.shape
    merge_splits_kernel[tokens, num_heads](
        parts,
        lse,
        output,
        output.stride(0),
        output.stride(1),
        query_start_loc,
        len(query_start_loc) - 1,
        num_splits,
        HEAD_SIZE=head_size,
        STEP=STEP,
        MAX_SPLITS=MAX_SPLITS,
        COLUMNS=triton.next_power_of_2(head_size),
    )
