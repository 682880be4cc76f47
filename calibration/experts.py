"""Mixtures of experts, taken apart: transformers keeps all experts of a block in one tensor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.architectures import Architecture

LEAST_SHARE = 32
"""While calibrating, an expert sees at least one in so many tokens of a batch, routed to it or
not: the Hessian of an expert that hardly any token is routed to would be none."""


class Expert(nn.Module):
    """Gate, up and down under the names that they have on disk."""

    def __init__(self, names: tuple[str, str, str], hidden: int, intermediate: int) -> None:
        super().__init__()
        gate, up, down = names
        for name in (gate, up):
            self.add_module(name, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False))


class Experts(nn.Module):
    """All experts of a block, one linear after the other, in place of transformers' own.

    Its submodules 0, 1, ... are the experts.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        count: int,
        hidden: int,
        intermediate: int,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        for expert in range(count):
            self.add_module(str(expert), Expert(names, hidden, intermediate))
        self._names = names
        self._activation = activation
        self.calibrates = False
        """Show every expert some tokens, see LEAST_SHARE; what is computed stays."""
        self.counts = [0] * count
        """Tokens that were routed to each expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [t, n]; top_k_index, top_k_weights: [t, k]. Returns: [t, n]."""
        total = torch.zeros_like(hidden_states)
        for number in range(len(self.counts)):
            expert = self.get_submodule(str(number))
            token, slot = (top_k_index == number).nonzero(as_tuple=True)
            self.counts[number] += len(token)
            seen = torch.cat([token, self._others(token, len(hidden_states))])
            if not len(seen):
                continue
            x = hidden_states[seen]
            gate, up, down = (expert.get_submodule(name) for name in self._names)
            y = down(self._activation(gate(x)) * up(x))[: len(token)]
            total.index_add_(0, token, y * top_k_weights[token, slot, None])
        return total

    def _others(self, token: Tensor, num_tokens: int) -> Tensor:
        """Tokens, evenly spaced, that make up for too few that are routed here."""
        missing = num_tokens // LEAST_SHARE + 1 - len(token) if self.calibrates else 0
        if missing <= 0:
            return token[:0]
        unrouted = torch.ones(num_tokens, dtype=torch.bool, device=token.device)
        unrouted[token] = False
        others = unrouted.nonzero().flatten()
        return others[:: max(1, len(others) // missing)][:missing]


def separate_experts(model: PreTrainedModel, architecture: Architecture) -> None:
    """Replace the experts of every block, in place; their weights are not carried over."""
    layout = architecture.layout.experts
    if layout is None:
        return
    for block in model.get_submodule(architecture.layers).children():
        fused = block.get_submodule(architecture.experts)
        count, hidden, intermediate = fused.down_proj.shape  # type: ignore[misc]
        experts = Experts(layout.linears, count, hidden, intermediate, fused.act_fn)  # type: ignore[arg-type]
        block.set_submodule(architecture.experts, experts)


def experts_of(layer: nn.Module, architecture: Architecture) -> Experts | None:
    """Those of a block, if it has some."""
    if architecture.layout.experts is None:
        return None
    return layer.get_submodule(architecture.experts)  # type: ignore[return-value]
