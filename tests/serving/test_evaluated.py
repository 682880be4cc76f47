"""`offq eval` through vLLM's engine gives the figures of a plain transformers calculation."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CORPUS
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.cli import main
from calibration.simulate import load_simulated

pytestmark = pytest.mark.slow

LENGTH = 64


def test_figures(
    original: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 10)
    figures = tmp_path / "figures.json"
    arguments = f"eval {checkpoint} --against {original} --text {text} --json {figures}"
    arguments += f" --sequence-length {LENGTH} --top-logprobs 512 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["offq", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code

    tokens = AutoTokenizer.from_pretrained(original)(text.read_text())["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    with torch.no_grad():
        p, q = (
            model(windows).logits[:, :-1].float().log_softmax(-1)
            for model in (
                AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32),
                load_simulated(checkpoint)[0],
            )
        )
    expected = [float((-x.gather(-1, windows[:, 1:, None])).mean().exp()) for x in (p, q)]
    evaluated = json.loads(figures.read_text())
    [model] = evaluated["models"]
    assert evaluated["windows"] == len(windows) > 1
    perplexity = evaluated["original"]["perplexity"]["value"], model["perplexity"]["value"]
    assert perplexity[0] == pytest.approx(expected[0], rel=1e-4)
    # A code at a boundary may fall to the other side: see test_served.py.
    assert perplexity[1] == pytest.approx(expected[1], rel=1e-2)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert model["kl_divergence"]["value"] == pytest.approx(kl, rel=5e-2)
    agreement = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    # If one likeliest token in twenty differs, either way: four standard errors over the tokens.
    error = 4 * (0.05 / windows.numel()) ** 0.5
    assert model["top1_agreement"]["value"] == pytest.approx(agreement, abs=error)
    assert model["unseen_mass"] == 0
