"""`benchmarks.accuracy`: its scores and table, its cache, and the peer in another environment."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_models import CORPUS, make_tiny, make_tiny_llama
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks import accuracy, peer
from benchmarks.accuracy_cache import Cache
from benchmarks.accuracy_recipes import MODES, Workload, set_mode, settings_of
from benchmarks.accuracy_table import table
from benchmarks.scores import Scores, keep, logprobs, score
from benchmarks.scores import kept as kept_scores
from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import Checkpoint
from vllm_offq.errors import UserError

WINDOWS = torch.arange(12).view(2, 6)


class Fixed:
    """A model that predicts the same whatever it reads."""

    def __init__(self, seed: int) -> None:
        self.logits = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(seed))

    def __call__(self, window: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def kept(model: Fixed, folder: Path) -> Path:
    for number, window in enumerate(WINDOWS):
        keep(logprobs(model, window), folder, number)
    return folder


def test_original_scores_as_itself(tmp_path: Path) -> None:
    model = Fixed(0)
    scores = score(model, WINDOWS, kept(model, tmp_path))
    losses = [float(cross_entropy(model.logits[0, :-1], window[1:])) for window in WINDOWS]
    assert scores.loss == pytest.approx(losses)
    assert scores.kl == pytest.approx([0, 0], abs=1e-6)
    assert scores.top1 == [1, 1]


def test_scores_against_the_original(tmp_path: Path) -> None:
    original, model = Fixed(0), Fixed(1)
    scores = score(model, WINDOWS, kept(original, tmp_path))
    p, q = original.logits[0].softmax(-1), model.logits[0].softmax(-1)
    assert scores.kl == pytest.approx([float((p * (p / q).log()).sum(-1).mean())] * 2, rel=1e-4)
    assert scores.top1 == [int((p.argmax(-1) == q.argmax(-1)).sum()) / 6] * 2


def test_scores_can_be_imported_by_the_peer() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('calibration', 'vllm_offq', 'rich')))"
    subprocess.run([sys.executable, "-c", f"{blocked}; import benchmarks.scores"], check=True)


def printed(rows: dict[str, accuracy.Row]) -> str:
    console = Console(width=160, file=StringIO())
    console.print(table(rows, ("W4A4KV4", "W4A4"), Scores([1.0, 1.2], [0, 0], [1, 1]), "title"))
    return console.file.getvalue()


def test_every_row_is_compared_with_quarot_in_its_mode() -> None:
    def row(kl: float) -> tuple[Scores, float]:
        return Scores([1.1, 1.4], [kl, kl], [0.9, 0.9]), 4.25

    name = next(iter(peer.TRANSFORMS))
    text = printed({"quarot": {"W4A4KV4": row(0.2)}, name: {"W4A4KV4": row(0.1), "W4A4": row(0.1)}})
    (both, alone) = [line for line in text.splitlines() if name in line]
    assert [cell.strip() for cell in both.split("│")][1:-1] == [
        name, "W4A4KV4", "4.25", "3.49", "1.1618 ± 0.0581", "0.1000 ± 0.0000",
        "0.500 ± 0.000", "0.900 ± 0.000"
    ]  # fmt: skip
    assert alone.split("│")[7].strip() == ""
    assert alone.split("│")[3].strip() == "4.25"


def test_the_original_is_its_eager_self(tmp_path: Path) -> None:
    """Gemma 2's soft cap is not in the attention that transformers takes by itself."""
    folder = make_tiny(tmp_path / "model", "Gemma2", attn_logit_softcapping=0.5)
    (tmp_path / "text.txt").write_text(CORPUS)
    arguments = SimpleNamespace(
        model=str(folder),
        text=tmp_path / "text.txt",
        calibration=[],
        samples=1,
        sequence_length=32,
        windows=1,
        window_length=32,
    )
    workload, _ = accuracy.prepare(arguments, tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = logprobs(eager.eval(), workload.windows[0])
    torch.testing.assert_close(kept_scores(tmp_path, 0, 32), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line on a tiny model, two recipes, and two windows of its own language."""
    folder = tmp_path_factory.mktemp("accuracy")
    text = folder / "text.txt"
    text.write_text(CORPUS * 8, encoding="utf-8")
    words = f"accuracy {make_tiny_llama(folder / 'model')} --calibration {text} --text {text} "
    words += f"--cache {folder / 'cache'} --samples 2 --sequence-length 64 "
    words += "--windows 2 --window-length 64 --recipes rtn quarot --modes W4A4KV4"
    return words.split()


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> list[str]:
    monkeypatch.setattr(sys, "argv", words)
    accuracy.main()
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    """What the table says of a recipe, after its name and mode."""
    (row,) = [line for line in lines if line.startswith(f"│ {name}")]
    return [cell.strip() for cell in row.split("│")[3:-1]]


def test_rows_are_measured_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(monkeypatch, capsys, command)
    assert cells(first, "quarot")[4] == "1.000 ± 0.000"
    assert float(cells(first, "rtn")[3].split()[0]) > 0
    monkeypatch.setattr(accuracy, "measure", lambda *_: pytest.fail("measured again"))
    again = run(monkeypatch, capsys, command)
    for name in ("original", "rtn", "quarot"):
        assert cells(again, name) == cells(first, name)
    assert "other versions" not in again[-1]
    monkeypatch.setattr(Cache, "code", "of tomorrow")
    assert run(monkeypatch, capsys, command)[-1].startswith("2 rows are from --cache, measured by")
    text = Path(command[3])
    text.write_text(text.read_text(encoding="utf-8") + CORPUS, encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run(monkeypatch, capsys, command)


def test_too_small_a_disk_is_noticed_early(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"only 0\.0 GB are free .*; give fewer --windows"):
        accuracy.main()


@pytest.mark.parametrize("option", ["{}", "{}:prose", "{}=2", "{}:prose=0.5"])
def test_rows_hold_for_the_content_of_a_text(option: str, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    workload = Workload("model", (), 2, 64, WINDOWS, tmp_path, "")
    cache = Cache(tmp_path / "cache", workload, Console())
    paths = []
    for content in ("one", "other"):
        text.write_text(content)
        paths.append(cache.path({"calibration": [option.format(text)]}, "W4"))
    assert paths[0] != paths[1]


def test_recipes_that_give_a_basis_are_for_models_that_have_one(tmp_path: Path) -> None:
    shown = Console(file=StringIO(), width=160)
    names = ["paper", "+ basis of sinks first", "+ heads principal"]
    for family, suitable, basis in (
        ("Llama", names, "top-1"),
        ("Gemma3", ["paper", "+ heads principal"], "auto"),
    ):
        folder = make_tiny(tmp_path / family, family)
        workload = Workload(str(folder), ("a.txt",), 2, 64, WINDOWS, tmp_path, "")
        assert accuracy.applicable(names, workload, shown) == suitable
        assert settings_of("paper", workload).basis == basis
    assert (
        "no row of + basis of sinks first: the residual stream of Gemma3" in shown.file.getvalue()
    )  # type: ignore[attr-defined]


def test_modes_turn_on_what_their_names_say(command: list[str], tmp_path: Path) -> None:
    out, settings = tmp_path / "out", Settings(calibration=(command[3],), samples=2)
    quantize(command[1], out, replace(settings, sequence_length=64))
    model, _ = load_simulated(out)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    state = model.get_submodule("model.layers.0.self_attn").offq
    config = Checkpoint(out).config
    found = {}
    for mode in MODES:
        set_mode(model, config, mode)
        grid = None if linear.grid is None else (linear.grid.bits, linear.grid.clip_ratio)
        found[mode] = grid, state.kv_group_size
    assert found == {
        "W4A4KV4": ((4, 0.95), 64),
        "W4A4": ((4, 0.95), None),
        "W4A8KV4": ((8, 1.0), 64),  # what `offq quantize --activation-bits 8` makes
        "W4": (None, None),
        "A4": ((4, 0.95), None),
        "KV4": (None, 64),
    }


def test_calibration_texts_stand_side_by_side(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = "same.txt", "other.txt"
    (tmp_path / texts[0]).write_text(CORPUS * 8, encoding="utf-8")
    (tmp_path / texts[1]).write_text("no word of the language " * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = run(monkeypatch, capsys, [*command, "--recipes", "quarot", "--sources", *texts])
    same, other = (float(cells(found, f"offq on {name}")[3].split()[0]) for name in texts)
    assert 0 < same < other


def test_peer_stands_in_the_table(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = os.environ.get("PEER_PYTHON")
    if python is None:
        pytest.skip("set PEER_PYTHON to a Python of `python scripts/setup_peer.py`")
    recipes = ["--recipes", "quarot", *peer.TRANSFORMS]
    found = run(monkeypatch, capsys, [*command, *recipes, "--peer-python", python])
    for name in peer.TRANSFORMS:
        bits, _, _, kl, share, top1 = cells(found, name)
        assert bits == "4.25"
        assert 0.01 < float(kl.split()[0]) < 1  # quantized, and still the same model
        assert float(share.split()[0]) == pytest.approx(
            float(kl.split()[0]) / kl_of_quarot(found), rel=0.01
        )
        assert float(top1.split()[0]) > 0.5


def test_peer_that_does_not_suit_the_model_has_no_row(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.14\n")  # all that is asked of it: its version
    python.chmod(0o755)
    gemma = make_tiny(tmp_path / "model", "Gemma3")
    words = [command[0], str(gemma), *command[2:], "--peer-python", str(python)]
    name = next(iter(peer.TRANSFORMS))
    found = run(monkeypatch, capsys, [*words, "--recipes", name])
    reason = "R1 cannot pass the norms of Gemma3ForCausalLM after attention and MLP"
    assert f"no row of {name}: {reason}" in found
    assert not any(line.startswith(f"│ {name}") for line in found)


def kl_of_quarot(lines: list[str]) -> float:
    return float(cells(lines, "quarot")[3].split()[0])


@pytest.mark.parametrize(
    ("python", "reason"),
    [("/nowhere/python", "cannot be run"), (sys.executable, "has no llmcompressor")],
)
def test_peer_that_is_not_there_is_refused_in_one_sentence(
    python: str, reason: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*command, "--peer-python", python])
    with pytest.raises(SystemExit, match=rf"^benchmarks\.accuracy: {python} {reason}.*setup_peer"):
        accuracy.main()


def test_peer_needs_its_python(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*command, "--recipes", *peer.TRANSFORMS])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "need --peer-python" in capsys.readouterr().err


def test_peer_that_fails_says_why(tmp_path: Path, command: list[str]) -> None:
    workload = Workload(command[1], (command[3],), 2, 64, WINDOWS, tmp_path, "")
    python, log = Path(sys.executable), tmp_path / "peer.log"
    with pytest.raises(UserError, match=r"No module named 'llmcompressor'.*peer\.log"):
        list(peer.measure(python, log, {"recipe": {}}, workload, ["W4A4"]))
