"""Which kernels a process gets, and what it is told when there are faster ones."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_offq import kernels
from vllm_offq.errors import UserError
from vllm_offq.kernels import reference
from vllm_offq.kernels.cpu import library


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.backend.cache_clear()
    monkeypatch.setenv(kernels.OVERRIDE, "abacus")
    with pytest.raises(UserError, match=r"abacus is not available here.*reference"):
        kernels.backend()
    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    assert kernels.backend() is reference


def test_slower_kernels_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an install without a compiler, and with a library of another machine."""
    monkeypatch.delenv(kernels.OVERRIDE, raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "library.so")
    # Of its own, whatever another test has made of the loggers above it.
    log = logging.Logger("test", logging.INFO)
    log.addHandler(caplog.handler)
    monkeypatch.setattr(kernels, "logger", log)
    cached = library.load, library.is_outdated, library.usable_isas
    for function in cached:
        function.cache_clear()
    for obstacle in ("not built .* install GCC 11", "cannot be loaded"):
        kernels.backend.cache_clear()
        assert kernels.backend().__name__ != "vllm_offq.kernels.cpu"
        assert re.search(f"slower.*: the cpu kernels .*{obstacle}", caplog.text)
        assert len(caplog.records) == 1
        caplog.clear()
        library.LIBRARY.write_bytes(b"no library")
    for function in (kernels.backend, *cached):
        function.cache_clear()


@pytest.mark.parametrize(
    ("found", "obstacle"),
    [
        ({}, None),
        ({"capability": (7, 5)}, "need compute capability 8.0, and this GPU has 7.5"),
        (
            {"hip": "7.0", "capability": (11, 0)},
            "gfx942 or gfx950, and this one has compute capability 11.0",
        ),
        ({"hip": "7.0", "capability": (9, 4)}, None),
    ],
)
def test_a_gpu_gets_triton_kernels_or_hears_why_not(
    found: dict[str, Any], obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv(kernels.OVERRIDE, raising=False)
    capability = found.get("capability", (8, 0))
    for owner, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda: capability),
        (torch.version, "hip", found.get("hip")),
    ):
        monkeypatch.setattr(owner, name, value)
    warnings: list[str] = []
    log = logging.Logger("test", logging.WARNING)
    log.addFilter(lambda record: bool(warnings.append(record.getMessage())))
    monkeypatch.setattr(kernels, "logger", log)
    kernels.backend.cache_clear()
    try:
        name = kernels.backend().__name__.rpartition(".")[2]
    finally:
        kernels.backend.cache_clear()
    if obstacle is None:
        assert (name, warnings) == ("triton", [])
    else:
        assert name == "reference"
        assert len(warnings) == 1
        assert obstacle in warnings[0]
