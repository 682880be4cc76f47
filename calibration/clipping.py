"""How far the range of activations is clipped, by what that does to the outputs of linears."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from calibration.basis import TRIAL_LENGTH, TRIAL_SEQUENCES
from calibration.fuse import fuse_block, fuse_embedding
from calibration.instrument import OffQLinear, block_inputs
from calibration.loader import Original
from calibration.resume import NOT_SAVED, SavedPass
from calibration.rotations import Rotations
from vllm_offq.format import CheckpointConfig, SiteConfig
from vllm_offq.quantizer import fake_quantize

CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85)


@torch.no_grad()
def choose_clip_ratios(
    original: Original,
    rotations: Rotations,
    config: CheckpointConfig,
    tokens: Tensor,
    advance: Callable[..., None],
    kept: SavedPass = NOT_SAVED,
) -> dict[str, float]:
    """The ratio of each site whose error of the linears' outputs is least.

    Errors are relative to a linear's output, and summed over the blocks. The model is the
    instrumented original; its rotations stay set. tokens: [S, T]. `advance` is called after each
    block. kept: what to go on from.
    """
    model, architecture = original.model, original.architecture
    errors: dict[str, Tensor] = {
        site.name: torch.zeros(len(CLIP_RATIOS)) for site in architecture.sites
    }
    with original.loaded(architecture.embedding, architecture.final_norm) as (embedding, _):
        fuse_embedding(embedding, rotations)
        stream = block_inputs(model, architecture, tokens[:TRIAL_SEQUENCES, :TRIAL_LENGTH], 1)
    done, found = kept.load()
    if done:
        stream.restore("hidden", found)
        errors = {name: found[name] for name in errors}
        found.clear()
        advance(done)
    for index in range(done, original.num_layers):
        with original.block(index) as layer:
            fuse_block(layer, index, model.config, architecture, rotations)
            observed: list[OffQLinear] = []
            for site in architecture.sites:
                for group in site.groups:
                    linears: list[OffQLinear] = [layer.get_submodule(path) for path in group]  # type: ignore[misc]
                    grid = config.sites[site.name]
                    linears[0].observe = partial(_add_errors, errors[site.name], linears, grid)
                    observed.append(linears[0])
            stream.advance(index, layer)
            for linear in observed:
                linear.observe = None
        advance()
        kept.done(index + 1, lambda: errors | stream.tensors("hidden"))
    return {name: CLIP_RATIOS[int(found.argmin())] for name, found in errors.items()}


def _add_errors(errors: Tensor, linears: list[OffQLinear], grid: SiteConfig, x: Tensor) -> None:
    """Add to errors, of each ratio. linears: all that read x, [..., K]."""

    def energy_of(inputs: Tensor) -> float:
        return sum(float((inputs @ linear.weight.T).square().sum()) for linear in linears)

    energy = energy_of(x)
    if energy == 0:  # an expert without tokens
        return
    for number, ratio in enumerate(CLIP_RATIOS):
        on_grid = fake_quantize(x, grid.group_size, ratio, grid.symmetric, grid.bits)
        errors[number] += energy_of(on_grid - x) / energy


def clipped(config: CheckpointConfig, clip_ratios: dict[str, float]) -> CheckpointConfig:
    """The configuration with these ratios."""
    sites = {
        name: site.model_copy(update={"clip_ratio": clip_ratios[name]})
        for name, site in config.sites.items()
    }
    return config.model_copy(update={"sites": sites})
