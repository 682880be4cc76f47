"""One pass of the original model: everything from which the rotations are computed."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calibration.architectures.base import head_size
from calibration.experts import experts_of
from calibration.instrument import attention_state, block_inputs
from calibration.loader import Original
from calibration.resume import NOT_SAVED, SavedPass
from vllm_offq.errors import UserError

ROWS_AT_ONCE = 4096
"""Of a head, in double precision."""


@dataclass
class Statistics:
    """Second moments are uncentred; L layers, n hidden, H_kv KV heads, D head_size."""

    top_tokens: Tensor
    """[2 L S, n] float32: of each sequence and layer input the token of largest maximum."""
    residual: Tensor
    """[n, n] float64, at the inputs of attention and MLP, normed, without gains; of all tokens
    but the first of each sequence."""
    first: Tensor
    """[n, n] float64, likewise of the first tokens, which models use as a sink of attention."""
    input_energy: Tensor
    """[L, 2, n] float64, the diagonal of residual by layer, for attention and MLP."""
    gains: Tensor | None
    """[L, 2, n] float64, of the norms before them; None where no norm may keep gains."""
    weight_energy: Tensor | None
    """[L, 2, n] float64: sum of squares of each column of what reads them, gains folded in; None
    where no norm may keep gains."""
    final_energy: Tensor
    """[n] float64, likewise of what reaches the final norm's gain, all tokens."""
    final_gains: Tensor | None
    """[n] float64, of the norm before the head; None where it may keep none."""
    head_energy: Tensor | None
    """[n] float64, as weight_energy, of the head; None where its norm may keep no gains."""
    keys: Tensor
    """[L, H_kv, D, D] float64, after RoPE."""
    values: Tensor
    """[L, H_kv, D, D] float64."""
    down_energy: Tensor
    """[L, intermediate], or [L, E, intermediate] with experts, float64: sum of squares of each
    channel at down_proj's input."""

    def tensors(self) -> dict[str, Tensor]:
        """All that is there, for a file."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def to_cpu(self) -> "Statistics":
        """All of it: what follows is small, and in double precision."""
        found = copy(self)
        for name, part in vars(self).items():
            setattr(found, name, None if part is None else part.cpu())
        return found


@torch.no_grad()
def collect(
    original: Original,
    tokens: Tensor,
    batch_size: int,
    advance: Callable[..., None],
    kept: SavedPass = NOT_SAVED,
) -> Statistics:
    """Run the instrumented original over tokens [S, T], block by block.

    `advance` is called after each. kept: what to go on from.
    Raises: UserError naming the layer where an activation is not finite.
    """
    model, architecture, config = original.model, original.architecture, original.model.config
    hidden_size, dim, num_layers = config.hidden_size, head_size(config), original.num_layers
    heads = (num_layers, config.num_key_value_heads, dim, dim)
    zeros = partial(torch.zeros, dtype=torch.float64, device=original.device)
    statistics = Statistics(
        top_tokens=zeros(0, hidden_size),
        residual=zeros(hidden_size, hidden_size),
        first=zeros(hidden_size, hidden_size),
        input_energy=zeros(num_layers, 2, hidden_size),
        gains=zeros(num_layers, 2, hidden_size) if architecture.keeps_gains else None,
        weight_energy=zeros(num_layers, 2, hidden_size) if architecture.keeps_gains else None,
        final_energy=zeros(hidden_size),
        final_gains=None,
        head_energy=None,
        keys=zeros(*heads),
        values=zeros(*heads),
        down_energy=zeros(num_layers, *_down_shape(original)),
    )
    top_tokens: list[Tensor] = []
    with original.loaded(architecture.embedding, architecture.final_norm):
        inputs = block_inputs(model, architecture, tokens, batch_size)
    done, found = kept.load()
    if done:
        inputs.restore("hidden", found)
        for name in statistics.tensors():
            setattr(statistics, name, found[name].to(original.device))
        top_tokens.append(found["top_tokens"])
        found.clear()  # or the activations would be there twice
        advance(done)

    def so_far() -> dict[str, Tensor]:
        found = statistics.tensors() | inputs.tensors("hidden")
        return found | {"top_tokens": torch.cat(top_tokens)}

    for index in range(done, num_layers):

        def observe_down(place: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor]) -> None:
            statistics.down_energy[place] += inputs[0].double().square().flatten(0, -2).sum(0)

        def observe_attention(index: int, key: Tensor, value: Tensor) -> None:
            for moment, heads in ((statistics.keys, key), (statistics.values, value)):
                x = heads.transpose(0, 1).flatten(1, 2)
                moment[index] += (x.transpose(1, 2) @ x).double()

        def observe_residual(
            place: tuple[int, int], gain: Tensor | None, _: nn.Module, inputs: tuple[Tensor]
        ) -> None:
            x = inputs[0]
            # Where there is no norm, later layers would outweigh the first ones.
            normed = _normed(x) if gain is None else x / gain
            strongest = normed.abs().amax(-1).argmax(-1)
            top_tokens.append(normed[torch.arange(len(normed)), strongest].cpu())
            first, others = normed[:, 0], normed[:, 1:].flatten(0, 1)
            statistics.first.add_((first.T @ first).double())
            moments = (others.T @ others).double()
            statistics.residual.add_(moments)
            statistics.input_energy[place] += moments.diagonal()

        with original.block(index) as layer:
            experts = experts_of(layer, architecture)
            if experts is not None:
                experts.calibrates = True
            hooks = []
            for site in architecture.sites:
                if site.reads_residual:
                    reading = (index, architecture.reading.index(site))
                    divisor = None
                    if site.norm is not None:
                        weight: Tensor = layer.get_submodule(site.norm).weight  # type: ignore[assignment]
                        gain = weight + architecture.gain_offset
                        divisor = invertible(gain)
                        if statistics.gains is not None and statistics.weight_energy is not None:
                            statistics.gains[reading] = gain
                            linears = map(layer.get_submodule, site.modules)
                            statistics.weight_energy[reading] += _energy(linears, gain)
                    observe = partial(observe_residual, reading, divisor)
                    reader = layer.get_submodule(site.reader)
                    hooks.append(reader.register_forward_pre_hook(observe))
                elif site.name == "mlp_output":
                    for number, (path,) in enumerate(site.groups):
                        place = (index, number) if architecture.num_experts else (index,)
                        down = layer.get_submodule(path)
                        hooks.append(down.register_forward_pre_hook(partial(observe_down, place)))
            state = attention_state(layer, architecture)
            state.observe = partial(observe_attention, index)
            inputs.advance(index, layer)
            state.observe = None
            if experts is not None:
                experts.calibrates = False
            for hook in hooks:
                hook.remove()
        if not all(batch.isfinite().all() for batch in inputs.hidden):
            raise UserError(
                f"layer {index} gives NaN or infinite activations on the calibration text; "
                "check the model's weights"
            )
        advance()
        kept.done(index + 1, so_far)
    statistics.top_tokens = torch.cat(top_tokens)
    if architecture.keeps_final_gains:
        with original.loaded(architecture.final_norm, architecture.head) as (norm, head):
            gains = norm.get_parameter("weight") + architecture.gain_offset
            statistics.final_gains = gains.double()
            statistics.head_energy = _energy([head], gains)
        for batch in inputs.hidden:
            squares = _normed(batch.to(original.device)).double().square()
            statistics.final_energy += squares.flatten(0, -2).sum(0)
    return statistics.to_cpu()


def _normed(x: Tensor) -> Tensor:
    """What an RMSNorm without gain makes of x, [..., n]."""
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def _energy(linears: Iterable[nn.Module], gain: Tensor) -> Tensor:
    """Sum of squares of each column of all of them, with the gain folded in. gain: [n].

    Returns: [n] float64.
    """
    rows = (part for linear in linears for part in linear.weight.split(ROWS_AT_ONCE))  # type: ignore[operator]
    return torch.stack([(part * gain).double().square().sum(0) for part in rows]).sum(0)


def _down_shape(original: Original) -> tuple[int, ...]:
    """Experts, if there are some, and the width of an MLP."""
    architecture, config = original.architecture, original.model.config
    width = architecture.intermediate_size(config)
    return (architecture.num_experts, width) if architecture.num_experts else (width,)


def invertible(gain: Tensor) -> Tensor:
    """To divide by: the rotation sees the input before the gain; a dead channel stays zero."""
    return torch.where(gain == 0, torch.full_like(gain, torch.inf), gain)
