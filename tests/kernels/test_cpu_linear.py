"""The CPU's linear layers against the reference: C++ for every instruction set, and numba."""

from collections.abc import Callable
from functools import partial
from math import lcm, nan
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from layers import FLOATS, GROUP_SIZES, Grid, Layer, assert_close, layers
from parallel import at_once, openmp_threads
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.kernels import cpu, reference
from vllm_offq.kernels.cpu import library
from vllm_offq.quantizer import code_range, dequantize


def assert_same_codes(kernels: ModuleType, grid: Grid, x: Tensor) -> None:
    """Exactly: the identity as weight returns scale * code + offset. x: [T, K] float32."""
    codes, scale, offset = reference.rotate_quantize(x, *grid)
    layer = Layer.identity(x.shape[1], *grid)
    y = layer.run(kernels, x)
    assert_close(y, dequantize(codes, scale, offset), layer.sum_error(x))
    steps = (y.unflatten(1, (-1, grid[0])) - offset[..., None]) / scale[..., None]
    steps.nan_to_num_(0.0)  # of constant groups, whose scale is 0
    assert torch.equal(steps.round().flatten(1), codes.float())


@given(case=layers(300))
@settings(max_examples=150, deadline=None)
def test_any_layer(kernels: ModuleType, case: tuple[Layer, Tensor]) -> None:
    layer, x = case
    assert_close(layer.run(kernels, x), layer.run(reference, x), layer.sum_error(x))


