"""Shared by all tests. Being here, it also puts this folder on the import path for pytest."""

import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # libraries read it when they are imported

import pytest
import torch

# Tensors here are tiny: threads would only wait for each other, on a busy machine for minutes.
torch.set_num_threads(1)


SERVING = "tests/serving/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    items.sort(key=lambda item: not item.nodeid.startswith(SERVING))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With two processes (`make test`) one starts servers, the other does all else.

    Two servers at once would take each other's core; a file's tests share what they prepare.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SERVING if nodeid.startswith(SERVING) else nodeid.partition("::")[0]

    return Scheduling(config, log)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference's kernels are those of this test."""
    from vllm_offq import kernels

    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    kernels.backend.cache_clear()
    yield
    kernels.backend.cache_clear()
