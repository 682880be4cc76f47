"""Attention writes between its kernels to memory that vLLM counts, shares and locks."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.v1.worker.workspace import (
    init_workspace_manager,
    lock_workspace,
    reset_workspace_manager,
)

from vllm_offq import kv_cache, workspace
from vllm_offq.attention_metadata import Batch, OffQAttentionMetadata
from vllm_offq.kernels import reference
from vllm_offq.kv_cache import OffQAttentionImpl

HEADS, KV_HEADS, DIM, GROUP = 4, 2, 64, 64


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor | None]]:
    """The workspaces that a backend got that wants 100 numbers for each channel of a head."""
    found: list[Tensor | None] = []

    def paged_attention(*tensors: Any, workspace: Tensor | None, **options: Any) -> None:
        found.append(workspace)
        reference.paged_attention(*tensors, **options)

    def size(dtype: torch.dtype, head_size: int, group_size: int, device: torch.device) -> int:
        return 100 * head_size

    features = reference.FEATURES._replace(attention_workspace=size)
    backend = SimpleNamespace(FEATURES=features, paged_attention=paged_attention)
    for module in (kv_cache, workspace):
        monkeypatch.setattr(module, "backend", lambda: backend)
    # vLLM's manager calls it, and without an accelerator it fails.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    yield found
    reset_workspace_manager()


def attend(metadata: OffQAttentionMetadata | None, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    impl = OffQAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, GROUP)
    pages = torch.zeros(2, KV_HEADS, 16, reference.kv_page_bytes(DIM, GROUP), dtype=torch.uint8)
    query = torch.randn(5, HEADS, DIM, dtype=dtype)
    layer: Any = SimpleNamespace()
    return impl.forward(layer, query, query, query, pages, metadata, torch.empty_like(query))


METADATA = OffQAttentionMetadata(
    [
        Batch(
            num_tokens=5,
            max_query_len=5,
            block_table=torch.tensor([[0]], dtype=torch.int32),
            query_start_loc=torch.tensor([0, 5], dtype=torch.int32),
            seq_lens=torch.tensor([5], dtype=torch.int32),
        )
    ]
)


def test_layers_share_what_the_run_without_a_cache_reserved(taken: list[Tensor | None]) -> None:
    init_workspace_manager(torch.device("cpu"))
    attend(None)
    lock_workspace()  # what vLLM does before the first request; more than reserved would raise
    attend(METADATA)
    attend(METADATA, torch.bfloat16)
    first, second = taken
    assert first is not None and second is not None
    assert (first.shape, first.dtype) == ((100 * DIM,), torch.float32)
    assert first.data_ptr() == second.data_ptr()


def test_without_a_manager_kernels_allocate_themselves(taken: list[Tensor | None]) -> None:
    attend(METADATA)
    assert taken == [None]
