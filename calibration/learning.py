"""Learning, after rounding, what a checkpoint stores in floating point anyway.

Codes stay as they are. The scales of the weights and the gains of the norms (ones, as soon as the
original's are folded into the weights) move by back-propagation with all grids on, so that the
predictions come closer to the original's. A checkpoint's format, size and speed do not change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibration.architectures import Architecture
from calibration.instrument import OffQLinear, layers_of
from calibration.memory import give_back
from calibration.straight_through import CodedProduct
from vllm_offq.format import WEIGHT_PACKED, WEIGHT_SCALE, unpack_int4

PIECE = 128
"""Tokens whose logits are held at once: the vocabulary is wide."""
SCALE_RATE = 1.5e-3
"""Of Adam; a scale changes by at most about this share a step."""
GAIN_RATE = 2e-3
WARM_UP = 4
"""Steps over which the rates grow; then they fall along a cosine."""
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass
class _Weight:
    """A linear's codes, and its scales as what is learned: the logarithm of their growth."""

    linear: OffQLinear
    codes: Tensor
    """[out, in] int8."""
    start: Tensor
    """[out, groups] float32."""
    growth: Tensor
    """[out, groups]."""

    def scale(self) -> Tensor:
        """[out, groups], differentiable. What is zero stays zero."""
        return self.start * self.growth.exp()

    def apply(self, scale: Tensor) -> None:
        """Let the linear compute with these scales."""

        def product(x: Tensor) -> Tensor:
            return CodedProduct.apply(x, self.codes, scale)

        self.linear.rounded = product


class Learning:
    """One run of `steps` steps, whose state may be kept and restored between them.

    model: of `simulated_model`, whose quantized weights are codes from now on; original:
    instrumented, with its own weights and no grids; tensors: of the checkpoint by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        architecture: Architecture,
        tensors: dict[str, Tensor],
        steps: int,
    ) -> None:
        self._model, self._original, self._architecture = model, original, architecture
        self._steps = steps
        self._stored = tensors
        self._weights = _weights(model, architecture, tensors)
        for weight in self._weights.values():
            weight.apply(weight.start)
            weight.linear.weight = nn.Parameter(weight.start.new_empty(0), requires_grad=False)
        give_back()
        # A block's activations are many times its input, so they are computed again when needed.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for layer in layers_of(model, architecture):
            layer.training = True  # or it would not; its parts stay as they are, without dropout
        self._gains = _gains(model, architecture)
        growths = [weight.growth for weight in self._weights.values()]
        gains = [gain.requires_grad_() for gain in self._gains.values()]
        self._learned: list[Tensor] = [*growths, *gains]
        self._mean = [torch.zeros_like(value) for value in self._learned]
        self._optimizer = torch.optim.Adam(
            [{"params": growths, "rate": SCALE_RATE}, {"params": gains, "rate": GAIN_RATE}],
            betas=(0.9, 0.95),
        )
        self.done = 0

    def step(self, batch: Tensor) -> float:
        """Learn from one batch, [B, T] int64. Returns: its divergence before."""
        with torch.enable_grad():
            for weight in self._weights.values():
                weight.apply(weight.scale())
            self._optimizer.zero_grad()
            found = divergence(self._model, self._original, self._architecture, batch)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * self._share_of_rate()
        self._optimizer.step()
        self.done += 1
        # Single steps are noisy; their mean over the second half is less so.
        if (counted := self.done - self._steps // 2) > 0:
            for mean, value in zip(self._mean, self._learned, strict=True):
                mean.lerp_(value.detach(), 1 / counted)
        return found

    def result(self) -> dict[str, Tensor]:
        """After the last step: what replaces tensors of the checkpoint; the model has it too."""
        tensors = {}
        for mean, value in zip(self._mean, self._learned, strict=True):
            value.data.copy_(mean)
        for name, weight in self._weights.items():
            scale = weight.scale().detach().clamp(max=LARGEST_SCALE).half()
            tensors[f"{name}.{WEIGHT_SCALE}"] = scale
            weight.apply(scale)
        for name, gain in self._gains.items():
            tensors[name] = gain.detach().to(self._stored[name].dtype)
            gain.requires_grad_(False).copy_(tensors[name])
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        kept = {"done": torch.tensor(self.done)}
        for number, (value, mean) in enumerate(zip(self._learned, self._mean, strict=True)):
            kept |= {f"{number}.value": value.detach(), f"{number}.mean": mean}
            for key, part in self._optimizer.state.get(value, {}).items():
                kept[f"{number}.adam.{key}"] = part
        return kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of the same run."""
        self.done = int(state["done"])
        for number, (value, mean) in enumerate(zip(self._learned, self._mean, strict=True)):
            value.data.copy_(state[f"{number}.value"])
            mean.copy_(state[f"{number}.mean"])
            prefix = f"{number}.adam."
            self._optimizer.state[value] = {
                # Adam counts its steps on the CPU.
                key.removeprefix(prefix): part.to(value.device) if part.ndim else part
                for key, part in state.items()
                if key.startswith(prefix)
            }

    def _share_of_rate(self) -> float:
        """Up in a line, down along a cosine."""
        warm = min(1.0, (self.done + 1) / WARM_UP)
        return warm * 0.5 * (1 + math.cos(math.pi * self.done / self._steps))


