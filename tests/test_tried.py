"""`benchmarks.tried` on a small model."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CORPUS, make_tiny, make_tiny_llama
from transformers import AutoModelForCausalLM

from benchmarks import tried
from benchmarks.scores import logprobs
from calibration.architectures import find_architecture
from calibration.instrument import instrument


def run(monkeypatch: pytest.MonkeyPatch, model: Path, text: Path) -> None:
    words = f"tried {model} --calibration {text} --text {text} --samples 2 --sequence-length 64 "
    words += "--windows 2 --window-length 64"
    monkeypatch.setattr(sys, "argv", words.split())
    tried.main()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(CORPUS * 8, encoding="utf-8")
    return path


def test_tables(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, make_tiny_llama(tmp_path / "model"), text)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    bases, caches = [row for row in rows if len(row) == 5], [row for row in rows if len(row) == 2]
    assert [row[1] for row in bases] == ["yes"] * 4 + ["no"] * 3
    assert all(0 < float(cell) < 1 for row in bases for cell in row[2:])
    divergences = {name: kl.split()[0] for name, kl in caches}
    assert len(divergences) == 4
    assert divergences["hadamard"] != divergences["hadamard, mean of keys removed"]
    assert all(0 < float(kl) < 1 for kl in divergences.values())


def test_attention_does_not_see_a_shift_of_all_keys(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    instrument(model, find_architecture(["LlamaForCausalLM"]).of(model.config))
    tokens = torch.arange(32)
    expected = logprobs(model, tokens)
    tried.subtract(model, [torch.randn(1, 2, 1, 64) for _ in range(2)])
    torch.testing.assert_close(logprobs(model, tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_fused_rotation_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^benchmarks\.tried: .* fuses no rotation; give a Llama"):
        run(monkeypatch, make_tiny(tmp_path / "model", "Gemma2"), text)
