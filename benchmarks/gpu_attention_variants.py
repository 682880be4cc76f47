"""The Triton kernels of the KV cache in each form that serving launches; see gpu_variants."""

from collections.abc import Iterator

import torch
import triton

from benchmarks.gpu_variant import Variant
from vllm_offq.kernels.triton.kv_store import (
    MAX_COLUMNS,
    ROWS_PER_WARP,
    kv_store_kernel,
    rotate_heads_kernel,
)
from vllm_offq.kernels.triton.merge_splits import STEP, merge_splits_kernel
from vllm_offq.kernels.triton.paged_attention import paged_attention_kernel
from vllm_offq.kernels.triton.paged_attention_config import (
    MAX_SPLITS,
    MIN_TILES,
    attention_config,
    tiles_for,
)
from vllm_offq.kernels.triton.target import Gpu

HEADS = {64: 64, 96: 96, 128: 128, 256: 128}
"""Channels of a head; of a group."""
RATIO, BLOCK_SIZE = 4, 16


def stores(gpu: Gpu) -> Iterator[Variant]:
    strides = [f"{x}_{y}_stride" for x in ("key", "value") for y in ("token", "head")]
    strides += ["block_stride", "head_stride"]
    signature = {
        "key_ptr": "*bf16",
        "value_ptr": "*bf16",
        "rotation_ptr": "*fp32",
        "slot_ptr": "*i64",
        "cache_ptr": "*u8",
        "num_tokens": "i32",
        "range_to_scale": "fp32",
        **dict.fromkeys(strides, "i32"),
    }
    for head_size, group_size in HEADS.items():
        constants = {
            "ROTATED": True,
            "HEAD_SIZE": head_size,
            "NUM_GROUPS": head_size // group_size,
            "BLOCK_SIZE": BLOCK_SIZE,
            "PRECISION": gpu.float32_precision,
            "ROWS": 16,
            "COLUMNS": triton.next_power_of_2(head_size // 2),
        }
        name = f"kv_store, heads of {head_size}, rotated"
        yield Variant(name, kv_store_kernel, signature, constants, tuple(strides), {"num_warps": 4})
        yield _rotation(gpu, head_size)


def _rotation(gpu: Gpu, head_size: int) -> Variant:
    """Of the queries of a prefill."""
    integers = ("token_stride", "head_stride", "num_rows")
    types = {"x_ptr": "*bf16", "rotation_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {
        "RATIO": RATIO,
        "HEAD_SIZE": head_size,
        "PRECISION": gpu.float32_precision,
        "ROWS": 64,
        "COLUMNS": min(triton.next_power_of_2(head_size), MAX_COLUMNS),
    }
    return Variant(
        f"rotate_heads, heads of {head_size}",
        rotate_heads_kernel,
        types | dict.fromkeys(integers, "i32"),
        constants,
        integers[:2],
        {"num_warps": 64 // ROWS_PER_WARP},
    )


def attentions(gpu: Gpu) -> Iterator[Variant]:
    for head_size, group_size in HEADS.items():
        for max_query_len in (1, 2048):
            yield _attention(gpu, head_size, head_size // group_size, max_query_len)
            yield _attention(gpu, head_size, head_size // group_size, max_query_len, window=4096)
        yield _merge(head_size)


def _merge(head_size: int) -> Variant:
    types = {"parts_ptr": "*fp32", "lse_ptr": "*fp32", "output_ptr": "*bf16"}
    strides = ("output_token_stride", "output_head_stride")
    constants = {
        "HEAD_SIZE": head_size,
        "STEP": STEP,
        "MAX_SPLITS": MAX_SPLITS,
        "COLUMNS": triton.next_power_of_2(head_size),
    }
    types |= {"query_start_loc_ptr": "*i32"}
    types |= dict.fromkeys((*strides, "num_requests", "num_splits"), "i32")
    return Variant(
        f"merge_splits, heads of {head_size}",
        merge_splits_kernel,
        types,
        constants,
        strides,
        {"num_warps": 4},
    )


def _attention(
    gpu: Gpu, head_size: int, num_groups: int, max_query_len: int, window: int = 0
) -> Variant:
    """window: with a soft cap, too, as in Gemma 2."""
    tiles = tiles_for(torch.bfloat16, head_size, num_groups, gpu.tensor_core)
    # 16 requests, 8 KV heads and a long context: decoding is split.
    config = attention_config(tiles, 16 * max_query_len, 16, max_query_len, RATIO, 8, 1 << 15, 132)
    is_split = config.splits > 1
    strides = [f"{x}_{y}_stride" for x in ("query", "output") for y in ("token", "head")]
    strides += ["block_stride", "head_stride", "block_table_stride"]
    signature = {
        "query_ptr": "*bf16",
        "output_ptr": "*fp32" if is_split else "*bf16",
        "lse_ptr": "*fp32" if is_split else "*bf16",
        "cache_ptr": "*u8",
        **dict.fromkeys(("block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"), "*i32"),
        **dict.fromkeys((*strides, "num_requests", "num_splits"), "i32"),
        **dict.fromkeys(("score_scale", "soft_cap"), "fp32"),
    }
    constants = {
        "RATIO": RATIO,
        "HEAD_SIZE": head_size,
        "NUM_GROUPS": num_groups,
        "BLOCK_SIZE": BLOCK_SIZE,
        "WINDOW": window,
        "SOFT_CAP": bool(window),
        "SPLIT": is_split,
        "MIN_TILES": MIN_TILES,
        "ONE_TILE": config.one_tile,
        "PTX": gpu.has_ptx,
        "PTX_IN_PLACE": gpu.keeps_ptx_in_place,
        "ROWS": config.rows,
        "COLUMNS": max(triton.next_power_of_2(head_size // 2), 16),
        "TILE": config.tile,
    }
    step = "decode" if max_query_len == 1 else "prefill"
    return Variant(
        f"paged_attention, {step}, heads of {head_size}" + (", window and cap" if window else ""),
        paged_attention_kernel,
        signature,
        constants,
        tuple(strides),
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
