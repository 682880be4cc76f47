"""Which tiles and how many splits paged_attention uses: a table by size, no tuning run needed."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_offq.kernels.triton.target import gpu, num_cores

MAX_SPLITS = 64
"""Of a context: merging more would cost as much as they save."""

MIN_TILES = 2
"""Of a split: merging it costs as much as reading a quarter of a tile."""

WARPS_PER_CORE = 16
"""What registers let run at once: with fewer warps a multiprocessor waits."""


class Tiles(NamedTuple):
    """What fits into the registers of a program."""

    most_rows: int
    """New tokens times the heads of one KV head."""
    rows_per_warp: int
    context: int
    """Tokens of the context in one step."""
    num_stages: int
    """Steps whose loads are in flight."""
    context_many_rows: int
    """Likewise of more than 32 rows."""
    num_stages_many_rows: int
    """Likewise."""


def tiles_for(dtype: torch.dtype, head_size: int, num_groups: int, tensor_core: str) -> Tiles:
    """The largest that compile without a spill.

    Registers hold output and query, rows * head_size, scores, rows * context, and unpacked codes,
    context * head_size.
    """
    if dtype == torch.float32:  # by plain multiply-adds: three TF32 products need more registers
        is_small = head_size <= 128 and num_groups == 1
        context = 32 if is_small else 16
        return Tiles(16, 2, context, 2, context, 2)
    if tensor_core == "mfma":  # there, loads in flight are in registers too
        return Tiles(128 if head_size <= 128 else 64, 32, 32, 2, 32, 2)
    is_wgmma = tensor_core == "wgmma"  # which can read the query from shared memory
    if head_size > 128:
        return Tiles(64 if is_wgmma else 32, 8, 32, 3, 32, 3)
    context = 64 if num_groups == 1 else 32
    return Tiles(128, 16, context, 3, context if is_wgmma or head_size <= 64 else 32, 3)


@dataclass(frozen=True)
class AttentionConfig:
    """Of one launch."""

    rows: int
    """Of a tile, as in Tiles."""
    tile: int
    """Tokens of the context in one step."""
    row_tiles: int
    """Programs for each KV head and split; some may find nothing to do."""
    splits: int
    """Programs that share the context of a tile of rows."""
    one_tile: bool
    """No request has more rows than one tile: programs need not look for theirs."""
    num_warps: int
    num_stages: int


def attention_config(
    tiles: Tiles,
    tokens: int,
    num_requests: int,
    max_query_len: int,
    ratio: int,
    kv_heads: int,
    max_context: int,
    num_cores: int,
) -> AttentionConfig:
    """From what the host knows, which is no lengths: those are on the device.

    ratio: heads of one KV head; max_context: what a token sees at most.
    """
    rows = triton.next_power_of_2(ratio * min(max_query_len, tiles.most_rows))
    # The heads of one token are never parted.
    rows = max(16, min(rows, tiles.most_rows), triton.next_power_of_2(ratio))
    tokens_per_tile = rows // ratio
    one_tile = max_query_len <= tokens_per_tile
    # As find_request numbers them: a request has one to spare, for what fills no tile.
    row_tiles = num_requests if one_tile else tokens // tokens_per_tile + num_requests
    num_warps = max(4, rows // tiles.rows_per_warp)
    has_many_rows = rows > 32
    context = tiles.context_many_rows if has_many_rows else tiles.context
    splits = min(
        WARPS_PER_CORE * num_cores // (num_warps * row_tiles * kv_heads),
        most_parts(tiles, num_cores) // (tokens * ratio * kv_heads),
        max_context // (MIN_TILES * context),
        MAX_SPLITS,
    )
    return AttentionConfig(
        rows=rows,
        tile=context,
        row_tiles=row_tiles,
        splits=max(splits, 1),
        one_tile=one_tile,
        num_warps=num_warps,
        num_stages=tiles.num_stages_many_rows if has_many_rows else tiles.num_stages,
    )


def attention_workspace(
    dtype: torch.dtype, head_size: int, group_size: int, device: torch.device
) -> int:
    """See Features.attention_workspace: for each part an output and its lse."""
    tiles = tiles_for(dtype, head_size, head_size // group_size, gpu().tensor_core)
    return most_parts(tiles, num_cores(device)) * (head_size + 1)


def most_parts(tiles: Tiles, num_cores: int) -> int:
    """What tokens times heads times splits never exceeds: the rows of all warps that run at once.

    It bounds splits of batches with padding alone, tokens that no tile of rows has.
    """
    return WARPS_PER_CORE * num_cores * tiles.rows_per_warp


@triton.jit
def find_request(row_tile, query_start_loc_ptr, num_requests, TOKENS: tl.constexpr):
    """Whose tile this is, and which of its tokens is the tile's first.

    A request that starts at token t has its first tile at t // TOKENS + its number: never fewer
    tiles than it needs, known without a sum over all requests before it.
    """
    low, high = 0, num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // TOKENS + middle <= row_tile:
            low = middle
        else:
            high = middle
    first_tile = tl.load(query_start_loc_ptr + low) // TOKENS + low
    return low, (row_tile - first_tile) * TOKENS
