"""Triton's linear layers against the reference."""

import sys
from collections.abc import Callable
from dataclasses import replace
from math import inf, lcm, nan

import pytest
import torch
from hypothesis import given, settings
from layers import FLOATS, GROUP_SIZES, Grid, Layer, any_layout, assert_close, layers
from torch import Tensor
from triton_codes import assert_same_codes
from triton_tiles import SMALL, always

from vllm_offq.format import unpack_int4
from vllm_offq.kernels import reference, triton
from vllm_offq.kernels.triton import gemm_config, target
from vllm_offq.kernels.triton.gemm_config import GemmConfig
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize
from vllm_offq.quantizer import code_range
from vllm_offq.rotation import hadamard

# The packages have functions of these names.
gemm = sys.modules["vllm_offq.kernels.triton.gemm"]
linear = sys.modules["vllm_offq.kernels.triton.linear"]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[GemmConfig], None]:
    """Have layers of any size computed in one way."""
    return lambda config: monkeypatch.setattr(linear, "gemm_config", always(config))


def assert_same(layer: Layer, x: Tensor) -> None:
    step = gemm_config.block_k(layer.group_size)
    error = layer.sum_error(x, step if layer.group_size % step == 0 else layer.group_size)
    assert_close(layer.run(triton, x), layer.run(reference, x), error)


@given(case=layers(140))
@settings(max_examples=40, deadline=None)
def test_any_layer(case: tuple[Layer, Tensor]) -> None:
    assert_same(*case)


@pytest.mark.parametrize("split_k", [1, 5])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("group_size", [64, 96, 256])
@pytest.mark.parametrize("scale_per_group", [False, True])
@pytest.mark.parametrize("nvidia", [False, True])
def test_all_ways_to_compute_a_layer(
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[GemmConfig], None],
    nvidia: bool,
    scale_per_group: bool,
    group_size: int,
    wide: bool,
    split_k: int,
) -> None:
    """In tiles that the layer does not fill; by PTX and magic floats, or by plain operations."""
    gpu = target.INTERPRETER._replace(has_ptx=nvidia, converts_slowly=nvidia)
    monkeypatch.setattr(gemm, "gpu", lambda: gpu)
    use(replace(SMALL, wide=wide, split_k=split_k))
    torch.manual_seed(split_k)
    layer = Layer.random(40, 3, group_size, bias=torch.randn(40))
    if scale_per_group:
        layer.scale = torch.rand(40, 3).half()
    x = torch.randn(21, 3 * group_size) + torch.randn(21, 1)
    assert_same(layer, x)


