"""GPTQ: a valid grid, less output error than rounding, the scales that are stored."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from calibration import scales
from calibration.correction import Correction
from calibration.gptq import descend, factor, gptq, output_error, round_to_nearest
from calibration.scales import fit_scales, search_scales
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


def test_a_hessian_of_few_tokens_is_rounded_by() -> None:
    weight, _ = problem(8, 128)
    token = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) * 1e4
    codes, scale = gptq(weight, token.T @ token, None)
    assert output_error(weight, codes, scale, token.T @ token) < 0.1


def test_a_hessian_that_does_not_factor_is_damped_until_it_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Float32 may leave eigenvalues below zero; here one of -3 beside a mean diagonal of 1."""
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 4.0
    damped, inverse_factor = factor(hessian, what="w")
    assert damped[0, 0] == 1 + 10 and inverse_factor.isfinite().all()
    assert [record.args for record in caplog.records] == [("w", 0.1), ("w", 1.0), ("w", 10.0)]


def test_a_hessian_that_never_factors_is_refused() -> None:
    with pytest.raises(UserError, match="no usable second moments"):
        factor(torch.full((64, 64), torch.nan))


def test_scale_search_prefers_important_channels() -> None:
    weight = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    importance = torch.tensor([0.0, 1.0, 1.0, 1.0])
    scale = search_scales(weight, importance, 4)
    quantized = (weight / scale).round().clamp(-8, 7) * scale
    assert (quantized[0, 1:] - 0.1).abs().max() < 0.004


@pytest.mark.parametrize("deviation", [1e-2, 1e-4, 1e-5])
def test_small_weights_are_rounded_as_well(deviation: float) -> None:
    weight, _ = problem(64, 128)
    weight = weight / weight.std() * deviation
    codes, scale = round_to_nearest(weight, torch.ones(128), None)
    error = (codes * scale.float() - weight).square().sum() / weight.square().sum()
    assert error < 0.02


def test_a_weight_beyond_float16_scales_is_refused() -> None:
    with pytest.raises(UserError, match="float16 scale"):
        search_scales(torch.full((1, 4), 1e6), torch.ones(4), 4)


def test_scales_of_many_rows_are_those_of_each() -> None:
    weight, hessian = problem(700, 256)  # more than are searched at once
    importance = hessian.diagonal()
    found = search_scales(weight, importance, 64)
    assert found.half().float().equal(found)
    for row in (0, 511, 512, 699):
        for group in range(4):
            part = slice(64 * group, 64 * group + 64)
            alone = search_scales(weight[row : row + 1, part], importance[part], 64)
            assert alone.item() == found[row, group]


def test_factor_inverts_the_damped_hessian() -> None:
    _, hessian = problem(1, 96)
    damped, inverse_factor = factor(hessian)
    assert inverse_factor.equal(inverse_factor.triu())
    inverse = inverse_factor.T @ inverse_factor
    error = inverse @ damped.double() - torch.eye(96, dtype=torch.float64)
    # The damped Hessian is kept in float32, the factor is of what it was before.
    assert error.norm() < torch.finfo(torch.float32).eps * inverse.norm() * damped.norm()
    assert damped.fill_diagonal_(0).equal(hessian.clone().fill_diagonal_(0))


@pytest.mark.parametrize("group_size", [64, 192])
def test_refits_never_raise_the_error_they_minimise(group_size: int) -> None:
    weight, hessian = problem(48, 192)
    metric = factor(hessian)[0]
    codes, scales = (part.float() for part in gptq(weight, hessian, group_size))
    errors = [output_error(weight, codes, scales, metric)]
    for _ in range(3):
        scales = fit_scales(weight, codes, scales, metric)
        errors.append(output_error(weight, codes, scales, metric))
        codes = descend(weight, codes, scales, metric)
        errors.append(output_error(weight, codes, scales, metric))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]
    refined = gptq(weight, hessian, group_size, refits=3)
    assert output_error(weight, *refined, metric) == pytest.approx(errors[-1])
    assert refined[0].min() >= -8 and refined[0].max() <= 7


@pytest.mark.parametrize("group_size", [None, 64])
def test_channels_are_rounded_in_any_order(group_size: int | None) -> None:
    """Errors land on channels that come later: those of most energy should not be the last."""
    weight, hessian = problem(48, 256)
    energy = torch.logspace(-2, 2, 256)  # the last channels have most
    hessian = hessian * energy[:, None] * energy[None, :]
    order = hessian.diagonal().argsort(descending=True)
    plain, ordered = (
        output_error(weight, *gptq(weight, hessian, group_size, order=o), hessian)
        for o in (None, order)
    )
    assert ordered < 0.9 * plain


