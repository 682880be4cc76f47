"""What an interrupted run leaves on disk, so that a later one goes on where it stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.record import Record
from vllm_offq.checkpoint_writer import RESUME, CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.output_folder import CONTENT, fsync, partial_folder

STATE = "state.json"
BLOCKS = "blocks"
"""Tensor that counts those that are done."""
KEEP_EVERY = 60.0
"""Seconds of a pass over the blocks."""


@dataclass
class State:
    """How far a run has come."""

    fingerprint: dict[str, Any]
    """All that decides the result: a run with another one must not go on with this."""
    surveyed: bool = False
    """Whether the rotations are there, and in the record what was found with them."""
    layers: int = 0
    """Decoder blocks that are quantized and on disk."""
    parts: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    """What the report is made from."""


def unfinished(out: Path) -> bool:
    """Whether an earlier run to this folder can be resumed: neither published nor discarded."""
    folder = partial_folder(out)
    return (folder / CONTENT).is_dir() and (folder / RESUME / STATE).is_file()


class SavedRun:
    """State and tensors of a run, in the writer's folder; each change is whole or not there.

    resume: go on with what is there.
    Raises: UserError naming the settings that differ from the earlier run's.
    """

    record: Record
    """Kept with the state."""

    def __init__(self, writer: CheckpointWriter, fingerprint: dict[str, Any], resume: bool) -> None:
        self._writer = writer
        self._folder = writer.work / RESUME
        self._folder.mkdir(exist_ok=True)
        self.state = State(fingerprint)
        writer.keep = resume  # also where it is refused below
        if resume:
            self.state = _read(self._folder / STATE)
            _compare(self.state.fingerprint, fingerprint, writer.out)
            writer.adopt(self.state.parts)
        self.record = Record(**self.state.record)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were saved under a name, if any."""
        path = self._path(name)
        return load_file(path) if path.is_file() else None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name until the run ends or they are dropped."""
        path = self._path(name)
        unfinished_path = path.with_suffix(".unfinished")
        save_file(
            {key: value.cpu().contiguous() for key, value in tensors.items()}, unfinished_path
        )
        fsync(unfinished_path)
        unfinished_path.replace(path)

    def drop(self, name: str) -> None:
        """Forget what was saved under a name."""
        self._path(name).unlink(missing_ok=True)

    def commit(self) -> None:
        """Everything so far counts: from now on an interruption loses only what comes after."""
        self._writer.commit()
        fsync(self._writer.work)
        fsync(self._folder)  # before there is a state that counts on what is in it
        self.state.parts, self.state.record = self._writer.parts, asdict(self.record)
        path = self._folder / STATE
        unfinished_path = path.with_suffix(".unfinished")
        unfinished_path.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        fsync(unfinished_path)
        unfinished_path.replace(path)
        fsync(self._folder)
        self._writer.keep = True

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class SavedPass:
    """What a pass over the blocks has found so far, kept about once a minute.

    saved: None keeps nothing.
    """

    def __init__(self, saved: SavedRun | None, name: str) -> None:
        self._saved, self._name = saved, name
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many blocks are done, and what was found by then."""
        kept = self._saved.load(self._name) if self._saved else None
        return (int(kept.pop(BLOCKS)), kept) if kept else (0, {})

    def done(self, blocks: int, found: Callable[[], dict[str, Tensor]]) -> None:
        """So many are done now. found: called where it is to be kept."""
        if self._saved and time.monotonic() - self._last >= KEEP_EVERY:
            self._saved.save(self._name, found() | {BLOCKS: torch.tensor(blocks)})
            self._saved.commit()  # the record tells how long it took
            self._last = time.monotonic()


NOT_SAVED = SavedPass(None, "")


def _read(path: Path) -> State:
    try:
        return State(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the unfinished run in {path.parent.parent} cannot be read ({error}); start anew with "
            "--no-resume"
        ) from None


def _compare(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    now = json.loads(json.dumps(now))
    different = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"the unfinished run to {out} was another: {'; '.join(different)}; repeat it with the "
            "model and settings that it had, or start anew with --no-resume"
        )
