"""What of vLLM's batch the kernels get: decodes apart from prefills, images in both directions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionCGSupport

from vllm_offq import attention_metadata, kernels, kv_cache
from vllm_offq.attention_metadata import (
    OffQAttentionMetadata,
    OffQAttentionMetadataBuilder,
    find_image_tokens,
)
from vllm_offq.kernels import reference
from vllm_offq.kv_cache import OffQAttentionImpl

LENGTHS, NEW = [70, 40, 33], [50, 40, 1]
"""Of three requests: the first has a context already, the last is being answered."""
IMAGES = {0: [(2, 9), (30, 45), (60, 69)], 1: [(3, 12)], 2: [(1, 8)]}
"""First and last position. The first image is computed already."""
BLOCK, HEADS, KV_HEADS, DIM, GROUP = 32, 4, 2, 64, 64


def step(
    images: dict[int, list[tuple[int, int]]] | None = None,
    lengths: list[int] = LENGTHS,
    new: list[int] = NEW,
) -> Any:
    starts = torch.tensor([0, *new]).cumsum(0).int()
    blocks = [-(-length // BLOCK) for length in lengths]
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, ids in zip(table, torch.arange(sum(blocks)).flip(0).split(blocks), strict=True):
        row[: len(ids)] = ids
    seq_lens = torch.tensor(lengths).int()
    return SimpleNamespace(
        causal=True,
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        block_table_tensor=table,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        mm_req_doc_ranges=images,
    )


def builder(monkeypatch: pytest.MonkeyPatch, drafts: int | None = None, **features: bool) -> Any:
    """drafts: tokens that a speculating model is ahead."""
    stand_in = SimpleNamespace(FEATURES=reference.FEATURES._replace(**features))
    monkeypatch.setattr(attention_metadata, "backend", lambda: stand_in)
    speculative = drafts and SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    config: Any = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    spec: Any = None
    return OffQAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))


def attend(metadata: OffQAttentionMetadata, common: Any, window: int | None) -> tuple[Any, ...]:
    """Random queries, keys and values of whole requests; what the layer makes of them."""
    torch.manual_seed(0)
    lengths = common.seq_lens.tolist()
    impl = OffQAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, window, GROUP)
    keys, values = ([torch.randn(n, KV_HEADS, DIM) for n in lengths] for _ in range(2))
    query = torch.randn(common.num_actual_tokens, HEADS, DIM)
    pages = (int(common.block_table_tensor.max()) + 1, KV_HEADS, BLOCK)
    cache = torch.zeros(*pages, reference.kv_page_bytes(DIM, GROUP), dtype=torch.uint8)
    slots = [
        table[torch.arange(length) // BLOCK].long() * BLOCK + torch.arange(length) % BLOCK
        for table, length in zip(common.block_table_tensor, lengths, strict=True)
    ]
    layer: Any = SimpleNamespace()
    impl.do_kv_cache_update(layer, torch.cat(keys), torch.cat(values), cache, torch.cat(slots))
    output = torch.empty_like(query)
    impl.forward(layer, query, query, query, cache, metadata, output)
    return query, keys, values, output


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
    common = step(IMAGES)
    metadata = builder(monkeypatch).build(0, common)
    query, keys, values, output = attend(metadata, common, window)
    torch.testing.assert_close(output, expected(query, keys, values, window), atol=2e-2, rtol=1e-2)


def test_layers_share_what_is_found_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for in Python, token by token: once a step, not once a layer."""
    images = builder(monkeypatch).build(0, step(IMAGES)).image_tokens
    assert images.batches(20) is images.batches(20)
    assert len(images.batches(None)) == 1 < len(images.batches(20))


def new_tokens(metadata: OffQAttentionMetadata) -> list[tuple[list[int], int]]:
    """Of each request of each part, and how many the kernels are told there may be."""
    return [(part.query_start_loc.diff().tolist(), part.max_query_len) for part in metadata.parts]


def test_decodes_have_a_batch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a prefill no context is shared among programs: a long one would be read by one."""
    monkeypatch.setattr(kv_cache, "backend", lambda: reference)
    lengths, new = [90, 1, 70, 40], [1, 1, 50, 40]
    common = step(lengths=lengths, new=new)
    found = builder(monkeypatch, decodes_apart=True)
    whole, apart = builder(monkeypatch).build(0, common), found.build(0, common)
    assert new_tokens(whole) == [(new, 50)]
    assert new_tokens(apart) == [([1, 1], 1), ([50, 40], 50)]
    expected, got = (attend(metadata, common, None)[-1] for metadata in (whole, apart))
    assert torch.equal(got, expected)
    # A graph is recorded with as many decodes as it may ever hold.
    assert new_tokens(found.build_for_cudagraph_capture(common)) == [(new, 50)]
    # Of a batch that was padded, tokens and requests that there are not, the rows that there are.
    common.query_start_loc = common.query_start_loc_cpu = torch.tensor([0, 1, 2, 52, 52]).int()
    common.num_actual_tokens = 60
    padded = attend(found.build(0, common), common, None)[-1]
    assert torch.equal(
        padded[:52], attend(builder(monkeypatch).build(0, common), common, None)[-1][:52]
    )
    assert found.reorder_batch_threshold == 1
    assert builder(monkeypatch).reorder_batch_threshold is None
    for alike in ([1, 1], [50, 40]):
        common = step(lengths=[60] * 2, new=alike)
        assert new_tokens(found.build(0, common)) == [(alike, max(alike))]


def test_tokens_that_a_draft_proposed_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builder(monkeypatch, drafts=3, decodes_apart=True)
    metadata = found.build(0, step(lengths=[60] * 3, new=[4, 2, 30]))
    assert new_tokens(metadata) == [([4, 2], 4), ([30], 30)]
    metadata = found.build(0, step(lengths=[60] * 3, new=[1, 1, 30]))
    assert new_tokens(metadata) == [([1, 1], 1), ([30], 30)]


def test_a_step_without_images_costs_nothing() -> None:
    assert find_image_tokens(step()) is None
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
