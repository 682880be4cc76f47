"""What the pipeline feeds with tensors to make the parts of a report."""

import math
from typing import get_args

import torch
from torch import Tensor

from calibration.report.schema import Histogram, Histograms, Spectrum, Stage
from vllm_offq.quantizer import group_range

NUM_BINS = 512
"""Over [-2^e, 2^e): a multiple of 4, so that twice the range merges pairs of bins exactly."""
LEAST_EXPONENT = -126
MAX_DIRECTIONS = 64


def spectrum(energy: Tensor, basis: str) -> Spectrum | None:
    """The leading principal directions' shares of the energy.

    energy: [n] eigenvalues in any order, or the uncentred second moment [n, n] that has them.
    Of t < n tokens X the product ``X @ X.T`` [t, t] has the same ones and is smaller.
    basis: which tokens, "top-1" or "all". Returns: None where there is no energy at all.
    """
    energy = energy.double()
    eigenvalues = torch.linalg.eigvalsh(energy) if energy.ndim == 2 else energy
    # Rounding makes the eigenvalues of a null space negative.
    falling = eigenvalues.clamp_min(0).sort(descending=True).values
    total = falling.sum()
    if total == 0:
        return None
    return Spectrum(basis=basis, fractions=(falling[:MAX_DIRECTIONS] / total).tolist())


class ActivationHistograms:
    """Counts the activations of one place: original, rotated, and without its groups' offsets.

    Memory does not grow with what is added, and the order of batches does not matter.

    layer: full name; site: as the configuration names it; group_size, clip_ratio, symmetric:
    of the site's grid. A symmetric grid has no offset, so nothing is counted without it.
    """

    def __init__(
        self,
        layer: str,
        site: str,
        group_size: int,
        clip_ratio: float = 1.0,
        symmetric: bool = False,
    ) -> None:
        self.layer, self.site = layer, site
        self._grid = (group_size, clip_ratio, symmetric)
        self._tallies: dict[Stage, _Tally] = {}

    def add_original(self, x: Tensor) -> None:
        """Count a batch of the unrotated input. x: [..., n]; what is not finite is left out."""
        self._tally("original").add(x)

    def add_rotated(self, x: Tensor) -> None:
        """Count a batch of the quantizer's input, with its offsets and without. x: [..., n]."""
        self._tally("rotated").add(x)
        group_size, clip_ratio, symmetric = self._grid
        if symmetric:
            return
        _, offset = group_range(x, group_size, clip_ratio)
        groups = x.float().unflatten(-1, (-1, group_size))
        self._tally("offset removed").add(groups - offset.unsqueeze(-1))

    def result(self) -> Histograms | None:
        """The histograms of the stages that were fed, in order; None where none was."""
        stages = [
            self._tallies[stage].histogram(stage)
            for stage in get_args(Stage)
            if stage in self._tallies and self._tallies[stage].total
        ]
        if not stages:
            return None
        return Histograms(layer=self.layer, site=self.site, stages=stages)

    def _tally(self, stage: Stage) -> "_Tally":
        return self._tallies.setdefault(stage, _Tally())


class _Tally:
    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent = LEAST_EXPONENT
        self.total = 0
        self.largest = self.square = self.fourth = 0.0

    def add(self, x: Tensor) -> None:
        values = x[x.isfinite()].double()
        if not len(values):
            return
        self._widen(float(values.abs().max()))
        # A range by powers of two alone: the first batch does not decide where later ones fall.
        bins = ((values * 0.5**self.exponent + 1) * (NUM_BINS // 2)).floor().long()
        self.counts += torch.bincount(bins.clamp_(0, NUM_BINS - 1), minlength=NUM_BINS).cpu()
        squares = values.square()
        self.total += len(values)
        self.square += float(squares.sum())
        self.fourth += float(squares.square().sum())

    def _widen(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        needed = math.frexp(largest)[1] if largest else LEAST_EXPONENT  # largest < 2^needed
        while self.exponent < needed:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(merged, (NUM_BINS // 4, NUM_BINS // 4))
            self.exponent += 1

    def histogram(self, stage: Stage) -> Histogram:
        width = 2.0 ** (self.exponent + 1) / NUM_BINS
        mean_square = self.square / self.total
        return Histogram(
            stage=stage,
            bin_edges=[width * (i - NUM_BINS // 2) for i in range(NUM_BINS + 1)],
            counts=self.counts.tolist(),
            max_magnitude=self.largest,
            rms=math.sqrt(mean_square),
            kurtosis=self.fourth / self.total / mean_square**2 if mean_square**2 else 0.0,
        )
