"""Triton's mixtures of experts against the reference."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expert_layers import ROUTINGS, Experts, route
from layers import FLOATS, assert_close
from torch import Tensor
from triton_tiles import SMALL, always

from vllm_offq.kernels import reference, triton
from vllm_offq.kernels.triton import gemm_config, target
from vllm_offq.kernels.triton.gemm_config import GemmConfig
from vllm_offq.kernels.triton.sort_slots import most_tiles, sort_slots

# The packages have functions of these names.
module = sys.modules["vllm_offq.kernels.triton.experts"]
expert_gemm = sys.modules["vllm_offq.kernels.triton.expert_gemm"]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[GemmConfig], None]:
    """Have experts of any size computed in one way."""
    return lambda config: monkeypatch.setattr(module, "expert_gemm_config", always(config))


def assert_same(experts: Experts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    group_size = experts.gate_up[0].group_size
    step = gemm_config.block_k(group_size)
    segment = step if group_size % step == 0 else group_size
    error = experts.error(x, topk_ids, topk_weights, segment)
    expected = experts.run(reference, x, topk_ids, topk_weights)
    assert_close(experts.run(triton, x, topk_ids, topk_weights), expected, error)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 8), (2, 8), (33, 1), (63, 2)])
def test_any_routing(tokens: int, top_k: int, routing: str, dtype: torch.dtype) -> None:
    """The slots of 63 tokens end within a tile of the memory of their parameters."""
    torch.manual_seed(tokens)
    experts = Experts.random(9, hidden_groups=2, groups=1)
    x = (torch.randn(tokens, 128) + torch.randn(tokens, 1)).to(dtype)
    assert_same(experts, x, *route(routing, tokens, top_k, 9))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("nvidia", [False, True])
@pytest.mark.parametrize("scale_per_group", [False, True])
@pytest.mark.parametrize(
    "grid", [{}, {"symmetric": True, "clip_ratio": 0.9}, {"bits": 8, "clip_ratio": 0.95}]
)
@pytest.mark.parametrize(("group_size", "rotation"), [(64, 64), (96, 0)])
def test_any_grid(
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[GemmConfig], None],
    group_size: int,
    rotation: int,
    grid: dict,
    scale_per_group: bool,
    nvidia: bool,
    wide: bool,
) -> None:
    """In tiles that slots and outputs do not fill; by PTX or by plain operations."""
    gpu = target.INTERPRETER._replace(has_ptx=nvidia, converts_slowly=nvidia)
    monkeypatch.setattr(expert_gemm, "gpu", lambda: gpu)
    use(replace(SMALL, wide=wide))
    torch.manual_seed(group_size)
    experts = Experts.random(3, 2, 1, group_size, rotation, scale_per_group, **grid)
    for layer in experts.down:
        layer.codes, layer.scale = layer.codes[:-5], layer.scale[:-5]
    x = torch.randn(15, 2 * group_size) + 1
    assert_same(experts, x, *route("any", 15, 2, 3))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 5, 700])
@pytest.mark.parametrize("block_m", [16, 64])
def test_slots_are_sorted_by_expert(block_m: int, tokens: int, routing: str) -> None:
    torch.manual_seed(0)
    topk_ids, _ = route(routing, tokens, 4, 11)
    slots = sort_slots(topk_ids, 11, block_m)
    flat = topk_ids.flatten()
    order = torch.cat([(flat == expert).nonzero()[:, 0] for expert in range(11)])
    assert torch.equal(slots.slot[: len(order)], order.int())
    counts = torch.tensor([int((flat == expert).sum()) for expert in range(11)])
    assert slots.start.tolist() == [0, *counts.cumsum(0).tolist()]
    tiles = [
        (expert, int(slots.start[expert]) + first)
        for expert in range(11)
        for first in range(0, int(counts[expert]), block_m)
    ]
    assert len(tiles) <= len(slots.tile_expert) == most_tiles(4 * tokens, 11, block_m)
    found = list(zip(slots.tile_expert.tolist(), slots.tile_start.tolist(), strict=True))
    assert found[: len(tiles)] == tiles
    assert all(expert == 11 for expert, _ in found[len(tiles) :])


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens(top_k: int) -> None:
    y = Experts.random(4, 1, 1).run(triton, torch.zeros(0, 64), *route("any", 0, top_k, 4))
    assert y.shape == (0, 64)


def test_experts_of_other_ranks_add_nothing() -> None:
    """Not even the NaN that their weights or the memory of their rows may hold."""
    topk_ids, topk_weights = torch.full((3, 2), -1), torch.full((3, 2), torch.nan)
    y = Experts.random(4, 1, 1).run(triton, torch.randn(3, 64), topk_ids, topk_weights)
    assert torch.equal(y, torch.zeros(3, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("wide", [False, True])
def test_what_is_not_finite_spoils_its_own_row(
    use: Callable[[GemmConfig], None], wide: bool, bad: float
) -> None:
    """And all of that."""
    use(replace(SMALL, wide=wide))
    torch.manual_seed(0)
    experts = Experts.random(4, 2, 1)
    x = torch.randn(21, 128)
    routed = route("any", 21, 2, 4)
    clean = experts.run(triton, x, *routed)
    x[5, 3] = bad
    y = experts.run(triton, x, *routed)
    assert not y[5].isfinite().any()
    y[5] = clean[5]
    assert torch.equal(y, clean)
