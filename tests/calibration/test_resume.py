"""A run that is stopped loses little: it goes on by --resume, and ends with the same bytes."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from tiny_models import make_tiny_llama
from torch import Tensor

from calibration import cli, pipeline, resume
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.resume import SavedPass, SavedRun
from calibration.room import kept_bytes
from calibration.settings import Settings
from calibration.survey import PASSES
from vllm_offq.checkpoint import CheckpointWriter, validate_checkpoint
from vllm_offq.checkpoint_writer import RESUME
from vllm_offq.errors import UserError
from vllm_offq.output_folder import CONTENT, partial_folder

LAYERS = 5


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("original") / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text("".join(f"In {year} rock {year % 7} had a lamp.\n" for year in range(900)))
    return Settings(calibration=(str(text),), samples=4, sequence_length=64, clip_ratio="auto")


@pytest.fixture(scope="module")
def uninterrupted(
    original: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    quantize(str(original), out, settings)
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("report")  # which says how long it took
    }


def options(original: Path, out: Path, settings: Settings) -> list[str]:
    """Of `offq`, for a run with these settings but for the clip ratio."""
    found = ["quantize", str(original), str(out), "--calibration", *settings.calibration]
    return [*found, "--samples", "4", "--sequence-length", "64"]


def layers_done(out: Path) -> int:
    try:
        return int(json.loads((partial_folder(out) / RESUME / "state.json").read_text())["layers"])
    except FileNotFoundError:
        return -1


def stop_after(layers: int, monkeypatch: pytest.MonkeyPatch, how: BaseException) -> None:
    """Make the block of that number raise."""
    quantize_block = pipeline.quantize_block

    def fail(layer: object, index: int, *rest: object) -> None:
        if index == layers:
            raise how
        quantize_block(layer, index, *rest)

    monkeypatch.setattr(pipeline, "quantize_block", fail)


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("how", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interrupted_run_goes_on(
    layers: int,
    how: BaseException,
    original: Path,
    settings: Settings,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(layers, patch, how)
        with pytest.raises(UserError if isinstance(how, OSError) else KeyboardInterrupt):
            quantize(str(original), out, settings)
    assert not out.exists()
    with pytest.raises(UserError, match=r"unfinished run .*--resume.*--no-resume"):
        quantize(str(original), out, settings)
    assert layers_done(out) == layers
    done: list[int] = []
    with monkeypatch.context() as patch:
        quantize_block = pipeline.quantize_block
        patch.setattr(
            pipeline,
            "quantize_block",
            lambda layer, i, *rest: done.append(i) or quantize_block(layer, i, *rest),
        )
        quantize(str(original), out, settings, resume=True)
    assert done == list(range(layers, LAYERS))
    validate_checkpoint(out)
    assert digests(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_goes_on(
    original: Path, settings: Settings, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL, twice, at moments that no code prepares for."""
    out = tmp_path / "out"
    offq = str(Path(sys.executable).with_name("offq"))
    command = [offq, *options(original, out, settings), "--clip-ratio", "auto", "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums depend on it
    for layers in (1, LAYERS - 1):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while layers_done(out) < layers and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        run.kill()
        assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
        assert not out.exists()
    finished = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment)
    assert finished.returncode == 0
    assert digests(out) == uninterrupted


