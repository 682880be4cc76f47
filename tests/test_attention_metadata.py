"""Tokens of an image see each other in both directions, all others what is before them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionCGSupport

from vllm_offq import attention_metadata, kernels, kv_cache
from vllm_offq.attention_metadata import OffQAttentionMetadataBuilder, find_image_tokens
from vllm_offq.kernels import reference
from vllm_offq.kv_cache import OffQAttentionImpl

LENGTHS, NEW = [70, 40, 33], [50, 40, 1]
"""Of three requests: the first has a context already, the last is being answered."""
IMAGES = {0: [(2, 9), (30, 45), (60, 69)], 1: [(3, 12)], 2: [(1, 8)]}
"""First and last position. The first image is computed already."""
BLOCK, HEADS, KV_HEADS, DIM, GROUP = 32, 4, 2, 64, 64


def step(images: dict[int, list[tuple[int, int]]] | None) -> Any:
    starts = torch.tensor([0, *NEW]).cumsum(0).int()
    blocks = [-(-length // BLOCK) for length in LENGTHS]
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, ids in zip(table, torch.arange(sum(blocks)).flip(0).split(blocks), strict=True):
        row[: len(ids)] = ids
    lengths = torch.tensor(LENGTHS).int()
    return SimpleNamespace(
        causal=True,
        num_actual_tokens=sum(NEW),
        max_query_len=max(NEW),
        block_table_tensor=table,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        mm_req_doc_ranges=images,
    )


def expected(query: Tensor, keys: list[Tensor], values: list[Tensor], window: int | None) -> Tensor:
    """By a mask over keys and values that went through the 4-bit grid."""
    outputs = []
    for request, (new, length) in enumerate(zip(NEW, LENGTHS, strict=True)):
        cache = torch.zeros(1, KV_HEADS, length, reference.kv_page_bytes(DIM, GROUP)).byte()
        slots = torch.arange(length)
        reference.kv_store(keys[request], values[request], cache, slots, GROUP, None)
        key, value = reference.kv_load(cache, torch.zeros(1).long(), length, GROUP)
        position, context = torch.arange(length - new, length)[:, None], slots[None]
        visible = context <= position
        for first, last in IMAGES[request]:
            inside = (first <= position) & (position <= last)
            visible |= inside & (first <= context) & (context <= last)
        if window is not None:
            visible &= context > position - window
        part = query.split(NEW)[request].transpose(0, 1)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                part, key, value, attn_mask=visible, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 16, 20, 64])
def test_attention_follows_vllms_ranges(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows are no shorter than an image, as vLLM leaves others out."""
    monkeypatch.setattr(kv_cache, "backend", lambda: reference)
    torch.manual_seed(0)
    common = step(IMAGES)
    metadata = OffQAttentionMetadataBuilder.build(object(), 0, common)  # type: ignore[arg-type]
    impl = OffQAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, window, GROUP)
    keys, values = ([torch.randn(n, KV_HEADS, DIM) for n in LENGTHS] for _ in range(2))
    query = torch.randn(sum(NEW), HEADS, DIM)
    pages = (int(common.block_table_tensor.max()) + 1, KV_HEADS, BLOCK)
    cache = torch.zeros(*pages, reference.kv_page_bytes(DIM, GROUP), dtype=torch.uint8)
    slots = [
        table[torch.arange(length) // BLOCK].long() * BLOCK + torch.arange(length) % BLOCK
        for table, length in zip(common.block_table_tensor, LENGTHS, strict=True)
    ]
    layer: Any = SimpleNamespace()
    impl.do_kv_cache_update(layer, torch.cat(keys), torch.cat(values), cache, torch.cat(slots))
    output = torch.empty_like(query)
    impl.forward(layer, query, query, query, cache, metadata, output)
    torch.testing.assert_close(output, expected(query, keys, values, window), atol=2e-2, rtol=1e-2)


def test_a_step_without_images_costs_nothing() -> None:
    assert find_image_tokens(step(None)) is None
    assert find_image_tokens(step({0: [], 1: []})) is None
    assert find_image_tokens(step({0: [(2, 9)], 2: [(1, 8)]})) is None


def test_graphs_hold_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens change what has to be computed, and a graph always computes the same."""
    features = kernels.backend().FEATURES._replace(cuda_graphs=True)
    backend = SimpleNamespace(FEATURES=features)
    monkeypatch.setattr(attention_metadata, "backend", lambda: backend)
    supported = [
        OffQAttentionMetadataBuilder.get_cudagraph_support(
            SimpleNamespace(model_config=SimpleNamespace(is_mm_prefix_lm=has_images)),  # type: ignore[arg-type]
            None,
        )
        for has_images in (False, True)
    ]
    assert supported == [
        AttentionCGSupport.ALWAYS,
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE,
    ]
