"""A run whose machine loses power: only what was fsynced is there when it goes on."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from test_kills import digests, run

from vllm_offq.errors import UserError


@dataclass
class Disk:
    """What a power cut leaves, by inode."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, list[os.DirEntry[str]]] = field(default_factory=dict)

    def fsync(self, descriptor: int) -> None:
        path, inode = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_ino
        if path.is_dir():
            self.folders = self.folders | {inode: list(os.scandir(path))}
        else:
            self.files = self.files | {inode: path.read_bytes()}

    def restore(self, inode: int, folder: Path) -> None:
        folder.mkdir()
        for entry in self.folders.get(inode, []):
            if entry.is_dir():
                self.restore(entry.inode(), folder / entry.name)
            else:
                (folder / entry.name).write_bytes(self.files.get(entry.inode(), b""))


def test_a_power_cut_leaves_a_whole_model_or_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, cuts = Disk(), list[Disk]()

    def fsync(descriptor: int) -> None:
        disk.fsync(descriptor)
        cuts.append(replace(disk))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "before").mkdir()
    run(tmp_path / "before" / "out")
    whole = digests(tmp_path / "before" / "out")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    went_on, done = 0, 0
    for number, cut in enumerate(cuts):
        folder = tmp_path / str(number)
        cut.restore((tmp_path / "before").stat().st_ino, folder)
        went_on += (folder / ".out.partial" / "resume" / "state.json").exists()
        try:
            run(folder / "out")
        except UserError as refusal:
            assert "exists" in str(refusal)
            done += 1
        assert digests(folder / "out") == whole
    assert went_on > 10 and done == 1
