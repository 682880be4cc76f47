"""What rounding the weights of a site needs to know of its input."""

import torch
from torch import Tensor

from calibration.correction import Correction
from vllm_offq.format import SiteConfig
from vllm_offq.quantizer import fake_quantize

SNR_TOKENS = 512
"""Tokens of a batch that the signal-to-noise ratio is measured on."""
LEAST_ASIDE, MOST_ASIDE = 8, 2048
"""One token in so many is kept out of the moments, and no more than so many, to test them."""
COLUMNS_AT_ONCE = 512
"""Of a Hessian: only its upper half is computed."""


class SiteMoments:
    """Second moments of a site's input and what else is told of it, batch by batch.

    X [t, K] is what the original's linears get, X_q what the quantized model's get.

    width: K; grid: of the input; num_tokens: to come; corrects: collect for `correction` too;
    device: of what is added.
    """

    def __init__(
        self,
        width: int,
        grid: SiteConfig,
        num_tokens: int,
        corrects: bool,
        device: torch.device | None = None,
    ) -> None:
        self.grid = grid
        self.hessian = torch.zeros(width, width, device=device)
        """X_q^T X_q; the upper half until `finish`."""
        self._cross = torch.zeros_like(self.hessian) if corrects else None
        self._aside = max(LEAST_ASIDE, num_tokens // MOST_ASIDE)
        self._kept_aside: list[tuple[Tensor, Tensor]] = []
        self.signal = self.noise = 0.0
        """Energy of X, and of what the grid makes of it less X, on a sample."""

    def add(self, x: Tensor, quantized: Tensor) -> None:
        """Count a batch of both, [..., K] float32."""
        x, quantized = x.flatten(0, -2), quantized.flatten(0, -2)
        grid, sample = self.grid, x[:: max(1, len(x) // SNR_TOKENS)]
        on_grid = fake_quantize(sample, grid.group_size, grid.clip_ratio, grid.symmetric, grid.bits)
        self.signal += float(sample.square().sum())
        self.noise += float((on_grid - sample).square().sum())
        if self._cross is not None:
            aside = torch.arange(len(x), device=x.device) % self._aside == 0
            self._kept_aside.append((x[aside], quantized[aside]))
            x, quantized = x[~aside], quantized[~aside]
        for start in range(0, len(self.hessian), COLUMNS_AT_ONCE):
            columns = quantized[:, start : start + COLUMNS_AT_ONCE]
            self.hessian[start : start + COLUMNS_AT_ONCE, start:].addmm_(
                columns.T, quantized[:, start:]
            )
        if self._cross is not None:
            self._cross.addmm_((x - quantized).T, quantized)

    def finish(self) -> None:
        """All tokens were counted."""
        self.hessian = self.hessian.triu() + self.hessian.triu(1).T

    @property
    def correction(self) -> Correction | None:
        """Of the difference between X and X_q, where it was asked for."""
        if self._cross is None:
            return None
        inputs, quantized_inputs = map(torch.cat, zip(*self._kept_aside, strict=True))
        return Correction(self._cross, inputs, quantized_inputs)
