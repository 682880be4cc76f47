"""Writes an OffQ checkpoint so that an interrupted run leaves nothing under the final name."""

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.format import CONFIG_FILE, INDEX_FILE


class CheckpointWriter:
    """Writes a checkpoint into a temporary folder beside `out`, renamed when all is on disk.

    A context manager. When the block ends with an exception (KeyboardInterrupt included) the
    temporary folder is removed and nothing stands, or changes, under the final name.

    out: the final folder. overwrite: replace a model that stands there, at the very end.
    max_shard_bytes: tensors are kept in memory until they fill a shard of this size.
    expected_bytes: the size to come, where known; checked against the free space at once.
    Raises: UserError if `out` exists, cannot be written, or the disk is too small or full.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        max_shard_bytes: int = 5 * 2**30,
        expected_bytes: int | None = None,
    ) -> None:
        self.out = Path(out).resolve()
        self.folder = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}.partial"
        """Other files of the checkpoint (the tokenizer's) may be saved here."""
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
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
        free = shutil.disk_usage(parent).free
        if expected_bytes is not None and free < expected_bytes:
            raise UserError(
                f"the checkpoint needs {expected_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB "
                f"are free at {parent}; free some space or choose another output folder"
            )

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor. A copy is taken, so the caller may reuse its memory."""
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def add_text(self, filename: str, text: str) -> None:
        """Write one text file."""
        (self.folder / filename).write_text(text, encoding="utf-8")

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        error = exception
        if error is None:
            try:
                self._finish()
                return
            except BaseException as failure:
                error = failure
        shutil.rmtree(self.folder, ignore_errors=True)
        if _is_disk_full(error):
            raise UserError(
                f"no space left on the disk of {self.out.parent}; free some space or choose "
                "another output folder"
            ) from error
        if error is not exception:
            raise error

    def _shard_path(self, number: int, count: int | None = None) -> Path:
        suffix = "partial" if count is None else f"{count:05d}.safetensors"
        return self.folder / f"model-{number:05d}-of-{suffix}"

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        # The number of shards, part of their names, is known only at the end.
        path = self._shard_path(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._pending = {}
        self._pending_bytes = 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            path = self._shard_path(number, len(self._shards))
            self._shard_path(number).rename(path)
            weight_map |= dict.fromkeys(names, path.name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        self.add_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")
        mode = (self.folder / INDEX_FILE).stat().st_mode
        for path in self.folder.glob("*.safetensors"):
            path.chmod(mode)  # safetensors leaves them readable by the owner alone
        for path in [*self.folder.rglob("*"), self.folder]:
            _fsync(path)
        self._publish()
        _fsync(self.out.parent)

    def _publish(self) -> None:
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        if not self._overwrite:
            raise UserError(f"{self.out} was made by someone else meanwhile; choose another folder")
        replaced = self.folder.with_suffix(".replaced")
        self.out.rename(replaced)
        try:
            self.folder.rename(self.out)
        except BaseException:
            replaced.rename(self.out)
            raise
        shutil.rmtree(replaced)


def _is_replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(path.iterdir())
    return isinstance(config, dict) and "model_type" in config


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and tokenizers wrap the operating system's error into their own.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        f"os error {errno.ENOSPC}" in str(error)
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
