"""OffQ operations on CPUs, in C++: the functions of `reference`, with the same meaning.

Weights are kept once, as tiles of 16 output channels (src/kernels.h); so are the bytes of a KV
page, whose arrangement is private to one block and head. Attention rounds queries and
probabilities to integers of 16 bits (of 24 in float32); all else is the reference's arithmetic.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.kernels.cpu import library
from vllm_offq.kernels.cpu.experts import experts_by
from vllm_offq.kernels.cpu.library import DTYPES
from vllm_offq.kernels.interface import ExpertLinear, Features, Weight
from vllm_offq.quantizer import range_to_scale
from vllm_offq.rotation import hadamard_core

TILE, BLOCK, MAX_SEGMENT, MAX_CORE = 16, 8, 256, 256

FEATURES = Features(kv_multiple=TILE, fused_inputs=False)


@cache
def segment_size(group_size: int) -> int:
    """The largest equal part of a group that the kernels sum in one go."""
    return max(n for n in range(1, MAX_SEGMENT + 1) if group_size % n == 0)


def prepare_weight(weight_packed: Tensor, weight_scale: Tensor, group_size: int) -> Weight:
    """Tiles of 16 output channels, N padded with zeros to T = ceil(N / 16) of them.

    weight_packed: [N, K / 2] uint8; weight_scale: [N, 1 or G] float16. Returns: codes
    [T, S, B, 64] uint8 for S segments of B blocks of 8 channels; scale [T, 16] or [T, S, 16];
    sums [T, S, 16] int16.
    """
    segment = segment_size(group_size)
    n = weight_packed.shape[0]
    tiles, padding = -(-n // TILE), -n % TILE
    codes = torch.stack([weight_packed & 15, weight_packed >> 4], -1).view(n, -1, segment)
    codes = torch.nn.functional.pad(codes, (0, -segment % BLOCK, 0, 0, 0, padding), value=8)
    segments = codes.shape[1]
    sums = codes.sum(-1, dtype=torch.int32) - 8 * codes.shape[-1]
    low, high = codes.view(tiles, TILE, segments, -1, 2, 4).permute(4, 0, 2, 3, 1, 5)
    scale = torch.nn.functional.pad(weight_scale, (0, 0, 0, padding))
    if weight_scale.shape[1] == 1:
        scale = scale.view(tiles, TILE)
    else:
        scale = scale.repeat_interleave(group_size // segment, 1)
        scale = scale.view(tiles, TILE, segments).transpose(1, 2).contiguous()
    return Weight(
        codes=(low | high << 4).reshape(tiles, segments, -1, TILE * BLOCK // 2),
        scale=scale,
        sums=sums.view(tiles, TILE, segments).transpose(1, 2).to(torch.int16).contiguous(),
    )


@cache
def input_grid(
    group_size: int, rotation_block_size: int, clip_ratio: float, symmetric: bool, bits: int
) -> tuple[library.InputGrid, Tensor | None]:
    """The grid as the library reads it, and the matrix it points into."""
    factor = range_to_scale(clip_ratio, symmetric, bits)
    grid = library.InputGrid(group_size, int(symmetric), bits, factor)
    if not rotation_block_size:
        return grid, None
    core = hadamard_core(rotation_block_size).float()
    if len(core) > MAX_CORE:
        raise UserError(
            f"a Hadamard matrix of order {rotation_block_size} is built from one of order "
            f"{len(core)}, which is more than the CPU kernels' {MAX_CORE}; quantize the model "
            "again with another group size"
        )
    grid.hadamard_block = rotation_block_size
    grid.hadamard_core = len(core)
    grid.hadamard_norm = rotation_block_size**-0.5
    grid.hadamard_matrix = core.data_ptr()
    return grid, core


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int = 4,
) -> Tensor:
    """See reference.linear. One call: Hadamard, codes, product, offset term, bias, rounding."""
    if x.stride(-1) != 1 or x.dim() != 2:
        x = x.contiguous()
    in_features = x.shape[-1]
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    if not y.numel():
        return y
    if bias is not None:
        bias = bias.to(x.dtype)
    grid, _ = input_grid(group_size, rotation_block_size, clip_ratio, symmetric, bits)
    arguments = library.Linear(
        x.data_ptr(),
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        x.stride(0) if x.dim() == 2 else in_features,
        weight.codes.data_ptr(),
        weight.sums.data_ptr(),
        weight.scale.data_ptr(),
        segment_size(group_size),
        weight.scale.dim() == 3,
        DTYPES[x.dtype],
        grid,
    )
    check(library.load().offq_linear(library.isa(), ctypes.byref(arguments)))
    return y


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: ExpertLinear, down: ExpertLinear
) -> Tensor:
    """See reference.experts."""
    return experts_by(linear, x, topk_ids, topk_weights, gate_up, down)


def check(status: int) -> None:
    """Raises: MemoryError if the library found no memory for its intermediate results."""
    if status:
        raise MemoryError("OffQ's CPU kernels found no memory for intermediate results")


def page_layout(kv_cache: Tensor, group_size: int) -> library.PageLayout:
    """kv_cache: [blocks, H_kv, block_size, C] uint8, the bytes of a block and head contiguous."""
    _, heads, block_size, content_bytes = kv_cache.shape
    head_size = content_bytes * group_size // (group_size + 8)
    block_stride, head_stride, token_stride, byte_stride = kv_cache.stride()
    assert block_size % TILE == head_size % TILE == group_size % TILE == 0
    assert (token_stride, byte_stride) == (content_bytes, 1)
    return library.PageLayout(heads, head_size, block_size, group_size, block_stride, head_stride)


def head_rows(x: Tensor) -> Tensor:
    """x [T, H, D], copied if the heads of a token are not neighbours in memory."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if dense else x.contiguous()


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    group_size: int,
    rotation: Tensor | None = None,
) -> None:
    """See reference.kv_store; the bytes within a block and head are arranged as tiles."""
    assert (value.dtype, slot_mapping.dtype) == (key.dtype, torch.int64)
    key, value = head_rows(key), head_rows(value)
    arguments = library.KVStore(
        key.data_ptr(),
        value.data_ptr(),
        slot_mapping.shape[0],
        key.stride(0),
        value.stride(0),
        DTYPES[key.dtype],
        None if rotation is None else rotation.data_ptr(),
        slot_mapping.data_ptr(),
        kv_cache.data_ptr(),
        page_layout(kv_cache, group_size),
    )
    check(library.load().offq_kv_store(library.isa(), ctypes.byref(arguments)))


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    output: Tensor,
    scale: float,
    group_size: int,
    sliding_window: int | None = None,
    rotation: Tensor | None = None,
    max_query_len: int | None = None,
    logits_soft_cap: float | None = None,
    workspace: Tensor | None = None,
) -> None:
    """See reference.paged_attention."""
    assert head_rows(output) is output and output.dtype == query.dtype
    assert {index.dtype for index in (block_table, seq_lens, query_start_loc)} == {torch.int32}
    query = head_rows(query)
    arguments = library.Attention(
        query.data_ptr(),
        output.data_ptr(),
        query.stride(0),
        output.stride(0),
        query.shape[1],
        DTYPES[query.dtype],
        scale,
        None if rotation is None else rotation.data_ptr(),
        seq_lens.shape[0],
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        sliding_window or 0,
        logits_soft_cap or 0.0,
        kv_cache.data_ptr(),
        page_layout(kv_cache, group_size),
    )
    check(library.load().offq_paged_attention(library.isa(), ctypes.byref(arguments)))