@pytest.mark.parametrize("codes", ["lowest", "highest"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 256), (8, 256), (4, 131072)])
@pytest.mark.parametrize("slow", [False, True])
def test_sums_of_extreme_codes_are_exact(
    monkeypatch: pytest.MonkeyPatch, slow: bool, bits: int, group_size: int, codes: str
) -> None:
    """The largest ones that a step can have, times scales of powers of two; and very many."""
    gpu = target.INTERPRETER._replace(converts_slowly=slow)
    monkeypatch.setattr(gemm, "gpu", lambda: gpu)
    end = ["lowest", "highest"].index(codes)
    layer = Layer.random(40, 1, group_size, bits=bits)
    layer.codes.fill_(code_range(4)[end])
    layer.codes[:, 5] += 1 - 2 * end  # sums with a last digit, which TF32 has no room for
    layer.scale.fill_(0.5)
    x = torch.full((5, group_size), float(code_range(bits)[end]))
    x[:, 0], x[:, 1] = code_range(bits)  # so that the group spans its grid
    x += 3
    assert torch.equal(layer.run(triton, x).double(), x.double() @ layer.weight.T)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("group_size", "block_size"),
    [*((size, 0) for size in GROUP_SIZES), (16, 2), (24, 12), (512, 512), (576, 576), (32, 224)],
)
@pytest.mark.parametrize(("clip_ratio", "symmetric", "bits"), [(0.87, False, 4), (1.0, True, 8)])
def test_the_codes_are_those_of_the_grid(
    group_size: int,
    block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    dtype: torch.dtype,
    wide: bool,
) -> None:
    """To the bit, if torch has applied the Hadamard or there is none."""
    torch.manual_seed(group_size)
    x = torch.randn(7, 2 * lcm(group_size, block_size or 1)) + 3
    x = (x * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    x[3] = 0.5
    check_codes((group_size, block_size, clip_ratio, symmetric, bits), x, wide or bits == 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [16, 64, 96, 128])
def test_the_codes_of_a_hadamard_product_that_float32_holds(
    block_size: int, dtype: torch.dtype
) -> None:
    """To the bit: sums of small integers are exact in any order."""
    torch.manual_seed(block_size)
    x = torch.randint(-99, 100, (21, 3 * block_size)).to(dtype)
    check_codes((block_size, block_size, 0.95, False, 4), x, wide=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [64, 96])
def test_codes_are_the_nearest_after_any_hadamard_product(
    block_size: int, dtype: torch.dtype
) -> None:
    """Up to the rounding of a float32 sum of block_size terms."""
    torch.manual_seed(block_size)
    x = torch.randn(21, 3 * block_size).to(dtype)
    rotated = x.double().unflatten(1, (3, -1)) @ hadamard(block_size)
    quantized = rotate_quantize(x, block_size, block_size, 1.0, False, 4, wide=False)
    scale, offset = (p.T[:21, :, None].double() for p in quantized[1:])
    values = unpack_int4(quantized.codes ^ 0x88).unflatten(1, (3, -1)) * scale + offset
    error = 2 * block_size**0.5 * 2.0**-24 * x.double().unflatten(1, (3, -1)).norm(dim=2).max()
    assert ((values - rotated).abs() <= scale / 2 + error).all()


def check_codes(grid: Grid, x: Tensor, wide: bool) -> None:
    assert_same_codes(rotate_quantize(x, *grid, wide), reference.rotate_quantize(x, *grid))


@pytest.mark.parametrize("largest", [0.0, 1.0, 1.6e38, 1e-30, 1e-39, 1e-42])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_codes_of_constant_huge_and_denormal_values(largest: float, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = largest * (2 * torch.rand(5, 192) - 1)
    x[0], x[1], x[2, ::3] = 2 * largest, -largest, 0.0
    check_codes((96, 0, 1.0, symmetric, 4), x, wide=False)


@any_layout
def test_any_layout_of_the_input(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer = Layer.random(40, 2, 64, rotation_block_size=64)
    x = torch.randn(18, 128)
    y = layer.run(triton, view(x))
    assert y.shape == (*view(x).shape[:-1], 40)
    assert torch.equal(y.view(18, 40), layer.run(triton, x))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_tokens(leading: tuple[int, ...]) -> None:
    y = Layer.random(40, 2, 64, rotation_block_size=64).run(triton, torch.zeros(*leading, 128))
    assert y.shape == (*leading, 40)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("config", [replace(SMALL, wide=True, split_k=2), SMALL])
def test_what_is_not_finite_spoils_its_own_row(
    use: Callable[[GemmConfig], None],
    config: GemmConfig,
    rotated: bool,
    symmetric: bool,
    bad: float,
) -> None:
    """And all of that."""
    use(config)
    torch.manual_seed(0)
    layer = Layer.random(70, 4, 64, symmetric=symmetric, rotation_block_size=64 * rotated)
    x = torch.randn(35, 256)
    clean = layer.run(triton, x)
    for row, channel in (0, 5), (16, 255), (34, 64):
        x[row, channel] = bad
    y = layer.run(triton, x)
    spoilt = ~x.isfinite().all(1)
    assert not y[spoilt].isfinite().any()
    assert torch.equal(y[~spoilt], clean[~spoilt])
