"""Ragged batches over the pages of vllm_offq.kernels.triton, for tests of its attention."""

import sys
from dataclasses import dataclass
from math import inf
from unittest.mock import patch

import torch
from paged import Batch, empty_cache
from torch import Tensor
from triton_pages import as_reference

from vllm_offq.kernels import reference
from vllm_offq.kernels.triton.kv_store import kv_store
from vllm_offq.kernels.triton.paged_attention import paged_attention

MODULE = sys.modules["vllm_offq.kernels.triton.paged_attention"]  # the package may shadow it

GARBAGE = 0xFF  # a NaN where it is read as a scale or an offset


@dataclass
class Scene:
    """Requests, their pages, and what they ask."""

    batch: Batch
    cache: Tensor
    query: Tensor
    group_size: int
    sliding_window: int | None = None
    rotation: Tensor | None = None
    soft_cap: float | None = None
    num_cores: int = 1
    """Of the GPU: from 2 on, few requests are split."""

    @classmethod
    def random(
        cls,
        seq_lens: list[int],
        new: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        head: tuple[int, int] = (64, 64),
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        sliding_window: int | None = None,
        rotated: bool = False,
        soft_cap: float | None = None,
        num_cores: int = 1,
    ) -> "Scene":
        batch, (head_size, group_size) = Batch.of(seq_lens, new, block_size), head
        blocks = 1 + sum(-(-length // block_size) for length in seq_lens)
        cache = empty_cache(blocks, kv_heads, block_size, head_size, group_size, GARBAGE)
        rotation = None
        if rotated:
            rotation = torch.linalg.qr(torch.randn(kv_heads, head_size, head_size))[0].contiguous()
        key, value = torch.randn(2, sum(seq_lens), kv_heads, head_size).add(0.3).to(dtype).unbind(0)
        kv_store(key, value, cache, batch.slots(block_size), group_size, rotation)
        query = torch.randn(sum(new), heads, head_size).to(dtype)
        rest = sliding_window, rotation, soft_cap, num_cores
        return cls(batch, cache, query, group_size, *rest)

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def run(self, output: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
        output = torch.full_like(self.query, 9.0) if output is None else output
        batch = self.batch.block_table, self.batch.seq_lens, self.batch.query_start_loc
        rest = self.scale, self.group_size, self.sliding_window, self.rotation
        new = max(self.batch.query_start_loc.diff().tolist(), default=0)
        with patch.object(MODULE, "num_cores", lambda device: self.num_cores):
            paged_attention(
                self.query,
                self.cache,
                *batch,
                output,
                *rest,
                max_query_len=new,
                logits_soft_cap=self.soft_cap,
                workspace=workspace,
            )
        return output

    def expected(self) -> Tensor:
        output = torch.full(self.query.shape, 9.0)
        cache = as_reference(self.cache, self.group_size)
        batch = self.batch.block_table, self.batch.seq_lens, self.batch.query_start_loc
        rest = self.scale, self.group_size, self.sliding_window, self.rotation
        query, soft_cap = self.query.float(), self.soft_cap
        reference.paged_attention(query, cache, *batch, output, *rest, logits_soft_cap=soft_cap)
        return output

    def deviation(self) -> Tensor:
        """At most the standard deviation from the reference, of roundings. [T, H, D].

        A number that is rounded is off by at most half a step, so by 1 / sqrt(3) of that in the
        mean: in queries that are rotated, and in probabilities times the scale of their value.
        Float32 operations are off by 2^-24 of themselves; n of them, not related, by sqrt(n) times
        as much. A capped score is the cap times a number that is made of three such operations and
        a quotient. A score that is off by e moves an average by at most e times the largest of what
        is averaged. Probabilities of float16 have no steps below 2^-24.
        """
        query, (_, heads, head_size) = self.query.float(), self.query.shape
        half_step = torch.finfo(self.query.dtype).eps / 2 / 3**0.5
        float32 = 2 * 2.0**-24  # on both sides
        if self.rotation is not None:
            query = reference.rotate_heads(query, self.rotation)
        deviation = torch.zeros(query.shape)
        cache, block_size = as_reference(self.cache, self.group_size), self.cache.shape[2]
        for index, length in enumerate(self.batch.seq_lens.tolist()):
            rows = self.batch.rows(index)
            blocks = self.batch.block_table[index, : -(-length // block_size)]
            key, value = (
                x.repeat_interleave(heads // len(x), 0)
                for x in reference.kv_load(cache, blocks, length, self.group_size)
            )
            q = query[rows].transpose(0, 1)  # [H, new, D]
            position = torch.arange(length - q.shape[1], length)[:, None]
            distance = position - torch.arange(length)
            hidden = (distance < 0) | (distance >= (self.sliding_window or inf))
            scores, cap = q @ key.transpose(1, 2) * self.scale, self.soft_cap
            if cap:
                scores = cap * (scores / cap).tanh()
            p = scores.masked_fill(hidden, -inf).softmax(2)
            score = float32 * q.norm(dim=2) * key.norm(dim=2).amax(1)[:, None] * head_size**0.5
            if self.rotation is not None:
                products = q.square() @ key.square().transpose(1, 2)
                score = score + half_step * products.amax(2).sqrt()
            score = score * self.scale + 4 * float32 * (cap or 0)
            groups = value.unflatten(2, (-1, self.group_size))
            code = 8 / 15 * (groups.amax(3) - groups.amin(3)).repeat_interleave(self.group_size, 2)
            average = half_step * (p.square() @ code.square()).sqrt()
            if self.query.dtype == torch.float16:
                average = average + 2.0**-25 * 8 * length**0.5
            most = value.abs().amax((1, 2))[:, None, None]
            average = average + most * (score[..., None] + float32 * length**0.5)
            deviation[rows] = average.transpose(0, 1)
        return deviation

    def check(self) -> None:
        actual, expected = self.run(), self.expected()
        assert actual.isfinite().all()
        rounding = torch.finfo(actual.dtype).eps * expected.abs()
        error = ((actual.float() - expected).abs() - rounding).clamp_min(0)
        deviation = self.deviation()
        assert (error <= 6 * deviation).all()
        assert error.norm() <= deviation.norm()
