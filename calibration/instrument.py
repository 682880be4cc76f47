"""A Hugging Face model made to rotate, quantize-dequantize and be observed.

Linears become OffQLinear and attention goes through a registered attention function, so the
very classes of transformers run: with grids off they must compute what the original computes,
with grids on what the served model computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from calibration.architectures import Architecture
from calibration.straight_through import fake_quantize, fake_quantize_kv
from vllm_offq.format import CheckpointConfig, SiteConfig
from vllm_offq.rotation import apply_block_hadamard

ATTENTION = "offq"


class OffQLinear(nn.Module):
    """A linear that rotates its input online, and quantizes it when a grid is set."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.online_hadamard: int | None = None
        self.grid: SiteConfig | None = None
        self.rounded: Callable[[Tensor], Tensor] | None = None
        """The product with what stands in for weight while a grid is set."""
        self.observe: Callable[[Tensor], None] | None = None
        """Called with what the product sees, [..., in_features]: rotated, on the grid if set."""

    def forward(self, x: Tensor) -> Tensor:
        if self.online_hadamard is not None:
            x = apply_block_hadamard(x, self.online_hadamard)
        if self.grid is not None:
            grid = self.grid
            x = fake_quantize(x, grid.group_size, grid.clip_ratio, grid.symmetric, grid.bits)
        if self.observe is not None:
            self.observe(x)
        if self.grid is None or self.rounded is None:
            return nn.functional.linear(x, self.weight, self.bias)
        y = self.rounded(x)
        return y if self.bias is None else y + self.bias


@dataclass
class AttentionState:
    """What the attention function does to one layer's queries, keys and values."""

    key_rotation: Tensor | None = None
    """[num_kv_heads, D, D]; queries and keys are multiplied by it after RoPE."""
    kv_group_size: int | None = None
    """Quantize keys and values in groups of this many channels; None: leave them."""
    observe: Callable[[Tensor, Tensor], None] | None = None
    """Called with keys (before rotation) and values, [B, num_kv_heads, T, D]."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    state: AttentionState = module.offq  # type: ignore[assignment]
    if state.observe is not None:
        state.observe(key, value)
    if state.key_rotation is not None:
        rotation = state.key_rotation.to(key)
        key = key @ rotation
        query = query @ rotation.repeat_interleave(query.shape[1] // key.shape[1], 0)
    if state.kv_group_size is not None:
        key = fake_quantize_kv(key, state.kv_group_size)
        value = fake_quantize_kv(value, state.kv_group_size)
    if kwargs.get("softcap"):
        return _soft_capped_attention(query, key, value, mask, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float,
    **kwargs: Any,
) -> Tensor:
    """What PyTorch's attention does not do: scores pass ``softcap * tanh(scores / softcap)``.

    query: [B, H, T, D]; key, value: [B, H_kv, S, D]; mask: [B, 1, T, S], or None: causal.
    Returns: [B, T, H, D].
    """
    key, value = (
        heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value)
    )
    scores = softcap * (query @ key.mT * (scaling / softcap)).tanh()
    if mask is None:
        past = key.shape[2] - query.shape[2]
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(past)
    scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def instrument(model: PreTrainedModel, architecture: Architecture) -> None:
    """Replace every quantizable linear and the attention function, in place.

    The model computes what it did before until a rotation or a grid is set; one that was
    instrumented before forgets what was set.
    """
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    for layer in layers_of(model, architecture):
        layer.get_submodule(architecture.attention).offq = AttentionState()  # type: ignore[assignment]
        for site in architecture.sites:
            for path in site.modules:
                layer.set_submodule(path, OffQLinear(layer.get_submodule(path)))  # type: ignore[arg-type]


def set_grids(
    layer: nn.Module, architecture: Architecture, config: CheckpointConfig | None
) -> None:
    """Quantize in an instrumented block what the configuration quantizes; None: nothing."""
    for site in architecture.sites:
        for path in site.modules:
            linear: OffQLinear = layer.get_submodule(path)  # type: ignore[assignment]
            linear.grid = None if config is None else config.sites[site.name]
    cache = None if config is None else config.kv_cache
    attention_state(layer, architecture).kv_group_size = None if cache is None else cache.group_size


def layers_of(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """The decoder blocks in order."""
    return list(model.get_submodule(architecture.layers).children())


def attention_state(layer: nn.Module, architecture: Architecture) -> AttentionState:
    """The state of an instrumented block's attention."""
    return layer.get_submodule(architecture.attention).offq  # type: ignore[return-value]


def to_device(x: Tensor, module: nn.Module) -> Tensor:
    """To where a module computes."""
    return x.to(next(module.parameters()).device)


@dataclass
class BlockInputs:
    """What flows from one decoder block to the next."""

    hidden: list[Tensor]
    """Of each batch, [B, T, n] float32, in the CPU's memory: they may be many."""
    arguments: list[dict[str, Any]]
    """Of each block: all else that it is called with (masks, positions, rotary tables)."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All batches by number, for a file."""
        return {f"{name}.{number}": batch for number, batch in enumerate(self.hidden)}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Inverse of tensors: those of as many batches."""
        self.hidden = [tensors[f"{name}.{number}"] for number in range(len(self.hidden))]

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace every batch by what block `index` makes of it."""
        for number, batch in enumerate(self.hidden):
            self.hidden[number] = block(to_device(batch, block), **self.arguments[index]).cpu()

    def reach(self, number: int, index: int, block: nn.Module, linear: OffQLinear) -> Tensor:
        """What block `index` feeds to a linear in it for one batch; nothing beyond is computed."""

        class Reached(Exception):  # noqa: N818 - leaves the forward pass, no error
            pass

        found: list[Tensor] = []

        def catch(x: Tensor) -> None:
            found.append(x)
            raise Reached

        linear.observe = catch
        try:
            block(to_device(self.hidden[number], block), **self.arguments[index])
        except Reached:
            pass
        finally:
            linear.observe = None
        return found[0]


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel, architecture: Architecture, tokens: Tensor, batch_size: int
) -> BlockInputs:
    """What reaches the first block. Embedding and final norm must be loaded, blocks need not.

    tokens: [S, T] int64, batch_size divides S, so that the arguments serve every batch.
    """
    blocks, embedding = layers_of(model, architecture), model.get_submodule(architecture.embedding)
    arguments: list[dict[str, Any]] = [{} for _ in blocks]
    hidden: list[Tensor] = []

    def pass_on(index: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        arguments[index] = kwargs | {"past_key_values": None, "use_cache": False}
        if index == 0:
            hidden.append(hidden_states.cpu())
        return hidden_states

    for index, block in enumerate(blocks):
        block.forward = partial(pass_on, index)
    try:
        for batch in tokens.split(batch_size):
            model.get_decoder()(to_device(batch, embedding), use_cache=False)
    finally:
        for block in blocks:
            del block.forward  # the class's own is found again
    return BlockInputs(hidden, arguments)
