"""One pass of the original model: everything from which the rotations are computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.architectures import Architecture
from calibration.architectures.base import head_size
from calibration.instrument import OffQLinear, attention_state, first_layer_inputs, layers_of
from vllm_offq.errors import UserError


@dataclass
class Statistics:
    """Second moments are uncentred; L layers, n hidden, H_kv KV heads, D head_size."""

    top_tokens: Tensor
    """[2 L S, n] float32: of each sequence and layer input the token of largest maximum."""
    residual: Tensor
    """[n, n] float64, of all tokens at the inputs of attention and MLP, without norm gains."""
    keys: Tensor
    """[L, H_kv, D, D] float64, after RoPE."""
    values: Tensor
    """[L, H_kv, D, D] float64."""
    down_energy: Tensor
    """[L, intermediate] float64: mean square of each channel at down_proj's input."""


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    batch_size: int,
    advance: Callable[[], None],
) -> Statistics:
    """Run the instrumented original over tokens [S, T]; `advance` is called after each layer.

    Raises: UserError naming the layer where an activation is not finite.
    """
    config = model.config
    layers = layers_of(model, architecture)
    hidden_size, dim = config.hidden_size, head_size(config)
    heads = (len(layers), config.num_key_value_heads, dim, dim)
    statistics = Statistics(
        top_tokens=torch.empty(0, hidden_size),
        residual=torch.zeros(hidden_size, hidden_size, dtype=torch.float64),
        keys=torch.zeros(heads, dtype=torch.float64),
        values=torch.zeros(heads, dtype=torch.float64),
        down_energy=torch.zeros(len(layers), config.intermediate_size, dtype=torch.float64),
    )
    top_tokens: list[Tensor] = []
    hidden, arguments = first_layer_inputs(model, architecture, tokens, batch_size)
    for index, layer in enumerate(layers):

        def observe_down(index: int, x: Tensor) -> None:
            statistics.down_energy[index] += x.double().square().sum((0, 1))

        def observe_attention(index: int, key: Tensor, value: Tensor) -> None:
            for moment, heads in ((statistics.keys, key), (statistics.values, value)):
                x = heads.transpose(0, 1).flatten(1, 2)
                moment[index] += (x.transpose(1, 2) @ x).double()

        def observe_residual(gain: Tensor, x: Tensor) -> None:
            normed = x / gain
            strongest = normed.abs().amax(-1).argmax(-1)
            top_tokens.append(normed[torch.arange(len(normed)), strongest])
            flat = normed.flatten(0, 1)
            statistics.residual.add_((flat.T @ flat).double())

        observed: list[OffQLinear] = []
        for site in architecture.sites:
            linear: OffQLinear = layer.get_submodule(site.modules[0])  # type: ignore[assignment]
            if site.norm is not None:
                gain: Tensor = layer.get_submodule(site.norm).weight  # type: ignore[assignment]
                linear.observe = partial(observe_residual, _invertible(gain, index, site.norm))
                observed.append(linear)
            elif site.name == "mlp_output":
                linear.observe = partial(observe_down, index)
                observed.append(linear)
        state = attention_state(layer, architecture)
        state.observe = partial(observe_attention, index)
        hidden = [layer(batch, **arguments) for batch in hidden]
        state.observe = None
        for linear in observed:
            linear.observe = None
        if not all(batch.isfinite().all() for batch in hidden):
            raise UserError(
                f"layer {index} gives NaN or infinite activations on the calibration text; "
                "check the model's weights or load it with --dtype float32"
            )
        advance()
    statistics.top_tokens = torch.cat(top_tokens)
    return statistics


def _invertible(gain: Tensor, layer: int, norm: str) -> Tensor:
    """The input before the gain is what the rotation sees; a dead channel stays zero."""
    if not gain.isfinite().all():
        raise UserError(f"layer {layer}: {norm} has NaN or infinite gains; the model is damaged")
    return torch.where(gain == 0, torch.full_like(gain, torch.inf), gain)