def divergence(
    model: PreTrainedModel, original: PreTrainedModel, architecture: Architecture, batch: Tensor
) -> float:
    """Mean KL(original || model) of a batch, [B, T]; with gradients on, leaves them behind."""
    batch = batch.to(model.device)
    with torch.no_grad():
        wanted = original.get_decoder()(batch, use_cache=False)[0].flatten(0, 1)
    hidden = model.get_decoder()(batch, use_cache=False)[0]
    # Piece by piece from the last hidden state on, so that no logits of the whole batch are held.
    last = hidden.detach().flatten(0, 1).requires_grad_(torch.is_grad_enabled())
    total = 0.0
    for start in range(0, len(last), PIECE):
        piece = slice(start, start + PIECE)
        with torch.no_grad():
            p = _log_probabilities(original, architecture, wanted[piece])
        q = _log_probabilities(model, architecture, last[piece])
        found = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        if found.requires_grad:
            found.backward()
        total += found.item()
    if last.grad is not None:
        hidden.backward(last.grad.view_as(hidden) / batch.numel())
    return total / batch.numel()


def _log_probabilities(
    model: PreTrainedModel, architecture: Architecture, hidden: Tensor
) -> Tensor:
    """[N, vocabulary] of last hidden states, [N, n]."""
    logits = model.get_submodule(architecture.head)(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return logits.float().log_softmax(-1)


def _weights(
    model: PreTrainedModel, architecture: Architecture, tensors: dict[str, Tensor]
) -> dict[str, _Weight]:
    """Of all quantized linears of the blocks, by their names in the checkpoint."""
    found = {}
    for index, layer in enumerate(layers_of(model, architecture)):
        for site in architecture.sites:
            for path in site.modules:
                name = architecture.stored(f"{architecture.layers}.{index}.{path}")
                linear: OffQLinear = layer.get_submodule(path)  # type: ignore[assignment]
                device = linear.weight.device
                start = tensors[f"{name}.{WEIGHT_SCALE}"].float().to(device)
                found[name] = _Weight(
                    linear,
                    unpack_int4(tensors[f"{name}.{WEIGHT_PACKED}"]).to(device),
                    start,
                    torch.zeros_like(start, requires_grad=True),
                )
    return found


def _gains(model: PreTrainedModel, architecture: Architecture) -> dict[str, nn.Parameter]:
    """The weights of all norms by name."""
    names = [
        f"{architecture.layers}.{index}.{norm}"
        for index in range(len(layers_of(model, architecture)))
        for norm in architecture.layout.norms
    ]
    norms = (*names, architecture.final_norm)
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in norms}
