"""Triton's 4-bit pages against the reference's, and heads rotated by Triton."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_contract import FLOATS, PagesOfTheReference, random_slots
from paged import empty_cache
from triton_pages import as_reference

from vllm_offq.errors import UserError
from vllm_offq.kernels import reference
from vllm_offq.kernels.triton.kv_store import kv_store, rotate_heads


class TestPages(PagesOfTheReference):
    as_reference = staticmethod(as_reference)

    @pytest.mark.parametrize("rotated", [False, True])
    def test_more_tokens_than_one_tile_has_rows(self, kernels: ModuleType, rotated: bool) -> None:
        torch.manual_seed(0)
        key, value = torch.randint(-99, 100, (2, 300, 2, 64)).bfloat16().unbind(0)
        rotation = torch.eye(64).flip(0).repeat(2, 1, 1) if rotated else None
        self.assert_same(kernels, key, value, random_slots(300, 64), 64, 64, rotation)


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
