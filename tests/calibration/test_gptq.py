"""GPTQ: a valid grid, less output error than rounding, the scales that are stored."""

import pytest
import torch
from torch import Tensor

from calibration.gptq import gptq, output_error, round_to_nearest, search_scale
from vllm_offq.errors import UserError


def problem(rows: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=generator) * 0.02
    mixing = torch.randn(channels, channels, generator=generator)
    inputs = torch.randn(4 * channels, channels, generator=generator) @ mixing
    return weight, inputs.T @ inputs


@pytest.mark.parametrize("group_size", [None, 64, 128, 256])
@pytest.mark.parametrize("channels", [256, 768])
def test_beats_round_to_nearest(channels: int, group_size: int | None) -> None:
    weight, hessian = problem(48, channels)
    codes, scale = gptq(weight, hessian, group_size)
    assert codes.shape == weight.shape and codes.dtype == torch.int8
    assert scale.shape == (48, channels // group_size if group_size else 1)
    assert scale.dtype == torch.float16
    assert codes.min() >= -8 and codes.max() <= 7
    nearest = round_to_nearest(weight, hessian.diagonal(), group_size)
    assert output_error(weight, codes, scale, hessian) < 0.8 * output_error(
        weight, *nearest, hessian
    )


def test_group_scales_beat_one_scale_a_row() -> None:
    weight, hessian = problem(48, 256)
    weight[:, :64] *= 8  # groups of different magnitude
    errors = [output_error(weight, *gptq(weight, hessian, size), hessian) for size in (None, 64)]
    assert errors[1] < errors[0]


def test_rows_are_independent() -> None:
    """So linears that share an input may be rounded as one matrix."""
    weight, hessian = problem(40, 192)
    codes, scale = gptq(weight, hessian, None)
    lower = gptq(weight[24:], hessian, None)
    assert codes[24:].equal(lower[0]) and scale[24:].equal(lower[1])


def test_channels_without_input_and_rows_of_zeros() -> None:
    weight, hessian = problem(8, 128)
    hessian[:, 5] = 0
    hessian[5, :] = 0
    weight[3] = 0
    codes, scale = gptq(weight, hessian, None)
    assert scale.isfinite().all() and (scale > 0).all()
    assert (codes[3] == 0).all()


def test_a_hessian_of_few_tokens_is_damped_until_it_factors() -> None:
    weight, _ = problem(8, 128)
    token = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) * 1e4
    codes, scale = gptq(weight, token.T @ token, None)
    assert output_error(weight, codes, scale, token.T @ token) < 0.1


def test_scale_search_prefers_important_channels() -> None:
    weight = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    importance = torch.tensor([0.0, 1.0, 1.0, 1.0])
    scale = search_scale(weight, importance)
    quantized = (weight / scale[:, None]).round().clamp(-8, 7) * scale[:, None]
    assert (quantized[0, 1:] - 0.1).abs().max() < 0.004


def test_a_weight_beyond_float16_scales_is_refused() -> None:
    with pytest.raises(UserError, match="float16 scale"):
        search_scale(torch.full((1, 4), 1e6), torch.ones(4))
