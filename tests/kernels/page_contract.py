"""What a backend's pages must be: the reference's bit for bit, once they are in its arrangement."""

from collections.abc import Callable
from math import inf, nan
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import empty_cache
from torch import Tensor

from vllm_offq.kernels import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(16, 16), (64, 64), (96, 96), (128, 128), (256, 128), (64, 32)]
GARBAGE = 0xAA  # looks the same in any arrangement of nibbles


def stored(
    kernels: ModuleType,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    block_size: int,
    group_size: int,
    rotation: Tensor | None = None,
) -> Tensor:
    """A cache of 5 blocks of garbage with these tokens in it, in the backend's arrangement."""
    cache = empty_cache(5, key.shape[1], block_size, key.shape[2], group_size, GARBAGE)
    kernels.kv_store(key, value, cache, slots, group_size, rotation)
    return cache


def random_slots(tokens: int, block_size: int) -> Tensor:
    """Distinct, in any order; every third is padding."""
    slots = torch.randperm(5 * block_size)[:tokens]
    slots[::3] = -1
    return slots


class PagesOfTheReference:
    """Tests of the fixture `kernels`."""

    as_reference: Callable[[Tensor, int], Tensor]
    """The backend's arrangement of a cache, turned into the reference's."""

    def assert_same(self, kernels: ModuleType, *arguments: object) -> None:
        """arguments: of `stored`."""
        pages = self.as_reference(stored(kernels, *arguments), arguments[4])  # type: ignore[arg-type]
        assert torch.equal(pages, stored(reference, *arguments))  # type: ignore[arg-type]

    @given(
        tokens=st.integers(0, 70),
        kv_heads=st.integers(1, 3),
        head=st.sampled_from(HEADS),
        block_size=st.sampled_from([16, 32, 48, 128]),
        dtype=st.sampled_from(FLOATS),
        magnitude=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None)
    def test_codes_scales_and_offsets(
        self,
        kernels: ModuleType,
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
        fused = torch.randn(tokens, 4, kv_heads, head_size) + torch.randn(tokens, 4, 1, 1)
        key, value = (magnitude * fused).to(dtype)[:, 2:].unbind(1)
        slots = random_slots(tokens, block_size)
        self.assert_same(kernels, key, value, slots, block_size, group_size)

    @pytest.mark.parametrize("layout", ["heads", "channels"])
    def test_any_layout_of_the_input(self, kernels: ModuleType, layout: str) -> None:
        torch.manual_seed(0)
        first, last = (0, 1) if layout == "heads" else (0, 2)
        key, value = (
            x.transpose(first, last).contiguous().transpose(first, last)
            for x in torch.randn(2, 20, 3, 64)
        )
        self.assert_same(kernels, key, value, random_slots(20, 16), 16, 64)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("head_size", "group_size"), HEADS)
    def test_keys_are_rotated(
        self, kernels: ModuleType, head_size: int, group_size: int, dtype: torch.dtype
    ) -> None:
        """Bit for bit: small integers times quarters are exact in float32, in any order of sums."""
        torch.manual_seed(0)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        hadamard = torch.kron(torch.kron(signs, signs), torch.kron(signs, signs)) / 4
        blocks = torch.block_diag(*[hadamard] * (head_size // 16))
        rotation = torch.stack([blocks[torch.randperm(head_size)] for _ in range(3)])
        key, value = torch.randint(-99, 100, (2, 40, 3, head_size)).to(dtype).unbind(0)
        self.assert_same(kernels, key, value, random_slots(40, 16), 16, group_size, rotation)

    @pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30])
    def test_what_float16_cannot_hold_spoils_its_group_only(
        self, kernels: ModuleType, bad: float
    ) -> None:
        torch.manual_seed(0)
        key, value = torch.randn(2, 16, 1, 64).unbind(0)
        key[3, 0, 5] = value[7, 0, 63] = bad
        rest = torch.arange(16), 16, 32
        pages = self.as_reference(stored(kernels, key, value, *rest), 32)
        ours, expected = (
            reference.kv_load(cache, torch.tensor([0]), 16, 32)
            for cache in (pages, stored(reference, key, value, *rest))
        )
        for actual, wanted in zip(ours, expected, strict=True):
            assert actual.isfinite().sum() == 16 * 64 - 32
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)

    def test_other_layers_in_the_same_block_are_untouched(self, kernels: ModuleType) -> None:
        torch.manual_seed(0)
        shape = 5, 3, *empty_cache(1, 2, 16, 64, 64).shape[1:]
        layers = torch.full(shape, GARBAGE, dtype=torch.uint8)
        key, value = torch.randn(2, 30, 2, 64).unbind(0)
        slots = random_slots(30, 16)
        kernels.kv_store(key, value, layers[:, 1], slots, 64)
        assert (layers[:, ::2] == GARBAGE).all()
        expected = stored(reference, key, value, slots, 16, 64)
        assert torch.equal(self.as_reference(layers[:, 1], 64), expected)
