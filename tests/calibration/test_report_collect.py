"""What a report collects from tensors."""

import pytest
import torch

from calibration.report.collect import NUM_BINS, ActivationHistograms, spectrum


def test_histograms_do_not_depend_on_the_order_of_batches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(7, 64) * scale for scale in (0.01, 1.0, 300.0)]
    results = []
    for order in (batches, batches[::-1]):
        histograms = ActivationHistograms("model.layers.0", "mlp_input", group_size=32)
        for batch in order:
            histograms.add_original(batch)
        results.append(histograms.result())
    assert results[0] is not None
    assert results[1] is not None
    (first,), (second,) = (result.stages for result in results)
    assert first.counts == second.counts
    assert sum(first.counts) == 3 * 7 * 64
    values = torch.cat(batches).flatten().double()
    low, width = first.bin_edges[0], first.bin_edges[1] - first.bin_edges[0]
    expected = torch.bincount(((values - low) / width).floor().long(), minlength=NUM_BINS)
    assert first.counts == expected.tolist()
    assert first.max_magnitude == float(values.abs().max())
    assert first.rms == pytest.approx(float(values.square().mean().sqrt()))
    kurtosis = values.pow(4).mean() / values.square().mean() ** 2
    assert first.kurtosis == pytest.approx(float(kurtosis))


def test_removing_the_offset_narrows_the_histogram() -> None:
    torch.manual_seed(0)
    histograms = ActivationHistograms("model.layers.0", "mlp_input", group_size=32)
    x = torch.randn(100, 64) + torch.tensor([40.0, -10.0]).repeat_interleave(32)
    x[0, 0] = torch.nan  # which the pipeline refuses in its own words
    histograms.add_rotated(x[1:])
    histograms.add_original(x)
    result = histograms.result()
    assert result is not None
    assert [stage.stage for stage in result.stages] == ["original", "rotated", "offset removed"]
    assert sum(result.stages[0].counts) == x.numel() - 1
    assert result.stages[1].max_magnitude > 40
    assert result.stages[2].max_magnitude < 5


def test_nothing_collected_is_none() -> None:
    histograms = ActivationHistograms("model.layers.0", "mlp_input", 32, symmetric=True)
    assert histograms.result() is None
    histograms.add_rotated(torch.zeros(2, 64))
    result = histograms.result()
    assert result is not None
    assert [(stage.stage, stage.rms) for stage in result.stages] == [("rotated", 0.0)]
    assert spectrum(torch.zeros(4), "all") is None


def test_the_spectrum_is_that_of_the_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(9, 100)
    tokens[:, 3] += 50
    squares = torch.linalg.svdvals(tokens.double()).square()
    expected = (squares / squares.sum()).tolist()
    for energy in (tokens.T @ tokens, tokens @ tokens.T, squares.flip(0)):
        found = spectrum(energy, "top-1")
        assert found is not None
        assert found.fractions[:9] == pytest.approx(expected, abs=1e-6)
        assert sum(found.fractions) == pytest.approx(1)
