"""Which basis the residual stream is rotated to: candidates, tried on calibration tokens."""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calibration.instrument import BlockInputs, block_inputs, to_device
from calibration.loader import Original
from calibration.report import BasisCandidate
from calibration.resume import NOT_SAVED, SavedPass
from calibration.statistics import Statistics, invertible
from vllm_offq.format import SiteConfig
from vllm_offq.quantizer import fake_quantize
from vllm_offq.rotation import group_rotation, principal_basis

SINK_DIRECTIONS = 2
"""Leading directions of the first tokens that get a group of their own."""
TRIAL_SEQUENCES, TRIAL_LENGTH = 8, 512


def residual_candidates(statistics: Statistics, group_size: int) -> dict[str, Tensor]:
    """Rotations of the residual stream by name, [n, n] float64 each.

    top-1: the paper's, directions of each sequence's largest token. all: directions of all
    tokens. sink: the first tokens' leading directions, then those of all others; the first token
    of a sequence is what attention falls back on, and every later token suffers from its noise.
    permutation: channels by their energy.
    """
    n = len(statistics.residual)
    no_tokens, everything = (
        statistics.residual.new_zeros(0, n),
        statistics.residual + statistics.first,
    )
    sinks = torch.linalg.eigh(statistics.first)[1].flip(1)[:, :SINK_DIRECTIONS].T
    by_energy = statistics.residual.diagonal().argsort(descending=True, stable=True)
    bases = {
        "top-1": principal_basis(statistics.top_tokens, everything),
        "all": principal_basis(no_tokens, everything),
        "sink": principal_basis(sinks, statistics.residual),
        "permutation": torch.eye(n, dtype=torch.float64)[:, by_energy],
    }
    return {name: group_rotation(basis, group_size) for name, basis in bases.items()}


class _Requantizer:
    """A hook that puts the input of a site's linears on the grid in rotated space."""

    def __init__(self, gain: Tensor, rotation: Tensor, grid: SiteConfig) -> None:
        self.gain, self.rotation, self.grid = gain, rotation, grid
        self.noise = self.signal = 0.0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        if self._last is None or self._last[0] is not x:  # most linears of a site share theirs
            self._last = x, self._requantize(x)
        return self._last[1]

    def _requantize(self, x: Tensor) -> Tensor:
        rotated = (x / invertible(self.gain)) @ self.rotation
        grid = self.grid
        on_grid = fake_quantize(
            rotated, grid.group_size, grid.clip_ratio, grid.symmetric, grid.bits
        )
        self.noise += float((on_grid - rotated).square().sum())
        self.signal += float(rotated.square().sum())
        return on_grid @ self.rotation.T * self.gain


@dataclass
class _Trial:
    """One candidate on its way through the blocks."""

    rotation: Tensor
    stream: BlockInputs
    errors: list[float] = field(default_factory=list)
    """Of each layer input: squared error over energy."""
    divergence: float = 0.0

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For a file."""
        errors = torch.tensor(self.errors, dtype=torch.float64)
        return self.stream.tensors(name) | {f"{name}.errors": errors}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Inverse of tensors."""
        self.stream.restore(name, tensors)
        self.errors = tensors[f"{name}.errors"].tolist()

    def advance(self, original: Original, index: int, layer: nn.Module, grid: SiteConfig) -> None:
        """Take the tokens through a block whose residual inputs are on the grid."""
        hooks, requantizers = [], []
        for site in original.architecture.sites:
            if not site.reads_residual or site.norm is None:
                continue
            weight: Tensor = layer.get_submodule(site.norm).weight  # type: ignore[assignment]
            gain = weight + original.architecture.gain_offset
            requantizers.append(_Requantizer(gain, self.rotation, grid))
            for path in site.modules:
                module = layer.get_submodule(path)
                hooks.append(module.register_forward_pre_hook(requantizers[-1]))
        self.stream.advance(index, layer)
        for hook in hooks:
            hook.remove()
        self.errors += [site.noise / max(site.signal, 1e-30) for site in requantizers]


@torch.no_grad()
def try_candidates(
    original: Original,
    grid: SiteConfig,
    candidates: dict[str, Tensor],
    tokens: Tensor,
    advance: Callable[..., None],
    kept: SavedPass = NOT_SAVED,
) -> list[BasisCandidate]:
    """Quantize only what reads the residual stream, and see how far the predictions move.

    The model is the instrumented original: its inputs are rotated, quantized and rotated back.
    tokens: [S, T]. `advance` is called after each block. kept: what to go on from.
    Returns: all candidates; the one of least KL divergence is the chosen one.
    """
    model, architecture = original.model, original.architecture
    tokens = tokens[:TRIAL_SEQUENCES, :TRIAL_LENGTH]
    with original.loaded(architecture.embedding, architecture.final_norm):
        reference = block_inputs(model, architecture, tokens, 1)
    trials = {
        name: _Trial(
            rotation.float().to(original.device),
            BlockInputs(list(reference.hidden), reference.arguments),
        )
        for name, rotation in candidates.items()
    }
    done, found = kept.load()
    if done:
        reference.restore("reference", found)
        for name, trial in trials.items():
            trial.restore(name, found)
        found.clear()
        advance(done)

    def so_far() -> dict[str, Tensor]:
        parts = [trial.tensors(name) for name, trial in trials.items()]
        return dict(ChainMap(reference.tensors("reference"), *parts))

    for index in range(done, original.num_layers):
        with original.block(index) as layer:
            for trial in trials.values():
                trial.advance(original, index, layer, grid)
            reference.advance(index, layer)
        advance()
        kept.done(index + 1, so_far)
    with original.loaded(architecture.final_norm, architecture.head) as (norm, head):
        for number, hidden in enumerate(reference.hidden):
            expected = head(norm(to_device(hidden, norm))).log_softmax(-1)
            for trial in trials.values():
                found = head(norm(to_device(trial.stream.hidden[number], norm))).log_softmax(-1)
                divergence = (expected.exp() * (expected - found)).sum(-1).mean()
                trial.divergence += float(divergence) / len(reference.hidden)
    best = min(trials, key=lambda name: trials[name].divergence)
    return [
        BasisCandidate(
            name=name,
            mean_error=sum(trial.errors) / len(trial.errors),
            worst_error=max(trial.errors),
            divergence=max(trial.divergence, 0.0),
            chosen=name == best,
        )
        for name, trial in trials.items()
    ]
