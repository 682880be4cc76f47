"""`--clip-ratio auto`: each site's clip ratio by the error of its linears' outputs."""

import sys
from pathlib import Path
from statistics import mean

import pytest
from tiny_experts import make_tiny_experts
from tiny_models import make_tiny

from calibration import cli
from calibration.clipping import CLIP_RATIOS
from calibration.pipeline import quantize
from calibration.report import Report
from calibration.settings import Basis, Settings
from vllm_offq.checkpoint import Checkpoint


def quantized(
    original: Path, text: Path, out: Path, clip_ratio: float | str, basis: Basis = "auto"
) -> tuple[Report, dict[str, float]]:
    """The report, and the clip ratios that the checkpoint is served with."""
    settings = Settings(
        calibration=(str(text),),
        samples=4,
        sequence_length=64,
        basis=basis,
        weights="rtn",
        clip_ratio=clip_ratio,  # type: ignore[arg-type]
    )
    report = quantize(str(original), out, settings)
    sites = Checkpoint(out).config.sites
    return report, {name: site.clip_ratio for name, site in sites.items()}


@pytest.mark.parametrize("value", ["best", "1.5", "0", "nan"])
def test_a_ratio_is_a_number_or_auto(
    value: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["offq", "quantize", str(original), str(tmp_path / "out"), "--clip-ratio", value]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--clip-ratio must be above 0 and at most 1, or auto" in capsys.readouterr().err


def test_chosen_ratios_beat_every_one_for_all(original: Path, text: Path, tmp_path: Path) -> None:
    report, chosen = quantized(original, text, tmp_path / "auto", "auto", "all")
    assert report.clip_ratios == chosen
    assert "choosing clip ratios" in report.seconds_by_stage
    for ratio in (1.0, 0.95, 0.85):
        other, used = quantized(original, text, tmp_path / str(ratio), ratio, "all")
        assert (other.clip_ratios, set(used.values())) == (None, {ratio})
        for site, values in other.signal_to_noise.items():
            # In dB; a random weight passes on the error of its input nearly as it is.
            assert mean(report.signal_to_noise[site]) > mean(values) - 0.05, (site, ratio)


@pytest.mark.parametrize("family", ["Mixtral", "Gemma2"])
def test_experts_and_online_rotations_are_measured_too(
    family: str, text: Path, tmp_path: Path
) -> None:
    make = make_tiny_experts if family == "Mixtral" else make_tiny
    original = make(tmp_path / "original", family)
    _, chosen = quantized(original, text, tmp_path / "out", "auto")
    assert set(chosen.values()) <= set(CLIP_RATIOS)
    assert max(chosen.values()) < 1  # groups of random numbers are better clipped
