"""The histograms of a report show what they say they do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CORPUS, make_tiny
from transformers import AutoModelForCausalLM

from calibration.data import calibration_tokens
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.settings import Settings


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Olmo2"])
def test_the_first_histogram_is_the_models_own(family: str, tmp_path: Path) -> None:
    """With the norm's gain, which is folded away where the linears are quantized."""
    source = make_tiny(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(CORPUS * 8)
    settings = Settings(calibration=(str(tmp_path / "text.txt"),), samples=4, sequence_length=32)
    report = quantize(str(source), tmp_path / "out", settings)
    assert report.histograms is not None
    shown = report.histograms.stages[0]

    original = load_original(str(source))
    tokens = calibration_tokens(
        settings.calibration, original.model, original.tokenizer, 4, 32, 0, lambda steps: None
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: list[torch.Tensor] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor], *rest: Any) -> None:
        seen.append(inputs[0])

    model.get_submodule(f"{report.histograms.layer}.self_attn.q_proj").register_forward_hook(see)
    with torch.no_grad():
        model(tokens)
    assert shown.stage == "original"
    assert shown.max_magnitude == pytest.approx(float(seen[0].abs().max()), rel=2e-3)
    assert shown.rms == pytest.approx(float(seen[0].square().mean().sqrt()), rel=2e-3)


@pytest.mark.parametrize(
    ("family", "recipe", "is_shown"),
    [("Llama", "offq", True), ("Llama", "quarot", False), ("Gemma3", "offq", False)],
)
def test_a_spectrum_is_shown_where_a_rotation_follows_it(
    family: str, recipe: Any, is_shown: bool, tmp_path: Path
) -> None:
    source = make_tiny(tmp_path / "model", family)
    settings = Settings(recipe=recipe, weights="rtn", refits=0, samples=2, sequence_length=32)
    report = quantize(str(source), tmp_path / "out", settings)
    assert (report.spectrum is not None) == is_shown
