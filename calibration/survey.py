"""One pass over the original, and the rotations that follow from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.basis import residual_candidates, try_candidates
from calibration.clipping import choose_clip_ratios
from calibration.loader import Original
from calibration.progress import Progress
from calibration.report import BasisCandidate, Spectrum
from calibration.report.collect import spectrum
from calibration.resume import SavedPass, SavedRun
from calibration.rotations import Rotations, compute_rotations
from calibration.settings import Settings
from calibration.statistics import collect
from vllm_offq.format import CheckpointConfig

PASSES = MEASURED, TRIED, CLIPPED = "measured", "tried", "clipped"
"""Names under which an interrupted survey keeps what it has found."""


@dataclass
class Survey:
    """What was found."""

    rotations: Rotations
    spectrum: Spectrum | None
    """None where no rotation is fused that would follow it."""
    basis_candidates: list[BasisCandidate] | None
    """None where there was nothing to choose."""
    clip_ratios: dict[str, float] | None
    """None where they were given."""


@torch.no_grad()
def survey(
    original: Original,
    tokens: Tensor,
    batch_size: int,
    config: CheckpointConfig,
    settings: Settings,
    progress: Progress,
    saved: SavedRun | None = None,
) -> Survey:
    """Measure the activations of an instrumented original on tokens [S, T], and rotate by them.

    saved: what each pass has found so far is kept there, and gone on from.
    Raises: UserError naming the layer where an activation is not finite.
    """
    with progress("measuring activations", original.num_layers, unit="layer") as advance:
        statistics = collect(original, tokens, batch_size, advance, SavedPass(saved, MEASURED))
    with progress("finding rotations", 1):
        rotations = compute_rotations(statistics, config, settings)
    grid, found, tried, clip_ratios = config.sites["attention_input"], None, None, None
    if grid.fused_rotation == "principal":
        found = spectrum(_smaller_square(statistics.top_tokens), "top-1")
        candidates = residual_candidates(statistics, grid.group_size)
        chosen: str = settings.basis
        if chosen == "auto":
            with progress("choosing a basis", original.num_layers, unit="layer") as advance:
                kept = SavedPass(saved, TRIED)
                tried = try_candidates(original, grid, candidates, tokens, advance, kept)
            chosen = next(one.name for one in tried if one.chosen)
        rotations.residual = candidates[chosen]
    if settings.clip_ratio == "auto":
        with progress("choosing clip ratios", original.num_layers, unit="layer") as advance:
            there = rotations.to(original.device)
            kept = SavedPass(saved, CLIPPED)
            clip_ratios = choose_clip_ratios(original, there, config, tokens, advance, kept)
    return Survey(rotations, found, tried, clip_ratios)


def _smaller_square(x: Tensor) -> Tensor:
    """Of x x^T and x^T x, which have the same eigenvalues but for zeros. x: [t, n]."""
    return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
