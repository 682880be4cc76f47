"""A folder that stands under its name only as a whole, at whatever moment its writer is killed."""

import fcntl
import json
import os
import shutil
from pathlib import Path

from vllm_offq.errors import UserError
from vllm_offq.format import CONFIG_FILE

CONTENT = "model"
REPLACED = "replaced"
DISCARDED = "discarded"


class OutputFolder:
    """What becomes the folder `out`, in a hidden one beside it until then.

    `work` is that hidden folder. `content` in it becomes `out`, and what is around it is for a
    resumed run. One rename takes `content` away, to publish or to discard it, and all that is left
    is of no use from then on. What a killed run has left is put in order first: a model that was
    about to be replaced returns to its name, and what is of no use is removed.

    overwrite: replace a model that stands at `out`.
    Raises: UserError if `out` exists, cannot be written or is being written by another run.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = Path(out).resolve()
        self.work = partial_folder(self.out)
        self.content = self.work / CONTENT
        self._overwrite = overwrite
        self._replaced = self.work / REPLACED
        """Where the model that stood at `out` is until this one does."""
        if self.work.is_dir():
            self._lock()
            try:
                self._restore()
                self._remove_leftovers()
            finally:
                os.close(self._locked)
        if self.out.exists():
            if not overwrite:
                raise UserError(f"{self.out} exists; choose another folder or pass --overwrite")
            if not _is_replaceable(self.out):
                raise UserError(
                    f"{self.out} is neither a model folder nor empty, so it will not be "
                    "overwritten; choose another folder"
                )
        parent = next(folder for folder in self.out.parents if folder.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise UserError(f"cannot write to {parent}; choose another output folder")
        self._parent = parent

    def refuse_small_disk(self, num_bytes: int) -> None:
        """Raises: UserError if there is no room for so many bytes."""
        free = shutil.disk_usage(self._parent).free
        if free < num_bytes:
            raise UserError(
                f"the run needs {num_bytes / 1e9:.2f} GB on disk, but only {free / 1e9:.2f} GB "
                f"are free at {self._parent}; free some space or choose another output folder"
            )

    def open(self, resume: bool) -> None:
        """Make `content`, empty, and keep other runs away until `close`.

        resume: leave what is around it as an earlier run left it.
        Raises: UserError if another run has opened it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not resume:
            self._discard()
            _clear(self.work)
        self.content.mkdir(exist_ok=True)
        _clear(self.content)
        fsync(self.work.parent)

    def publish(self) -> None:
        """Let `content` be `out`. Raises: UserError if that was made by someone else meanwhile."""
        if self.out.exists():
            if not self._overwrite:
                raise UserError(
                    f"{self.out} was made by someone else meanwhile; choose another folder"
                )
            self.out.rename(self._replaced)
        self.content.rename(self.out)
        fsync(self.out.parent)

    def close(self, keep: bool) -> None:
        """Let other runs in. keep: leave what a resumed run needs, unless it was published."""
        try:
            self._restore()
            if not keep:
                self._discard()
            self._remove_leftovers()
        finally:
            os.close(self._locked)

    def _lock(self) -> None:
        self._locked = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._locked)
            raise UserError(
                f"another run is writing {self.out}; wait for it or choose another folder"
            ) from None

    def _restore(self) -> None:
        if not (self.content.exists() and self._replaced.exists()):
            return
        if self.out.exists():
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.out)

    def _discard(self) -> None:
        if self.content.exists():
            self.content.rename(self.work / DISCARDED)

    def _remove_leftovers(self) -> None:
        if not self.content.exists():
            shutil.rmtree(self.work, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Where the folder `out` grows until it is complete."""
    out = Path(out).resolve()
    return out.parent / f".{out.name}.partial"


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(path.iterdir())
    return isinstance(config, dict) and "model_type" in config
