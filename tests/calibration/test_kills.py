"""A run that is killed before any of its changes on disk: what stands there, and how it goes on."""

import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.resume import SavedRun, unfinished
from vllm_offq.checkpoint import CheckpointWriter
from vllm_offq.errors import UserError

LAYERS = 2
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written, whether it has reached the disk or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def run(
    out: Path,
    overwrite: bool = False,
    resume: bool | None = None,
    seed: int = 0,
    layers: int = LAYERS,
) -> None:
    """What `quantize` does on disk, interrupted after that many layers."""
    continues = unfinished(out) if resume is None else resume
    with CheckpointWriter(out, overwrite, continues, max_shard_bytes=400) as writer:
        saved = SavedRun(writer, {"seed": seed}, continues)
        if not saved.state.surveyed:
            saved.commit()
            saved.save("rotations", {"seed": torch.tensor(seed)})
            saved.state.surveyed = True
            saved.commit()
        for index in range(saved.state.layers, LAYERS):
            before = saved.load(f"hidden-{index}") or saved.load("rotations") or {}
            hidden = before["seed"] + index
            writer.add(f"layers.{index}", hidden.repeat(20))
            saved.save(f"hidden-{index + 1}", {"seed": hidden})
            saved.state.layers = index + 1
            saved.commit()
            saved.drop(f"hidden-{index}")
            if index + 1 == layers < LAYERS:
                raise KeyboardInterrupt
        writer.add("norm", torch.ones(4))
        writer.add_text("config.json", json.dumps({"model_type": "llama"}))


def nothing(out: Path) -> None:
    out.parent.mkdir()


def a_model(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text('{"model_type": "old"}')
    (out / "model.safetensors").write_bytes(b"old")


def this_run(out: Path, seed: int = 0) -> None:
    """Unfinished."""
    out.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(out, seed=seed, layers=1)
    assert unfinished(out)


def another_run(out: Path) -> None:
    """To be discarded."""
    this_run(out, seed=1)


def is_killed(step: int, work: Callable[[], None]) -> bool:
    """Do it in a process that is killed before that one of its changes. Returns: whether it was."""
    child = os.fork()
    if not child:
        try:
            changes = itertools.count()

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if (writes or event in CHANGES) and next(changes) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("before", [nothing, a_model, this_run, another_run])
def test_a_kill_leaves_a_whole_model_or_a_run_that_goes_on(
    before: Callable[[Path], None], tmp_path: Path
) -> None:
    run(tmp_path / "whole")
    whole, overwrite = digests(tmp_path / "whole"), before is a_model
    for step in itertools.count():
        out = tmp_path / str(step) / "out"
        before(out)
        stood = digests(out)
        if not is_killed(step, partial(run, out, overwrite, before is this_run)):
            break
        stands = digests(out)
        assert stands in (whole, stood, {})
        if overwrite and not stands:  # killed between two renames
            with pytest.raises(UserError, match="exists"):
                CheckpointWriter(out)
            assert digests(out) == stood
        try:
            run(out, overwrite)
        except UserError as refusal:
            if "exists" in str(refusal):
                assert stands == whole and not overwrite
            else:
                assert before is another_run and "seed was 1 and is 0" in str(refusal)
                run(out, resume=False)
        assert digests(out) == whole
        assert list(out.parent.iterdir()) == [out]
    assert step > 20, "no kill was simulated"
