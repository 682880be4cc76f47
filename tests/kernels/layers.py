"""Linear layers as stored, for tests of any backend."""

from dataclasses import dataclass
from math import nan
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_offq.format import pack_int4
from vllm_offq.kernels import cpu, reference
from vllm_offq.kernels.interface import Weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GROUP_SIZES = [2, 6, 16, 32, 64, 96, 128, 256, 512]
Grid = tuple[int, int, float, bool, int]

any_layout = pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.nn.functional.pad(x, (3, 5), value=nan)[:, 3:-5],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.T.contiguous().T,
        lambda x: x.view(2, 9, -1),
    ],
    ids=["columns", "rows", "transposed", "batched"],
)
"""For tests of `view`: inputs of 18 rows of 128 channels, in other places or shapes."""


@dataclass
class Layer:
    """A linear layer as stored, for any backend."""

    codes: Tensor
    scale: Tensor
    group_size: int
    rotation_block_size: int = 0
    clip_ratio: float = 1.0
    symmetric: bool = False
    bits: int = 4
    bias: Tensor | None = None

    @classmethod
    def random(cls, outputs: int, num_groups: int, group_size: int, **rest: Any) -> "Layer":
        codes = torch.randint(-8, 8, (outputs, num_groups * group_size), dtype=torch.int8)
        return cls(codes, torch.rand(outputs, 1).half(), group_size, **rest)

    @classmethod
    def identity(cls, channels: int, *grid: Any) -> "Layer":
        """Returns its input as the grid sees it."""
        ones = torch.ones(channels, 1, dtype=torch.float16)
        return cls(torch.eye(channels, dtype=torch.int8), ones, *grid)

    @property
    def grid(self) -> Grid:
        rounding = self.clip_ratio, self.symmetric, self.bits
        return self.group_size, self.rotation_block_size, *rounding

    @property
    def weight(self) -> Tensor:
        channels = self.codes.shape[1] // self.scale.shape[1]
        return self.codes * self.scale.double().repeat_interleave(channels, 1)

    def prepare(self, kernels: ModuleType) -> Weight:
        return kernels.prepare_weight(pack_int4(self.codes), self.scale, self.group_size)

    def run(self, kernels: ModuleType, x: Tensor) -> Tensor:
        weight = self.prepare(kernels)
        return kernels.linear(x, weight, self.bias, len(self.codes), *self.grid)

    def sum_error(self, x: Tensor, segment: int | None = None) -> Tensor:
        """By how much two float32 sums of the same products can differ. x: [T, K].

        Summing n terms errs by at most n * 2^-24 * sum |term|: here two a segment, three roundings
        of each term before, and the bias; twice, because both sides err. segment: channels that
        are summed as integers; None: as many as on CPUs.
        """
        segment = segment or cpu.segment_size(self.group_size)
        codes, *parameters = (p.double() for p in reference.rotate_quantize(x, *self.grid))
        scale, offset = (p.repeat_interleave(self.group_size // segment, 1) for p in parameters)
        q, w = (part.unflatten(1, (-1, segment)) for part in (codes, self.weight))
        terms = torch.einsum("ts,tsn->tn", scale, torch.einsum("tsk,nsk->tsn", q, w).abs())
        terms += offset.abs() @ w.sum(-1).abs().T
        if self.bias is not None:
            terms += self.bias.double().abs()
        return 2 * (2 * q.shape[1] + 4) * 2.0**-24 * terms


@st.composite
def layers(draw: st.DrawFn, most_tokens: int) -> tuple[Layer, Tensor]:
    """Any layer, and an input of it, [T, K]."""
    num_groups, group_size = draw(st.integers(1, 5)), draw(st.sampled_from(GROUP_SIZES))
    tokens, outputs = draw(st.integers(0, most_tokens)), draw(st.integers(1, 150))
    dtype = draw(st.sampled_from(FLOATS))
    rounding = {
        "clip_ratio": draw(st.sampled_from([1.0, 0.9, 0.51])),
        "symmetric": draw(st.booleans()),
        "bits": draw(st.sampled_from([4, 8])),
    }
    scale_per_group, has_bias = draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = Layer.random(outputs, num_groups, group_size, **rounding)
    if scale_per_group:
        layer.scale = torch.rand(outputs, num_groups).half()
    if has_bias:
        layer.bias = torch.randn(outputs).to(dtype)
    x = torch.randn(tokens, num_groups * group_size) + torch.randn(tokens, 1)
    return layer, x.to(dtype)


def assert_close(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Within error, and one rounding to the dtype of the output."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    one = torch.finfo(actual.dtype)
    rounding = one.eps * expected.double().abs().clamp_min(one.smallest_normal)
    assert ((actual.double() - expected.double()).abs() <= error + rounding).all()
