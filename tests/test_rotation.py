"""The rotations are orthogonal and put outliers where OffQ wants them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_offq import rotation
from vllm_offq.errors import UserError
from vllm_offq.rotation import (
    apply_block_hadamard,
    group_rotation,
    hadamard,
    principal_basis,
    sorted_grouping,
)

GROUPINGS = [(576, 64), (128, 128), (96, 96), (768, 96), (64, 2)]


def assert_orthogonal(matrix: torch.Tensor) -> None:
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "n", [*(2**k for k in range(10)), *(12 * 2**k for k in range(6)), 20, 28, 36, 448, 576]
)
def test_hadamard_is_orthogonal_flat_and_starts_with_ones(n: int) -> None:
    matrix = hadamard(n)
    assert_orthogonal(matrix)
    assert torch.equal(matrix[0], matrix[0].abs())
    torch.testing.assert_close(matrix.abs() * n**0.5, torch.ones_like(matrix))


@pytest.mark.slow  # 5 GB
def test_hadamard_of_a_large_intermediate_size() -> None:
    matrix = hadamard(14336)
    assert (matrix[0] > 0).all()
    columns = matrix[:, ::224].float()  # the whole product would take minutes
    torch.testing.assert_close(columns.T @ columns, torch.eye(64), atol=1e-4, rtol=0)
    rotation._hadamard.cache_clear()


@pytest.mark.parametrize("n", [0, -4])
def test_hadamard_needs_a_positive_order(n: int) -> None:
    with pytest.raises(UserError, match=f"positive order, not {n}"):
        hadamard(n)


@pytest.mark.parametrize("n", [3, 6, 46, 92])
def test_hadamard_refuses_what_it_cannot_build(n: int) -> None:
    with pytest.raises(UserError, match=f"order {n}"):
        hadamard(n)


@given(
    batch=st.integers(0, 3),
    blocks=st.integers(1, 4),
    block_size=st.sampled_from([1, 2, 12, 64]),
)
@settings(max_examples=25, deadline=None)
def test_block_hadamard_acts_in_each_block(batch: int, blocks: int, block_size: int) -> None:
    x = torch.randn(batch, blocks * block_size, dtype=torch.float64)
    expected = x @ torch.block_diag(*[hadamard(block_size)] * blocks)
    torch.testing.assert_close(apply_block_hadamard(x, block_size), expected)


@pytest.mark.parametrize(("n", "group_size"), GROUPINGS)
def test_every_group_gets_one_of_the_strongest(n: int, group_size: int) -> None:
    order = sorted_grouping(n, group_size)
    assert sorted(order.tolist()) == list(range(n))
    num_groups = n // group_size
    groups = order.view(num_groups, group_size)
    assert sorted(groups[:, 0].tolist()) == list(range(num_groups))
    # Slot by slot, not only the first: each group's ranks grow in steps of G.
    assert torch.equal(groups % num_groups, groups[:, :1].expand_as(groups))


@pytest.mark.parametrize(("n", "group_size"), GROUPINGS)
def test_the_strongest_directions_become_constants_of_their_groups(n: int, group_size: int) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = group_rotation(basis, group_size)
    assert_orthogonal(matrix)
    for rank in range(n // group_size):
        groups = (100.0 * basis[:, rank] @ matrix).view(-1, group_size)
        expected = torch.zeros_like(groups)
        expected[rank] = 100.0 / group_size**0.5
        torch.testing.assert_close(groups, expected, atol=1e-9, rtol=0)


def planted(n: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit direction, and tokens that are mostly it, always with the same sign."""
    torch.manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0)
    strength = 50 + 10 * torch.rand(tokens, 1, dtype=torch.float64)
    return direction, strength * direction + 0.1 * torch.randn(tokens, n, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 5, 64, 500])
def test_principal_basis_recovers_a_planted_direction(tokens: int) -> None:
    direction, x = planted(64, tokens)
    basis = principal_basis(x, torch.eye(64))
    assert_orthogonal(basis)
    assert (basis[:, 0] @ direction).abs() > 0.999


def test_a_few_tokens_are_completed_by_the_covariance_of_all() -> None:
    direction, x = planted(32, 3)
    second = torch.zeros(32, dtype=torch.float64)
    second[7] = 1.0
    covariance = 1e-3 * torch.eye(32, dtype=torch.float64) + torch.outer(second, second)
    basis = principal_basis(x[:1], covariance)
    assert_orthogonal(basis)
    # Of what is orthogonal to the one token, the strongest of all tokens comes next.
    first = torch.nn.functional.normalize(x[0], dim=0)
    rest = torch.nn.functional.normalize(second - (second @ first) * first, dim=0)
    assert (basis[:, 0] @ direction).abs() > 0.999
    assert (basis[:, 1] @ rest).abs() > 0.999999


def test_no_tokens_leave_the_covariance_alone() -> None:
    basis = principal_basis(torch.zeros(0, 8), torch.diag(torch.arange(1.0, 9.0)))
    torch.testing.assert_close(basis, torch.eye(8, dtype=torch.float64).flip(1))


def test_columns_point_to_their_largest_entry() -> None:
    _, x = planted(48, 100)
    basis = principal_basis(x, torch.eye(48))
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


class Copies(TorchDispatchMode):
    """Names of operations that copy to another dtype or device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block_size", [64, 192, 1536])
def test_signs_are_copied_to_a_device_once(block_size: int) -> None:
    """A copy from the host in every forward could not be captured in a CUDA graph."""
    x = torch.randn(2, block_size)
    apply_block_hadamard(x, block_size)
    with Copies() as copies:
        apply_block_hadamard(x, block_size)
    assert not copies.found


def test_signs_that_inference_has_kept_serve_training() -> None:
    with torch.inference_mode():
        apply_block_hadamard(torch.randn(2, 96), 96)
    x = torch.randn(2, 96, requires_grad=True)
    apply_block_hadamard(x, 96).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)