def test_the_quantized_stream_goes_on_too(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, gptq_inputs="corrected")
    quantize(str(original), tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        stop_after(2, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(str(original), tmp_path / "out", settings)
    quantize(str(original), tmp_path / "out", settings, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_other_settings_do_not_go_on(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(str(original), out, settings)
    other = Settings(calibration=settings.calibration, samples=5, sequence_length=64)
    with pytest.raises(UserError, match="samples was 4 and is 5"):
        quantize(str(original), out, other, resume=True)
    moved = Path(shutil.copytree(original, tmp_path / "moved"))
    with pytest.raises(UserError, match="model was 'model' and is 'moved'"):
        quantize(str(moved), out, settings, resume=True)
    assert layers_done(out) == 1
    quantize(str(original), out, other, resume=False)
    validate_checkpoint(out)


@pytest.fixture
def stopped(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A model to be changed, and the folder that a run of it was stopped on the way to."""
    model, out = Path(shutil.copytree(original, tmp_path / "model")), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), out, settings)
    return model, out


@pytest.mark.parametrize(
    ("file", "before", "after", "sentence"),
    [
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1', "config.rms_norm_eps was"),
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 500.0', "rope_theta was 10000.0"),
        ("tokenizer.json", '"#"', '"\u2603"', "tokenizer was"),
    ],
)
def test_a_changed_model_does_not_go_on(
    file: str,
    before: str,
    after: str,
    sentence: str,
    stopped: tuple[Path, Path],
    settings: Settings,
) -> None:
    model, out = stopped
    text = (model / file).read_text()
    assert before in text
    (model / file).write_text(text.replace(before, after))
    with pytest.raises(UserError, match=f"was another: [^;]*{sentence}[^;]*; repeat it"):
        quantize(str(model), out, settings, resume=True)
    assert layers_done(out) == 1


def test_changed_weights_do_not_go_on(
    stopped: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    model, out = stopped
    other = make_tiny_llama(tmp_path / "other", layers=LAYERS, seed=1)
    shutil.copyfile(other / "model.safetensors", model / "model.safetensors")
    with pytest.raises(UserError, match=r"was another: weights was [^;]*; repeat it"):
        quantize(str(model), out, settings, resume=True)
    assert layers_done(out) == 1


def test_a_run_stopped_at_its_beginning_leaves_nothing(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the calibration text is read there is nothing to go on with."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibration_tokens", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(original), tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_resume_says_when_it_begins_anew(
    original: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = options(original, tmp_path / "out", settings)
    monkeypatch.setattr(sys, "argv", ["offq", *command, "--recipe", "rtn", "--resume"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "There is no unfinished run to go on with; this one begins anew." in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("name", PASSES)
def test_a_survey_goes_on(
    name: str,
    original: Path,
    settings: Settings,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while activations are measured or tried, each block's end being kept."""
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)
    passed: list[tuple[str, int]] = []
    done = SavedPass.done

    def stop(self: SavedPass, blocks: int, found: Callable[[], dict[str, Tensor]]) -> None:
        done(self, blocks, found)
        passed.append((self._name, blocks))
        if passed[-1] == (name, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedPass, "done", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(str(original), out, settings)
    quantize(str(original), out, settings, resume=True)
    assert passed == [(each, blocks) for each in PASSES for blocks in range(1, LAYERS + 1)]
    assert digests(out) == uninterrupted


def test_a_survey_is_not_kept_at_every_block(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of a small model takes less time than keeping what it gave."""
    kept: list[str] = []
    save = SavedRun.save
    monkeypatch.setattr(
        SavedRun, "save", lambda run, name, found: kept.append(name) or save(run, name, found)
    )
    quantize(str(original), tmp_path / "out", settings)
    assert kept == ["tokens", "rotations", *(f"hidden-{n:05d}" for n in range(1, LAYERS + 1))]


def test_rotations_count_once_all_is_found(
    original: Path,
    settings: Settings,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed when they are on disk, and the clip ratios found with them are not."""
    save = SavedRun.save

    def stop(run: SavedRun, name: str, found: dict[str, Tensor]) -> None:
        save(run, name, found)
        if name == "rotations":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SavedRun, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(original), tmp_path / "out", settings)
    quantize(str(original), tmp_path / "out", settings, resume=True)
    assert digests(tmp_path / "out") == uninterrupted


def test_an_unreadable_state_is_refused(
    original: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    state = partial_folder(out) / RESUME / "state.json"
    (partial_folder(out) / CONTENT).mkdir(parents=True)
    state.parent.mkdir()
    state.write_text("{")
    with pytest.raises(UserError, match="--no-resume"):
        quantize(str(original), out, settings, resume=True)


def test_two_runs_do_not_write_the_same_folder(
    original: Path, settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="another run is writing"),
        CheckpointWriter(out),
    ):
        quantize(str(original), out, settings)


def test_a_terminated_command_says_how_to_go_on(
    original: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pipeline, "fuse_head", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["offq", *options(original, tmp_path / "out", settings)])
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "--resume goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gptq_inputs", ["original", "quantized"])
def test_the_room_for_what_a_run_keeps_is_known_before_it(
    gptq_inputs: Literal["original", "quantized"],
    original: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, settings, found = tmp_path / "out", replace(settings, gptq_inputs=gptq_inputs), []

    def drop(run: SavedRun, name: str) -> None:
        found.append(sum(path.stat().st_size for path in folder.glob("hidden-*")))
        return dropped(run, name)

    folder, dropped = partial_folder(out) / RESUME, SavedRun.drop
    monkeypatch.setattr(SavedRun, "drop", drop)
    quantize(str(original), out, settings)
    kept = kept_bytes(load_original(str(original)), settings)
    assert max(found) == pytest.approx(kept, rel=0.01)
    # At the end the one shard stands beside its parts, and beside what the last block gave.
    twice = 2 * sum(path.stat().st_size for path in out.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=twice))
    with pytest.raises(UserError, match="free some space"):
        quantize(str(original), tmp_path / "other", settings)
    enough = twice + kept // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=enough))
    quantize(str(original), tmp_path / "other", settings)
