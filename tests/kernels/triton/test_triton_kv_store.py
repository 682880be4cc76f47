"""Triton's 4-bit pages against the reference's, bit for bit, and heads rotated by Triton."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import empty_cache
from torch import Tensor
from triton_pages import as_reference

from vllm_offq.errors import UserError
from vllm_offq.kernels import reference
from vllm_offq.kernels.triton.kv_store import kv_store, rotate_heads

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(16, 16), (64, 64), (96, 96), (128, 128), (256, 128), (64, 32)]
GARBAGE = 0xAA  # looks the same in any arrangement of nibbles


def stored(
    store: Callable[..., None],
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    block_size: int,
    group_size: int,
    rotation: Tensor | None = None,
) -> Tensor:
    """A cache of 5 blocks of garbage with these tokens in it, in the reference's arrangement."""
    cache = empty_cache(5, key.shape[1], block_size, key.shape[2], group_size, GARBAGE)
    store(key, value, cache, slots, group_size, rotation)
    return as_reference(cache, group_size) if store is kv_store else cache


def random_slots(tokens: int, block_size: int) -> Tensor:
    """Distinct, in any order; every third is padding."""
    slots = torch.randperm(5 * block_size)[:tokens]
    slots[::3] = -1
    return slots


@given(
    tokens=st.integers(0, 70),
    kv_heads=st.integers(1, 3),
    head=st.sampled_from(HEADS),
    block_size=st.sampled_from([16, 32, 48, 128]),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_pages_have_the_codes_scales_and_offsets_of_the_reference(
    tokens: int,
    kv_heads: int,
    head: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    magnitude: float,
    seed: int,
) -> None:
    """Everything else stays as it was. Keys and values are slices, as of a fused projection."""
    torch.manual_seed(seed)
    head_size, group_size = head
    fused = magnitude * (torch.randn(tokens, 4, kv_heads, head_size) + torch.randn(tokens, 4, 1, 1))
    key, value = fused.to(dtype)[:, 2:].unbind(1)
    arguments = key, value, random_slots(tokens, block_size), block_size, group_size
    assert torch.equal(stored(kv_store, *arguments), stored(reference.kv_store, *arguments))


@pytest.mark.parametrize("rotated", [False, True])
def test_more_tokens_than_one_tile_has_rows(rotated: bool) -> None:
    torch.manual_seed(0)
    key, value = torch.randint(-99, 100, (2, 300, 2, 64)).bfloat16().unbind(0)
    rotation = torch.eye(64).flip(0).repeat(2, 1, 1) if rotated else None
    arguments = key, value, random_slots(300, 64), 64, 64, rotation
    assert torch.equal(stored(kv_store, *arguments), stored(reference.kv_store, *arguments))


@pytest.mark.parametrize("layout", ["heads", "channels"])
def test_any_layout_of_the_input(layout: str) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 20, 3, 64).unbind(0)
    first, last = (0, 1) if layout == "heads" else (0, 2)
    other_key, other_value = (
        x.transpose(first, last).contiguous().transpose(first, last) for x in (key, value)
    )
    rest = random_slots(20, 16), 16, 64
    expected = stored(kv_store, key, value, *rest)
    assert torch.equal(stored(kv_store, other_key, other_value, *rest), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_size", "group_size"), HEADS)
def test_keys_are_rotated(head_size: int, group_size: int, dtype: torch.dtype) -> None:
    """Bit for bit: small integers times quarters are exact in float32, in any order of sums."""
    torch.manual_seed(0)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = torch.kron(torch.kron(signs, signs), torch.kron(signs, signs)) / 4
    blocks = torch.block_diag(*[hadamard] * (head_size // 16))
    rotation = torch.stack([blocks[torch.randperm(head_size)] for _ in range(3)])
    key, value = torch.randint(-99, 100, (2, 40, 3, head_size)).to(dtype).unbind(0)
    arguments = key, value, random_slots(40, 16), 16, group_size, rotation
    assert torch.equal(stored(kv_store, *arguments), stored(reference.kv_store, *arguments))


@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30])
def test_what_float16_cannot_hold_spoils_its_group_only(bad: float) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 16, 1, 64).unbind(0)
    key[3, 0, 5] = value[7, 0, 63] = bad
    rest = torch.arange(16), 16, 32
    ours, expected = (
        reference.kv_load(stored(store, key, value, *rest), torch.tensor([0]), 16, 32)
        for store in (kv_store, reference.kv_store)
    )
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.isfinite().sum() == 16 * 64 - 32
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_other_layers_in_the_same_block_are_untouched() -> None:
    torch.manual_seed(0)
    layers = torch.full(
        (5, 3, *empty_cache(1, 2, 16, 64, 64).shape[1:]), GARBAGE, dtype=torch.uint8
    )
    key, value = torch.randn(2, 30, 2, 64).unbind(0)
    slots = random_slots(30, 16)
    kv_store(key, value, layers[:, 1], slots, 64)
    assert (layers[:, ::2] == GARBAGE).all()
    expected = stored(reference.kv_store, key, value, slots, 16, 64)
    assert torch.equal(as_reference(layers[:, 1], 64), expected)


def test_smaller_groups_are_refused() -> None:
    key = torch.zeros(1, 1, 128)
    with pytest.raises(UserError, match="heads of 128 channels in groups of 32 are not supported"):
        kv_store(key, key, empty_cache(1, 1, 16, 128, 32), torch.zeros(1, dtype=torch.int64), 32)


@given(
    tokens=st.sampled_from([0, 1, 5, 90]),
    kv_heads=st.integers(1, 2),
    ratio=st.sampled_from([1, 3, 4]),
    head_size=st.sampled_from([16, 64, 96, 256]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20, deadline=None)
def test_heads_are_rotated_and_rounded(
    tokens: int, kv_heads: int, ratio: int, head_size: int, dtype: torch.dtype, seed: int
) -> None:
    """Sums of n products, with roundings of 2^-24 of themselves, are off by sqrt(n) as much in the
    mean; rotations keep norms."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(kv_heads, head_size, head_size))[0].contiguous()
    x = torch.randn(tokens, 2, kv_heads * ratio, head_size).to(dtype)[:, 1]
    actual, expected = rotate_heads(x, rotation), reference.rotate_heads(x, rotation)
    assert actual.dtype == dtype
    sums = 6 * head_size**0.5 * 2.0**-24 * x.float().norm(dim=2, keepdim=True)
    rounding = 0.5 * torch.finfo(dtype).eps * expected.abs()
    assert ((actual.float() - expected).abs() <= sums + 1.01 * rounding).all()
