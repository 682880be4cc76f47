"""`benchmarks.last_bits` on a small model."""

from pathlib import Path

import pytest
from tiny_models import CORPUS, make_tiny_llama

from benchmarks import last_bits
from calibration.pipeline import quantize
from calibration.settings import Settings


def test_a_checkpoint_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of one millionth moves codes, so that predictions are others."""
    model, text = make_tiny_llama(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS) * 20)
    quantize(str(model), tmp_path / "offq", Settings(samples=2, sequence_length=32))
    last_bits.main(str(model), tmp_path / "offq", text, 2, 32)
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "the checkpoint" in line]
    assert "tiny: 2 windows of 32 tokens" in printed
    assert [row[1].strip() for row in rows] == ["the original", "the checkpoint"]
    assert all(float(row[3].partition("±")[0]) > 0 for row in rows)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.last_bits: .*no-such-folder"):
        last_bits.main("model", tmp_path / "no-such-folder", tmp_path / "text.txt", 2, 32)