@pytest.mark.parametrize(
    ("group_size", "block_size"),
    [
        *((size, 0) for size in GROUP_SIZES),
        *((size, size) for size in GROUP_SIZES if size != 6),  # there is none of order 6
        *((16, 2), (64, 8), (128, 512), (24, 12), (20, 20), (252, 252), (32, 224)),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("clip_ratio", "bits"), [(1.0, 4), (0.87, 4), (1.0, 8)])
def test_the_codes_are_those_of_the_grid(
    kernels: ModuleType,
    group_size: int,
    block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
) -> None:
    torch.manual_seed(group_size + block_size)
    channels = 2 * lcm(group_size, block_size or 1)
    x = (torch.randn(7, channels) + 3) * torch.logspace(-12, 3, 7)[:, None]
    x[3] = 0.5
    assert_same_codes(kernels, (group_size, block_size, clip_ratio, symmetric, bits), x)


@pytest.mark.parametrize("largest", [0.0, 1.0, 1.6e38, 1e-30, 1e-36, 1e-39, 1e-42])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_codes_of_constant_huge_and_denormal_values(
    kernels: ModuleType, largest: float, symmetric: bool
) -> None:
    torch.manual_seed(0)
    x = largest * (2 * torch.rand(5, 192) - 1)
    x[0], x[1], x[2, ::3] = 2 * largest, -largest, 0.0
    for bits in (4, 8):
        assert_same_codes(kernels, (96, 0, 1.0, symmetric, bits), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [6, 16, 71])
def test_short_floats_are_only_rounded(
    kernels: ModuleType, outputs: int, dtype: torch.dtype
) -> None:
    """To the bit: from the smallest denormals to infinity."""
    torch.manual_seed(0)
    x = (torch.randn(64, 192) * torch.logspace(-9, 5, 64)[:, None]).to(dtype)
    for bias in (None, torch.randn(outputs).to(dtype)):
        layer = Layer.random(outputs, 2, 96, bias=bias)
        expected = layer.run(kernels, x.float()).to(dtype)
        torch.testing.assert_close(layer.run(kernels, x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale_per_group", [False, True])
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, 1024])
@pytest.mark.parametrize("codes", ["random", "lowest", "highest"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_that_float32_holds_are_exact(
    kernels: ModuleType, bits: int, codes: str, group_size: int, scale_per_group: bool
) -> None:
    """Up to the extremes: scales are powers of two and offsets small integers times them."""
    torch.manual_seed(group_size)

    def extremes(bits: int) -> tuple[int, int]:
        low, high = code_range(bits)
        bounds = {"random": (low, high + 1), "lowest": (low, low + 1), "highest": (high, high + 1)}
        return bounds[codes]

    layer = Layer.random(83, 3, group_size, bits=bits)
    layer.codes.random_(*extremes(4))
    layer.scale = 2.0 ** torch.randint(-1, 2, (83, 3 if scale_per_group else 1)).half()
    grid = torch.randint(*extremes(bits), (21, 3, group_size)).float()
    grid[..., 0], grid[..., -1] = code_range(bits)  # so that a group spans its grid
    exponent, offset = torch.randint(-1, 2, (21, 3, 1)), torch.randint(-3, 4, (21, 3, 1))
    exponent *= bits == 4  # sums of 8 bits and three scales each have more digits than float32
    x = ((grid + offset) * 2.0**exponent).flatten(1)
    expected = layer.run(reference, x)
    for dtype in FLOATS:  # all hold x; halfway between two floats of 16 bits, the even one is near
        assert torch.equal(layer.run(kernels, x.to(dtype)), expected.to(dtype))
    assert torch.equal(expected.double(), x.double() @ layer.weight.T)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.nn.functional.pad(x, (3, 5), value=nan)[:, 3:-5],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.T.contiguous().T,
        lambda x: x.view(2, 9, -1),
        lambda x: torch.nn.functional.pad(x, (1, 1), value=nan).view(2, 9, -1)[..., 1:-1],
    ],
    ids=["columns", "rows", "transposed", "batched", "batched columns"],
)
def test_any_layout_of_the_input(kernels: ModuleType, view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer = Layer.random(40, 2, 64, rotation_block_size=64)
    x = torch.randn(18, 128)
    y = layer.run(kernels, view(x))
    assert y.shape == (*view(x).shape[:-1], 40)
    assert torch.equal(y.view(18, 40), layer.run(kernels, x))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_tokens(kernels: ModuleType, leading: tuple[int, ...]) -> None:
    y = Layer.random(40, 2, 64, rotation_block_size=64).run(kernels, torch.zeros(*leading, 128))
    assert y.shape == (*leading, 40)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [6, 64, 96, 512])
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_do_not_depend_on_each_other(
    kernels: ModuleType, group_size: int, rotated: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    """To the bit, whatever the batch. What is not finite spoils its own row, and all of that."""
    torch.manual_seed(0)
    rotation = 2 * rotated
    layer = Layer.random(70, 2, group_size, symmetric=symmetric, rotation_block_size=rotation)
    x = torch.randn(151, 2 * group_size).to(dtype)
    clean = layer.run(kernels, x)
    for start, end in ((0, 1), (7, 10), (100, 151)):
        assert torch.equal(layer.run(kernels, x[start:end]), clean[start:end])
    spoilt = [3, 5, 6, 128, 130]
    x[3, 0] = x[128, -1] = float("nan")
    x[5, 1] = float("inf")
    x[6, -2], x[130, -1] = float("-inf"), float("inf")
    y = layer.run(kernels, x)
    assert not y[spoilt].isfinite().any()
    others = torch.ones(len(x), dtype=torch.bool)
    others[spoilt] = False
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("tokens", [1, 8, 131])
def test_threads_change_nothing(kernels: ModuleType, tokens: int) -> None:
    torch.manual_seed(0)
    runs = []
    for outputs, group_size in (200, 64), (300, 96):
        layer = Layer.random(outputs, 3, group_size, rotation_block_size=32)
        runs.append(partial(layer.run, kernels, torch.randn(tokens, 3 * group_size)))
    alone = [run() for run in runs]
    with openmp_threads(2):
        for run, y in zip(runs, alone, strict=True):
            assert torch.equal(run(), y)
    for results, y in zip(at_once(runs), alone, strict=True):
        assert all(torch.equal(result, y) for result in results)


@pytest.mark.parametrize(("scale_per_group", "bits"), [(True, 4.25), (False, 4.125 + 16 / 1024)])
def test_the_weight_is_kept_once(scale_per_group: bool, bits: float) -> None:
    """4-bit codes, a 16-bit sum for each group of 128, and the float16 scales."""
    layer = Layer.random(64, 8, 128)
    if scale_per_group:
        layer.scale = torch.rand(64, 8).half()
    weight = layer.prepare(cpu)
    kept = sum(part.untyped_storage().nbytes() for part in weight)
    assert 8 * kept == bits * layer.codes.numel()


@pytest.mark.skipif(bool(library.why_not_usable()), reason="the C++ kernels are not built")
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA_OVERRIDE, "abacus")
    library.isa.cache_clear()
    with pytest.raises(UserError, match=r"VLLM_OFFQ_CPU_ISA=abacus is not available here.*avx2"):
        Layer.random(16, 1, 16).run(cpu, torch.ones(1, 16))


def test_a_hadamard_matrix_of_too_large_a_core_is_refused() -> None:
    with pytest.raises(UserError, match=r"order 284 .* more than the CPU kernels' 256"):
        Layer.random(16, 1, 284, rotation_block_size=284).run(cpu, torch.ones(1, 284))
