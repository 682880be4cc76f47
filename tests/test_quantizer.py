"""The uniform grid: its error, its edges, and how it contains what is not finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_offq.quantizer import dequantize, fake_quantize, group_range, quantize

SHAPES = st.tuples(
    st.integers(0, 4), st.integers(1, 4), st.sampled_from([2, 32, 64, 96, 128])
)  # tokens, groups, group size


@given(shape=SHAPES, magnitude=st.integers(-20, 20), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_asymmetric_error_is_at_most_half_a_step(
    shape: tuple[int, int, int], magnitude: int, seed: int
) -> None:
    tokens, num_groups, group_size = shape
    torch.manual_seed(seed)
    x = (torch.randn(tokens, num_groups * group_size) + 3) * 2.0**magnitude
    scale, offset = group_range(x, group_size)
    error = (dequantize(quantize(x, scale, offset), scale, offset) - x).abs()
    # Beside half a step, the float32 rounding of values of this size.
    rounding = 4 * torch.finfo(torch.float32).eps * x.abs()
    bound = (scale / 2).repeat_interleave(group_size, -1) * (1 + 1e-5) + rounding
    assert (error <= bound).all()


@given(shape=SHAPES, clip_ratio=st.sampled_from([1.0, 0.95, 0.8]), symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_fill_the_range_and_no_more(
    shape: tuple[int, int, int], clip_ratio: float, symmetric: bool
) -> None:
    tokens, num_groups, group_size = shape
    x = torch.randn(tokens, num_groups * group_size)
    scale, offset = group_range(x, group_size, clip_ratio, symmetric)
    assert scale.shape == offset.shape == (tokens, num_groups)
    codes = quantize(x, scale, offset)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    grouped = codes.unflatten(-1, (num_groups, group_size))
    if symmetric:
        assert (offset == 0).all()
        assert (grouped.abs().amax(-1) >= 7).all()
        assert (grouped >= -8).all()
        assert (grouped <= 7).all()
    else:
        assert (grouped.amin(-1) == -8).all()
        assert (grouped.amax(-1) == 7).all()


def test_clipping_shrinks_the_range_about_its_centre() -> None:
    x = torch.linspace(-1, 3, 16)[None]
    scale, offset = group_range(x, 16, clip_ratio=0.5)
    levels = dequantize(torch.tensor([[-8, 7]], dtype=torch.int8), scale, offset)
    torch.testing.assert_close(levels, torch.tensor([[0.0, 2.0]]))


def test_ties_go_to_the_even_code() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert quantize(x, one, zero).tolist() == [[-2, -2, 0, 0, 2, 2]]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e-30, 6e4, 3e38, -3e38])
def test_a_constant_group_is_exact(value: float) -> None:
    x = torch.full((2, 64), value)
    assert torch.equal(fake_quantize(x, 32), x)


def test_a_planted_offset_costs_nothing() -> None:
    """What OffQ is for: an outlier shared by a group moves its grid and does not widen it."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    error = (fake_quantize(x, 128) - x).pow(2).mean()
    moved = x + 1000.0
    torch.testing.assert_close(
        (fake_quantize(moved, 128) - moved).pow(2).mean(), error, rtol=1e-2, atol=0
    )
    symmetric = (fake_quantize(moved, 128, symmetric=True) - moved).pow(2).mean()
    assert symmetric > 100 * error


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_group(bad: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 128)
    clean = fake_quantize(x, 64)
    spoilt = x.clone()
    spoilt[1, 70] = bad
    result = fake_quantize(spoilt, 64)
    assert not result[1, 64:].isfinite().any()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])
    assert torch.equal(result[1, :64], clean[1, :64])
    scale, offset = group_range(spoilt, 64)
    assert (quantize(spoilt, scale, offset)[1, 64:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_quantize_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64).to(dtype)
    result = fake_quantize(x, 32, 0.95)
    assert result.dtype == dtype
    assert result.shape == x.shape


def test_extremes_of_float32_do_not_overflow_the_offset() -> None:
    x = torch.tensor([[3.0e38, 3.2e38]])
    torch.testing.assert_close(fake_quantize(x, 2), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [1e-45, 1e-40, 1e-38, 1e-36])
def test_the_smallest_ranges_stay_finite(step: float) -> None:
    """1 / scale overflows for a denormal scale."""
    x = torch.arange(16, dtype=torch.float32)[None] * step
    result = fake_quantize(x, 16)
    assert result.isfinite().all()
    assert (result - x).abs().max() <= 16 * step
