"""Triton's linears that compute their own input: norms, with a residual or without, activations."""

from collections.abc import Callable
from functools import partial
from math import lcm, nan
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import FLOATS, GROUP_SIZES, Layer, any_layout
from torch import Tensor
from triton_codes import assert_same_codes

from vllm_offq.kernels import reference, triton
from vllm_offq.kernels.triton.rms_norm_quantize import MAX_CHANNELS, rms_norm_quantize
from vllm_offq.kernels.triton.silu_and_mul_quantize import silu_and_mul_quantize
from vllm_offq.quantizer import code_range, group_range
from vllm_offq.rotation import hadamard

EPSILON = 1e-5
FLOAT32 = 2.0**-24
"""By which an operation is off."""

ROTATED = [(2, 2), (12, 12), (32, 32), (96, 96), (128, 128), (512, 512), (32, 224)]
"""Groups and Hadamard blocks, of which torch applies the last two."""
GROUPS = [*((size, 0) for size in GROUP_SIZES), *ROTATED]
ROUNDINGS = [(0.87, False, 4), (1.0, True, 8)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [MAX_CHANNELS, MAX_CHANNELS + 128])
def test_wide_tokens(channels: int, residual: bool) -> None:
    """The widest that a program holds, and one that is wider. The root mean square is 2."""
    torch.manual_seed(0)
    grid = 128, 0, 0.95, False, 4
    ones = 2.0 * torch.randint(0, 2, (3, channels)) - 1
    weight, total = torch.randn(channels), torch.empty_like(ones)
    inputs = {"residual": -3 * ones, "total": total} if residual else {}
    x = 5 * ones if residual else 2 * ones
    quantized = rms_norm_quantize(x, *grid, False, weight=weight, epsilon=0.0, **inputs)
    assert_same_codes(quantized, reference.rotate_quantize(ones * weight, *grid))
    assert not residual or torch.equal(total, 2 * ones)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("group_size", "block_size"), GROUPS)
@pytest.mark.parametrize(("clip_ratio", "symmetric", "bits"), ROUNDINGS)
def test_the_codes_of_exact_inputs(
    group_size: int,
    block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    dtype: torch.dtype,
    wide: bool,
) -> None:
    """To the bit, where no step rounds: a root mean square of 2, gates whose sigmoid is 1."""
    torch.manual_seed(group_size)
    channels = 3 * lcm(group_size, block_size or 1)
    grid = group_size, block_size, clip_ratio, symmetric, bits
    wide = wide or bits == 8

    ones = (2 * torch.randint(0, 2, (7, channels)) - 1).to(dtype)
    weight = torch.randint(-99, 100, (channels,)).to(dtype)
    expected = reference.rotate_quantize(ones * weight, *grid)
    norm = partial(rms_norm_quantize, weight=weight, epsilon=0.0)
    assert_same_codes(norm(2 * ones, *grid, wide), expected)
    total = torch.empty_like(ones)
    quantized = norm(5 * ones, *grid, wide, residual=-3 * ones, total=total)
    assert_same_codes(quantized, expected)
    assert torch.equal(total, 2 * ones)

    gate, up = torch.randint(20, 100, (7, channels)), torch.randint(-9, 10, (7, channels))
    expected = reference.rotate_quantize((gate * up).to(dtype), *grid)
    gate_up = torch.cat([gate, up], 1).to(dtype)
    assert_same_codes(silu_and_mul_quantize(gate_up, *grid, wide), expected)


def fused(layer: Layer, kernels: ModuleType, name: str, *inputs: Any) -> Any:
    weight = layer.prepare(kernels)
    function = getattr(kernels, name)
    return function(*inputs, weight, layer.bias, len(layer.codes), *layer.grid)


