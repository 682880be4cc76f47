"""Paged caches and ragged batches, for tests of any backend."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_offq.kernels import reference


def empty_cache(
    blocks: int, heads: int, block_size: int, head_size: int, group_size: int, byte: int = 0xA5
) -> Tensor:
    content_bytes = reference.kv_page_bytes(head_size, group_size)
    return torch.full((blocks, heads, block_size, content_bytes), byte, dtype=torch.uint8)


def slots_of(blocks: Tensor, length: int, block_size: int) -> Tensor:
    """Where a request with these blocks keeps its first tokens."""
    position = torch.arange(length)
    return blocks[position // block_size].long() * block_size + position % block_size


class Batch(NamedTuple):
    """Requests, as vLLM describes them to the kernels."""

    seq_lens: Tensor
    query_start_loc: Tensor
    block_table: Tensor

    @classmethod
    def of(cls, seq_lens: list[int], new: list[int], block_size: int) -> "Batch":
        """Blocks in any order; entries beyond a request's last block mean nothing."""
        counts = [-(-length // block_size) for length in seq_lens]
        order = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
        block_table = torch.full((len(counts), max(counts, default=0) + 2), 2**30).int()
        for row, blocks in zip(block_table, order, strict=True):
            row[: len(blocks)] = blocks
        bounds = torch.tensor([0, *new]).cumsum(0).int()
        return cls(torch.tensor(seq_lens).int(), bounds, block_table)

    def request(self, index: int) -> "Batch":
        """One request alone."""
        new = self.query_start_loc.diff()[index].item()
        row = slice(index, index + 1)
        return Batch(self.seq_lens[row], torch.tensor([0, new]).int(), self.block_table[row])

    def rows(self, index: int) -> slice:
        """The new tokens of a request."""
        return slice(*self.query_start_loc[index : index + 2].tolist())

    def slots(self, block_size: int) -> Tensor:
        """Where the whole context of every request is kept, one request after the other."""
        none = torch.zeros(0, dtype=torch.int64)
        rows = zip(self.block_table, self.seq_lens.tolist(), strict=True)
        return torch.cat([none, *(slots_of(row, length, block_size) for row, length in rows)])


def attend(
    kernels: ModuleType,
    query: Tensor,
    cache: Tensor,
    batch: Batch,
    scale: float,
    group_size: int,
    sliding_window: int | None = None,
    rotation: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """paged_attention into a new tensor."""
    output = torch.full_like(query, 9.0)
    kernels.paged_attention(
        query,
        cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        output,
        scale,
        group_size,
        sliding_window,
        rotation,
        logits_soft_cap=soft_cap,
    )
    return output


def tiles(packed: Tensor, channels: int) -> Tensor:
    """The codes + 8 in tiles of 16 channels, src/kernels.h. packed: [..., bytes].

    Returns: [..., channels, inputs] uint8.
    """
    blocks = packed.unflatten(-1, (channels // 16, -1, 16, 4))
    nibbles = torch.stack([blocks & 15, blocks >> 4], -2)  # [..., tile, block, channel, 2, 4]
    return nibbles.transpose(-3, -4).flatten(-3).flatten(-3, -2)


def as_reference(cache: Tensor, group_size: int) -> Tensor:
    """The CPU's arrangement of each block and head, turned into the reference's."""
    block_size, content_bytes = cache.shape[2:]
    head_size = content_bytes * group_size // (group_size + 8)
    code_bytes = block_size * head_size // 2
    regions = cache.flatten(2).split(
        [code_bytes, code_bytes, cache[0, 0].numel() - 2 * code_bytes], -1
    )
    key = tiles(regions[0], block_size)
    value = tiles(regions[1], head_size).transpose(-1, -2)
    halves = [codes.chunk(2, -1) for codes in (key, value)]
    parameters = regions[2].unflatten(-1, (-1, block_size, 2)).transpose(-2, -3).flatten(-2)
    return torch.cat([*(low | high << 4 for low, high in halves), parameters], -1)