def test_an_order_is_a_permutation_of_channels() -> None:
    weight, hessian = problem(48, 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    permuted = gptq(weight[:, order], hessian[order][:, order], None)
    assert torch.equal(permuted[1], gptq(weight, hessian, None, order=order)[1])
    assert torch.equal(permuted[0], gptq(weight, hessian, None, order=order)[0][:, order])
    identity = torch.arange(256)
    in_turn, as_they_are = gptq(weight, hessian, None, order=identity), gptq(weight, hessian, None)
    assert all(map(torch.equal, in_turn, as_they_are))
    ordered, refitted = (
        output_error(weight, *gptq(weight, hessian, None, order=order, refits=n), hessian)
        for n in (0, 1)
    )
    assert refitted < ordered


def test_a_correction_holds_in_any_order() -> None:
    weight, _ = problem(48, 128)
    x = torch.randn(1024, 128, generator=torch.Generator().manual_seed(5))
    correction = Correction((0.1 * x).T @ (0.9 * x), x, 0.9 * x)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    hessian = 0.81 * x.T @ x
    plain, ordered = (correction.apply(weight, factor(hessian, o)[1], o) for o in (None, order))
    torch.testing.assert_close(ordered, plain)
    assert (plain / weight).median() > 1.1


def test_fitted_scales_are_the_best_for_their_codes() -> None:
    weight, hessian = problem(8, 128)
    codes, scales = (part.float() for part in round_to_nearest(weight, hessian.diagonal(), 64))
    best = fit_scales(weight, codes, scales, hessian)
    error = output_error(weight, codes, best, hessian)
    for factor_ in (0.99, 1.01):
        for group in range(2):
            changed = best.clone()
            changed[:, group] *= factor_
            assert output_error(weight, codes, changed, hessian) > error


def test_scales_are_fitted_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their equations take memory by the square of the groups: 224 of 64 in Llama-3-8B."""
    weight, hessian = problem(48, 256)
    codes, old = (part.float() for part in gptq(weight, hessian, 64))
    fitted = fit_scales(weight, codes, old, hessian)
    sizes: list[int] = []
    solve = torch.linalg.solve
    monkeypatch.setattr(scales, "NORMAL_ELEMENTS", 10 * 4**2)
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: sizes.append(a.numel()) or solve(a, b))
    assert fit_scales(weight, codes, old, hessian).equal(fitted)
    assert sizes == [160] * 4 + [128]


def test_the_correction_makes_up_for_noise_in_the_inputs() -> None:
    """Inputs that reach the quantized model scaled by 0.9 need a weight 1/0.9 times as large."""
    weight, _ = problem(48, 128)
    x = torch.randn(1024, 128, generator=torch.Generator().manual_seed(5))
    quantized = 0.9 * x + 0.05 * torch.randn(1024, 128, generator=torch.Generator().manual_seed(6))
    correction = Correction((x - quantized).T @ quantized, x, quantized)
    hessian = quantized.T @ quantized

    def error(codes: Tensor, scales: Tensor) -> float:
        rounded = (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
        expected = x @ weight.T
        return float((quantized @ rounded.T - expected).norm() / expected.norm())

    plain = error(*gptq(weight, hessian, 64))
    corrected = error(*gptq(weight, hessian, 64, correction=correction))
    assert corrected < 0.85 * plain


def test_a_correction_that_is_noise_is_left_out() -> None:
    """Fewer tokens than channels: the shift fits them and nothing else."""
    weight, _ = problem(48, 128)
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 128, generator=generator)
        return x, x + 0.3 * torch.randn(count, 128, generator=generator)

    def error(w: Tensor, x: Tensor, quantized: Tensor) -> float:
        return float((quantized @ w.T - x @ weight.T).square().sum())

    x, quantized = tokens(100)
    cross = (x - quantized).T @ quantized
    _, inverse_factor = factor(quantized.T @ quantized)
    corrected = Correction(cross, *tokens(64)).apply(weight, inverse_factor)
    overfit = (
        weight + (weight.double() @ cross.double() @ inverse_factor.T @ inverse_factor).float()
    )
    fresh = tokens(2048)
    assert error(overfit, *fresh) > 1.5 * error(weight, *fresh)
    assert error(corrected, *fresh) <= 1.01 * error(weight, *fresh)
