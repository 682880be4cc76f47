"""The CPU's mixtures of experts against the reference."""

from types import ModuleType

import pytest
import torch
from expert_layers import ROUTINGS, Experts, route
from layers import FLOATS, assert_close

from vllm_offq.kernels import reference
from vllm_offq.quantizer import fake_quantize


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 8), (2, 8), (33, 1), (33, 2)])
def test_any_routing(
    kernels: ModuleType, tokens: int, top_k: int, routing: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    experts = Experts.random(9, hidden_groups=2, groups=1)
    x = (torch.randn(tokens, 128) + torch.randn(tokens, 1)).to(dtype)
    routed = route(routing, tokens, top_k, 9)
    expected = experts.run(reference, x, *routed)
    assert_close(experts.run(kernels, x, *routed), expected, experts.error(x, *routed))


@pytest.mark.parametrize("scale_per_group", [False, True])
@pytest.mark.parametrize(
    "grid", [{}, {"symmetric": True, "clip_ratio": 0.9}, {"bits": 8, "clip_ratio": 0.95}]
)
@pytest.mark.parametrize(("group_size", "rotation"), [(32, 0), (96, 96), (128, 128)])
def test_any_grid(
    kernels: ModuleType, group_size: int, rotation: int, grid: dict, scale_per_group: bool
) -> None:
    """Also of output channels that tiles do not divide."""
    torch.manual_seed(group_size)
    experts = Experts.random(4, 2, 3, group_size, rotation, scale_per_group, **grid)
    for layer in experts.down:
        layer.codes, layer.scale = layer.codes[:-5], layer.scale[:-5]
    x = torch.randn(10, 2 * group_size) + 1
    routed = route("any", 10, 2, 4)
    expected = experts.run(reference, x, *routed)
    assert_close(experts.run(kernels, x, *routed), expected, experts.error(x, *routed))


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens(kernels: ModuleType, top_k: int) -> None:
    experts = Experts.random(4, 1, 1)
    y = experts.run(kernels, torch.zeros(0, 64), *route("any", 0, top_k, 4))
    assert y.shape == (0, 64)


def test_experts_of_other_ranks_add_nothing(kernels: ModuleType) -> None:
    topk_ids, topk_weights = torch.full((3, 2), -1), torch.ones(3, 2)
    y = Experts.random(4, 1, 1).run(kernels, torch.randn(3, 64), topk_ids, topk_weights)
    assert torch.equal(y, torch.zeros(3, 64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_do_not_depend_on_each_other(
    kernels: ModuleType, bad: float, dtype: torch.dtype
) -> None:
    """To the bit, whatever the batch. What is not finite spoils its own row, and all of that."""
    torch.manual_seed(0)
    experts = Experts.random(4, 2, 2)
    x = torch.randn(21, 128).to(dtype)
    topk_ids, topk_weights = route("any", 21, 2, 4)
    clean = experts.run(kernels, x, topk_ids, topk_weights)
    for rows in (slice(0, 1), slice(7, 10), slice(20, 21)):
        alone = experts.run(kernels, x[rows], topk_ids[rows], topk_weights[rows])
        assert torch.equal(alone, clean[rows])
    x[5, 3] = bad
    y = experts.run(kernels, x, topk_ids, topk_weights)
    assert not y[5].isfinite().any()
    y[5] = clean[5]
    assert torch.equal(y, clean)


def test_the_reference_is_the_sum_over_experts() -> None:
    """Of a plain calculation in float64, of inputs as the grids see them."""
    torch.manual_seed(0)
    experts = Experts.random(4, 2, 1, rotation_block_size=0)
    x = torch.randn(6, 128)
    topk_ids, topk_weights = route("any", 6, 2, 4)
    y = experts.run(reference, x, topk_ids, topk_weights)
    expected = torch.zeros(6, 128, dtype=torch.float64)
    for t in range(6):
        for e, w in zip(topk_ids[t].tolist(), topk_weights[t], strict=True):
            gate_up, down = experts.gate_up[e], experts.down[e]
            seen = fake_quantize(x[t], gate_up.group_size).double()
            gate, up = (seen @ gate_up.weight.T).chunk(2)
            activated = (gate * gate.sigmoid() * up).float()
            seen = fake_quantize(activated, down.group_size).double()
            expected[t] += w * (seen @ down.weight.T)
    error = experts.error(x, topk_ids, topk_weights)
    assert_close(y, expected.float(), error)
