"""Writes an OffQ checkpoint so that an interrupted run leaves nothing under the final name."""

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.format import INDEX_FILE
from vllm_offq.output_folder import OutputFolder, fsync

MAX_SHARD_BYTES = 2**29
"""Tensors of one shard are in memory together while it is written."""
PART = "part-"
"""Prefix of files that become shards at the end, when their number is known."""
RESUME = "resume"
"""Folder beside them for what else a resumed run needs."""


class CheckpointWriter:
    """Writes a checkpoint into a hidden folder beside `out`, renamed when all is on disk.

    A context manager. When the block ends with an exception (KeyboardInterrupt included) nothing
    stands, or changes, under the final name; the hidden folder is removed, unless `keep` is set
    because a later run can go on with it. A kill leaves the same, at any moment: OutputFolder.

    out: the final folder. overwrite: replace a model that stands there, at the very end.
    resume: start with what an earlier run left in the hidden folder, see `adopt`.
    max_shard_bytes: tensors are kept in memory until they fill a shard of this size.
    expected_bytes: of all that will be on disk at once, where known; what of it is not there yet
    is checked against the free space at once.
    prefix: of the language model's tensors in the checkpoint; its callers name them without.
    Raises: UserError if `out` exists, cannot be written, is being written by another run, or the
    disk is too small or full.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        resume: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        expected_bytes: int | None = None,
        prefix: str = "",
    ) -> None:
        self._output = OutputFolder(out, overwrite)
        if expected_bytes is not None:
            # What an earlier run has left is gone on with, or removed.
            work = self._output.work
            kept = [*work.glob(f"{PART}*"), *work.glob(f"{RESUME}/*")]
            there = sum(path.stat().st_size for path in kept)
            self._output.refuse_small_disk(expected_bytes - there)
        self.out = self._output.out
        self.folder = self._output.content
        """Other files of the checkpoint (the tokenizer's) may be saved here."""
        self.work = self._output.work
        """For what a resumed run needs; it does not become part of the model."""
        self.keep = False
        """Leave it behind when the block ends with an exception."""
        self.parts: list[str] = []
        """Files that hold what has been committed, in order."""
        self.sizes: dict[str, int] = {}
        """Bytes of every tensor that was added."""
        self._resume = resume
        self._max_shard_bytes = max_shard_bytes
        self._prefix = prefix
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._replaced: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._output.open(self._resume)
        return self

    def adopt(self, parts: Sequence[str]) -> None:
        """Take over the parts of an earlier run; parts beyond these are removed."""
        for path in self.work.glob(f"{PART}*"):
            if path.name not in parts:
                path.unlink()
        for part in parts:  # mapped: nothing but the headers is read
            self.sizes |= {
                name: tensor.nbytes for name, tensor in load_file(self.work / part).items()
            }
        self.parts = list(parts)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor. A copy is taken, so the caller may reuse its memory."""
        self.add_rest(self._prefix + name, tensor)

    def add_rest(self, name: str, tensor: Tensor) -> None:
        """Likewise one that is not the language model's, by its whole name."""
        if name in self.sizes:
            raise ValueError(f"tensor {name} was added twice")
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self.commit()
        self.sizes[name] = tensor.nbytes
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes

    def commit(self) -> None:
        """Put all that was added on disk, in a part of its own."""
        if not self._pending:
            return
        path = self.work / f"{PART}{len(self.parts) + 1:05d}"
        save_file(self._pending, path, metadata={"format": "pt"})
        fsync(path)
        self.parts.append(path.name)
        self._pending = {}
        self._pending_bytes = 0

    def written(self) -> dict[str, Tensor]:
        """All tensors of the language model that were added, by name."""
        self.commit()
        found: dict[str, Tensor] = {}
        for part in self.parts:
            with safe_open(self.work / part, framework="pt") as file:
                found |= {
                    name.removeprefix(self._prefix): file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118 - not a dict
                    if name.startswith(self._prefix)
                }
        return found

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these into the checkpoint instead of what was added under their names.

        They are kept in memory to the end; parts on disk stay as they are for `adopt`.
        """
        for name, tensor in tensors.items():
            if tensor.nbytes != self.sizes[self._prefix + name]:
                raise ValueError(f"tensor {name} would change its size")
            self._replaced[self._prefix + name] = tensor

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
            except BaseException as failure:
                error = failure
        self._output.close(self.keep)
        if error is not None and _is_disk_full(error):
            raise UserError(
                f"no space left on the disk of {self.out.parent}; free some space or choose "
                "another output folder"
            ) from error
        if error is not None and error is not exception:
            raise error

    def _finish(self) -> None:
        self.commit()
        groups = self._shards()
        weight_map: dict[str, str] = {}
        for number, parts in enumerate(groups, 1):
            path = self.folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if len(parts) == 1 and not self._replaced:
                _link(parts[0], path)
            else:
                tensors: dict[str, Tensor] = {}
                for part in parts:
                    tensors |= load_file(part)
                tensors |= {name: t for name, t in self._replaced.items() if name in tensors}
                save_file(tensors, path, metadata={"format": "pt"})
            with safe_open(path, framework="pt") as shard:
                weight_map |= dict.fromkeys(shard.keys(), path.name)
        index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": weight_map}
        self.add_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")
        mode = (self.folder / INDEX_FILE).stat().st_mode
        for path in self.folder.glob("*.safetensors"):
            path.chmod(mode)  # safetensors leaves them readable by the owner alone
        for path in [*self.folder.rglob("*"), self.folder]:
            fsync(path)
        self._output.publish()

    def _shards(self) -> list[list[Path]]:
        """The parts that go into each shard: as many as fit, at least one."""
        shards: list[list[Path]] = []
        size = 0
        for path in (self.work / name for name in self.parts):
            size += path.stat().st_size
            if not shards or size > self._max_shard_bytes:
                shards.append([])
                size = path.stat().st_size
            shards[-1].append(path)
        return shards


def _link(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and tokenizers wrap the operating system's error into their own.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        f"os error {errno.ENOSPC}" in str(error)
    )
