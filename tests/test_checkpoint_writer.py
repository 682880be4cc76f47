"""What the writer leaves on disk: all of a checkpoint, or nothing."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sample_checkpoint import tensors, write

from vllm_offq.checkpoint import CheckpointWriter, validate_checkpoint
from vllm_offq.errors import UserError
from vllm_offq.format import INDEX_FILE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "model", max_shard_bytes=30_000)


def test_shards_are_named_as_the_ecosystem_expects(checkpoint: Path) -> None:
    names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(names) > 1
    assert names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    assert all((checkpoint / name).stat().st_size < 40_000 for name in names)
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    assert set(index["weight_map"].values()) == set(names)


def test_other_users_may_read_the_shards(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        out = write(tmp_path / "model")
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_the_writer_keeps_its_own_copy(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as writer:
        buffer = torch.ones(4)
        writer.add("a", buffer)
        writer.add("b", buffer.fill_(2)[1:])
    shard = load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert shard["a"].tolist() == [1, 1, 1, 1]
    assert shard["b"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), UserError("no")])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with (
        pytest.raises(type(failure)),
        CheckpointWriter(tmp_path / "model", max_shard_bytes=8) as writer,
    ):
        writer.add("a", torch.ones(4))
        writer.add("b", torch.ones(4))
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_overwrite(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"model exists.*--overwrite"):
        CheckpointWriter(checkpoint)


def test_overwrite_replaces_the_folder(checkpoint: Path) -> None:
    (checkpoint / "stale.txt").write_text("of the old model")
    write(checkpoint, overwrite=True)
    validate_checkpoint(checkpoint)
    assert not (checkpoint / "stale.txt").exists()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_failed_overwrite_keeps_the_old_folder(checkpoint: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        CheckpointWriter(checkpoint, overwrite=True) as writer,
    ):
        writer.add("a", torch.ones(4))
        raise RuntimeError
    validate_checkpoint(checkpoint)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_overwrite_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="neither a model folder nor empty"):
        CheckpointWriter(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="neither a model folder nor empty"):
        CheckpointWriter(tmp_path / "thesis.tex", overwrite=True)


def test_a_folder_made_meanwhile_is_spared(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="meanwhile"),
        CheckpointWriter(tmp_path / "model"),
    ):
        (tmp_path / "model").mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors' own
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, failure: Exception) -> None:
    with (
        pytest.raises(UserError, match=f"no space left on the disk of {tmp_path}"),
        CheckpointWriter(tmp_path / "model"),
    ):
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_noticed_early(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB on disk, but only"):
        CheckpointWriter(tmp_path / "model", expected_bytes=10**18)


def test_what_a_stopped_run_has_written_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "model") as writer:
        writer.keep = True
        writer.add("weight", torch.zeros(1000))
        writer.commit()
        raise KeyboardInterrupt
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    CheckpointWriter(tmp_path / "model", resume=True, expected_bytes=5000)
    with pytest.raises(UserError, match=r"only 0\.00 GB are free"):
        CheckpointWriter(tmp_path / "model", resume=True, expected_bytes=6000)


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/file"):
        CheckpointWriter(tmp_path / "file" / "model")
