"""The reference kernels against arithmetic that shares no code with them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, attend, empty_cache, slots_of
from torch import Tensor

from vllm_offq.format import pack_int4
from vllm_offq.kernels import reference
from vllm_offq.rotation import hadamard


def integer_gemm(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
) -> Tensor:
    """The formula of docs/format.md, sum by sum, in int64 and float64."""
    num_groups = scale.shape[1]
    x, w = (part.long().unflatten(-1, (num_groups, -1)) for part in (codes, weight_codes))
    products = torch.einsum("tgk,ngk->tgn", x, w).double()
    sums = w.sum(-1).double()
    w_scale = weight_scale.double().expand(-1, num_groups)
    return torch.einsum("tg,ng,tgn->tn", scale.double(), w_scale, products) + torch.einsum(
        "tg,ng,ng->tn", offset.double(), w_scale, sums
    )


@given(
    tokens=st.integers(0, 5),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([2, 16, 64, 96, 128]),
    outputs=st.integers(1, 9),
    scales_per_group=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_gemm_is_the_formula(
    tokens: int, num_groups: int, group_size: int, outputs: int, scales_per_group: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    channels = num_groups * group_size
    weight_codes = torch.randint(-8, 8, (outputs, channels), dtype=torch.int8)
    weight_scale = torch.rand(outputs, num_groups if scales_per_group else 1).half()
    codes = torch.randint(-8, 8, (tokens, channels), dtype=torch.int8)
    scale, offset = torch.rand(tokens, num_groups), torch.randn(tokens, num_groups)
    weight = reference.prepare_weight(pack_int4(weight_codes), weight_scale, group_size)
    assert torch.equal(weight.codes, weight_codes)
    y = reference.gemm(codes, scale, offset, weight)
    assert y.dtype == torch.float32
    expected = integer_gemm(codes, scale, offset, weight_codes, weight_scale)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("leading", [(0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_linear_approximates_the_matrix_product(
    leading: tuple[int, ...], dtype: torch.dtype, symmetric: bool
) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (48, 256), dtype=torch.int8)
    weight_scale = torch.rand(48, 1).half()
    weight = reference.prepare_weight(pack_int4(codes), weight_scale, 64)
    bias = torch.randn(48).to(dtype)
    x = torch.randn(*leading, 256).to(dtype)
    y = reference.linear(x, weight, bias, 48, 64, 64, 1.0, symmetric)
    assert y.dtype == dtype
    assert y.shape == (*leading, 48)
    rotated = x.float() @ torch.block_diag(*[hadamard(64).float()] * 4)
    expected = rotated @ (codes.float() * weight_scale.float()).T + bias.float()
    if y.numel():
        noise = (y.float() - expected).pow(2).mean() / expected.pow(2).mean()
        assert noise < 0.03  # 16 levels over the range of 64 normal values


def test_the_bias_is_added_once() -> None:
    weight = reference.prepare_weight(
        pack_int4(torch.randint(-8, 8, (8, 32), dtype=torch.int8)), torch.full((8, 1), 0.5), 32
    )
    x, bias = torch.randn(3, 32), torch.randn(8)
    with_bias, without = (
        reference.linear(x, weight, b, 8, 32, 0, 1.0, False) for b in (bias, None)
    )
    torch.testing.assert_close(with_bias - without, bias.expand(3, 8), atol=1e-4, rtol=0)


def test_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    weight = reference.prepare_weight(
        pack_int4(torch.randint(-8, 8, (32, 128), dtype=torch.int8)), torch.ones(32, 1), 64
    )
    x = torch.randn(4, 128)

    def run(x: Tensor) -> Tensor:
        return reference.linear(x, weight, None, 32, 64, 64, 0.95, False)

    clean = run(x)
    torch.testing.assert_close(run(x[2:3])[0], clean[2])
    x[1, 3] = float("nan")
    spoilt = run(x)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2, 3]], clean[[0, 2, 3]])


def test_no_rotation_when_there_is_none() -> None:
    x = torch.arange(32.0).view(1, 32)
    codes, scale, offset = reference.rotate_quantize(x, 16, 0, 1.0, False)
    assert codes.tolist() == [[*range(-8, 8)] * 2]
    assert scale.tolist() == [[1.0, 1.0]]
    assert offset.tolist() == [[8.0, 24.0]]


def test_rotating_queries_and_keys_keeps_their_products() -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(2, 16, 16))[0]
    query, key = torch.randn(5, 6, 16), torch.randn(5, 2, 16)
    rotated_query = reference.rotate_heads(query, rotation)
    rotated_key = reference.rotate_heads(key, rotation)
    for head in range(6):
        torch.testing.assert_close(
            rotated_query[:, head] @ rotated_key[:, head // 3].T,
            query[:, head] @ key[:, head // 3].T,
            atol=1e-4,
            rtol=1e-4,
        )


@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 3),
    head=st.sampled_from([(64, 64), (128, 128), (256, 128), (96, 96), (16, 8)]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_the_cache_returns_what_was_stored(
    tokens: int, heads: int, head: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    head_size, group_size = head
    block_size, blocks = 4, torch.tensor([5, 1, 3])
    cache = empty_cache(7, heads, block_size, head_size, group_size)
    key, value = (3 + torch.randn(2, tokens, heads, head_size)).unbind(0)
    reference.kv_store(key, value, cache, slots_of(blocks, tokens, block_size), group_size)
    for stored, loaded in zip(
        (key, value), reference.kv_load(cache, blocks, tokens, group_size), strict=True
    ):
        assert loaded.shape == (heads, tokens, head_size)
        groups = stored.transpose(0, 1).unflatten(-1, (-1, group_size))
        low, high = groups.aminmax(dim=-1, keepdim=True) if tokens else (groups, groups)
        # Half a step; scale and offset are float16, which moves the 16 levels a little.
        bound = (high - low) / 15 * 0.5 + 2.0**-11 * (8 * (high - low) / 15 + high.abs()) + 1e-5
        error = (loaded.unflatten(-1, (-1, group_size)) - groups).abs()
        assert (error <= bound).all()


def test_codes_are_the_nearest_of_the_rounded_grid() -> None:
    """Rounding a large offset to float16 shifts the whole grid; the codes must make up for it."""
    torch.manual_seed(0)
    key = 300 + torch.randn(4, 1, 64)
    cache = empty_cache(1, 1, 4, 64, 64)
    reference.kv_store(key, key, cache, torch.arange(4), 64)
    loaded, _ = reference.kv_load(cache, torch.tensor([0]), 4, 64)
    low, high = key.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    offset = ((high + low) / 2 + scale / 2).half().float()
    levels = scale.half().float() * torch.arange(-8, 8) + offset
    nearest = (levels.unsqueeze(-2) - key.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((loaded[0] - key[:, 0]).abs(), nearest[:, 0], atol=1e-4, rtol=0)


def test_padding_and_other_slots_are_untouched() -> None:
    cache = empty_cache(3, 2, 4, 64, 64)
    before = cache.clone()
    key = torch.randn(3, 2, 64)
    reference.kv_store(key, key, cache, torch.tensor([-1, 6, -1]), 64)
    changed = (cache != before).any(-1).any(1).flatten().nonzero().flatten()
    assert changed.tolist() == [6]
    reference.kv_store(key[:0], key[:0], cache, torch.tensor([], dtype=torch.int64), 64)
    reference.kv_store(key[:1], key[:1], cache, torch.tensor([6]), 64)
    alone = empty_cache(3, 2, 4, 64, 64)
    reference.kv_store(key[:1], key[:1], alone, torch.tensor([6]), 64)
    assert torch.equal(cache, alone)


@pytest.mark.parametrize(("head_size", "content_bytes"), [(64, 72), (128, 136), (96, 104)])
def test_a_token_takes_half_a_byte_a_channel_and_eight(head_size: int, content_bytes: int) -> None:
    assert reference.kv_page_bytes(head_size, head_size) == content_bytes


@pytest.mark.parametrize("sliding_window", [None, 1, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_paged_attention_is_attention_over_the_dequantized_cache(
    heads: int, kv_heads: int, sliding_window: int | None
) -> None:
    """Ragged: a decode, a first chunk, a later chunk, a request with nothing to do."""
    torch.manual_seed(0)
    head_size, block_size, scale = 64, 4, 1 / 8
    seq_lens, new = [9, 6, 13, 3], [1, 6, 5, 0]
    batch = Batch.of(seq_lens, new, block_size)
    cache = empty_cache(16, kv_heads, block_size, head_size, head_size)
    key, value = torch.randn(2, sum(seq_lens), kv_heads, head_size).unbind(0)
    reference.kv_store(key, value, cache, batch.slots(block_size), head_size)
    query = torch.randn(12, heads, head_size)
    output = attend(reference, query, cache, batch, scale, head_size, sliding_window)
    for request, length in enumerate(seq_lens):
        blocks = batch.block_table[request, : -(-length // block_size)]
        key, value = reference.kv_load(cache, blocks, length, head_size)
        for token in range(new[request]):
            row, position = batch.rows(request).start + token, length - new[request] + token
            first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                seen = slice(first, position + 1)
                weights = (key[kv_head, seen] @ query[row, head] * scale).softmax(0)
                torch.testing.assert_close(
                    output[row, head], weights @ value[kv_head, seen], atol=1e-5, rtol=1e-5
                )


def test_rotated_attention_is_attention_with_rotated_queries_and_keys() -> None:
    torch.manual_seed(0)
    length, kv_heads, head_size = 9, 2, 16
    rotation = torch.linalg.qr(torch.randn(kv_heads, head_size, head_size))[0]
    key, value = torch.randn(2, length, kv_heads, head_size).unbind(0)
    query = torch.randn(3, 6, head_size)
    batch = Batch.of([length], [3], 4)
    caches = [empty_cache(3, kv_heads, 4, head_size, head_size) for _ in range(2)]
    slots = batch.slots(4)
    reference.kv_store(key, value, caches[0], slots, head_size, rotation)
    rotated_key = reference.rotate_heads(key, rotation)
    reference.kv_store(rotated_key, value, caches[1], slots, head_size)
    assert torch.equal(*caches)
    rotated_query = reference.rotate_heads(query, rotation)
    inside = attend(reference, query, caches[0], batch, 0.25, head_size, rotation=rotation)
    outside = attend(reference, rotated_query, caches[1], batch, 0.25, head_size)
    assert torch.equal(inside, outside)


def test_chunks_give_what_one_prefill_gives() -> None:
    torch.manual_seed(0)
    length, heads, head_size = 11, 2, 64
    key, value, query = torch.randn(3, length, heads, head_size).unbind(0)
    cache, chunked = (empty_cache(3, heads, 4, head_size, head_size) for _ in range(2))
    prefill = Batch.of([length], [length], 4)
    slots, scale = prefill.slots(4), 1 / math.sqrt(head_size)
    reference.kv_store(key, value, cache, slots, head_size)
    whole = attend(reference, query, cache, prefill, scale, head_size)
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 11)):
        reference.kv_store(key[start:end], value[start:end], chunked, slots[start:end], head_size)
        chunk = Batch(
            torch.tensor([end]).int(), torch.tensor([0, end - start]).int(), prefill.block_table
        )
        parts.append(attend(reference, query[start:end], chunked, chunk, scale, head_size))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_an_empty_batch() -> None:
    cache = empty_cache(1, 2, 4, 64, 64)
    output = attend(reference, torch.zeros(0, 4, 64), cache, Batch.of([], [], 4), 1.0, 64)
    assert output.shape == (0, 4, 64)