@given(
    tokens=st.integers(0, 20),
    num_groups=st.integers(1, 5),
    groups=st.sampled_from(GROUPS[:-1]),
    rounding=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_input(
    tokens: int,
    num_groups: int,
    groups: tuple[int, int],
    rounding: tuple[float, bool, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    seed: int,
) -> None:
    """The identity returns what the grid makes of its input: the nearest of its numbers."""
    torch.manual_seed(seed)
    channels = num_groups * groups[0]
    layer = Layer.identity(channels, *groups, *rounding)
    x, residual = (torch.randn(2, tokens, channels) + torch.randn(tokens, 1)).to(dtype)
    weight = (1 + torch.randn(channels) / 4).to(weight_dtype)

    def normalize(x: Tensor) -> Tensor:
        inverse = (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        return x * inverse * weight.double()

    # Of a sum of positive terms the root is off by half as much as the sum.
    error = (channels / 2 + 8) * FLOAT32
    y = fused(layer, triton, "rms_norm_linear", x, weight, EPSILON)
    assert_on_grid(layer, y, normalize(x.double()), error)

    sum_inputs = x, residual, weight, EPSILON
    y, total = fused(layer, triton, "fused_add_rms_norm_linear", *sum_inputs)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    assert_on_grid(layer, y, normalize(x.double() + residual.double()), error)

    y = fused(layer, triton, "silu_and_mul_linear", torch.cat([x, residual], 1))
    # An exponent of size g is off by g times its rounding, and so is what it is of.
    largest = x.double().abs().amax() if tokens else 0.0
    exact = torch.nn.functional.silu(x.double()) * residual.double()
    assert_on_grid(layer, y, exact, (2 * largest + 16) * FLOAT32)


def assert_on_grid(layer: Layer, y: Tensor, x: Tensor, error: float) -> None:
    """y is x as the grid of layer sees it. error: of x, a part of itself, before it is rounded."""
    group_size, block_size, *rounding = layer.grid
    one = torch.finfo(y.dtype)
    off = (error + one.eps / 2) * x.abs() + one.smallest_normal
    if block_size:
        blocks, off = x.unflatten(1, (-1, block_size)), off.unflatten(1, (-1, block_size))
        x = (blocks @ hadamard(block_size).double()).flatten(1)
        sums = 2 * block_size**0.5 * FLOAT32 * blocks.norm(dim=2)
        off = (off.sum(2) * block_size**-0.5 + sums).repeat_interleave(block_size, 1)
    scale, offset = (p.double()[..., None] for p in group_range(x, group_size, *rounding))
    least, largest = code_range(layer.bits)
    values, off, y = (z.double().unflatten(1, (-1, group_size)) for z in (x, off, y))
    seen = torch.maximum(torch.minimum(values, offset + largest * scale), offset + least * scale)
    # Both ends of the range and the value are off; so is the sum of offset and step, in float32.
    off = 4 * off.amax(2, keepdim=True) + 16 * FLOAT32 * values.abs().amax(2, keepdim=True)
    assert ((y - seen).abs() <= scale / 2 + off + one.eps * seen.abs()).all()


@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_not_a_number_spoils_its_own_row(rotated: bool) -> None:
    torch.manual_seed(0)
    layer = Layer.random(70, 4, 64, rotation_block_size=64 * rotated)
    gate_up, weight = torch.randn(35, 512), torch.ones(256)
    spoilt = gate_up.clone()
    for row, channel in (0, 5), (16, 255), (34, 300):
        spoilt[row, channel] = nan

    def results(x: Tensor) -> dict[str, Tensor]:
        gate, up = x.chunk(2, 1)
        return {
            "norm": fused(layer, triton, "rms_norm_linear", gate + up, weight, EPSILON),
            "sum": fused(layer, triton, "fused_add_rms_norm_linear", gate, up, weight, EPSILON)[0],
            "activation": fused(layer, triton, "silu_and_mul_linear", x),
        }

    clean, bad = results(gate_up), spoilt.isnan().any(1)
    for name, y in results(spoilt).items():
        assert y[bad].isnan().all(), name
        assert torch.equal(y[~bad], clean[name][~bad]), name


@pytest.mark.parametrize("kernels", [triton, reference])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_tokens(kernels: ModuleType, leading: tuple[int, ...]) -> None:
    layer, x = Layer.random(40, 2, 64), torch.zeros(*leading, 128)
    weight = torch.ones(128)
    y, total = fused(layer, kernels, "fused_add_rms_norm_linear", x, x, weight, EPSILON)
    assert (y.shape, total.shape) == ((*leading, 40), x.shape)
    assert fused(layer, kernels, "rms_norm_linear", x, weight, EPSILON).shape == y.shape
    gate_up = torch.zeros(*leading, 256)
    assert fused(layer, kernels, "silu_and_mul_linear", gate_up).shape == y.shape


@any_layout
def test_any_layout_of_the_input(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer = Layer.random(40, 2, 64, rotation_block_size=64)
    x, residual, weight = torch.randn(18, 128), torch.randn(18, 128), torch.randn(128)

    def results(view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = view(x), view(residual), weight, EPSILON
        gate_up = view(torch.cat([x, residual], 1))
        return [
            *fused(layer, triton, "fused_add_rms_norm_linear", *inputs),
            fused(layer, triton, "silu_and_mul_linear", gate_up),
        ]

    for actual, expected in zip(results(view), results(lambda x: x), strict=True):
        assert actual.shape[:-1] == view(x).shape[:-1]
        assert torch.equal(actual.flatten(0, -2), expected)
