"""Weights that make up for what quantization did to their inputs (GPTAQ, arXiv 2504.02692)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Correction:
    """How the quantized model's inputs X_q differ from the original's inputs X of a linear."""

    cross: Tensor
    """[K, K] float32, ``(X - X_q)^T X_q`` over the calibration tokens."""
    inputs: Tensor
    """[t, K] float32, X of tokens that are in no moment."""
    quantized_inputs: Tensor
    """[t, K] float32, X_q of the same."""

    def apply(self, weight: Tensor, inverse_factor: Tensor, order: Tensor | None = None) -> Tensor:
        """The real-valued weight that reproduces the original's output from quantized inputs.

        Asymmetric calibration minimises ``||X_q W'^T - X W^T||^2``. With ``H = X_q^T X_q`` that
        is, up to a constant, ``tr((W' - W*) H (W' - W*)^T)`` for ``W* = W + W C H^-1``, C the
        cross moment: plain GPTQ of W*. The shift from W to W* is an estimate, noisy where tokens
        are few for the channels, so it is shortened to the length that the tokens kept aside
        find best: without that it may do more harm than good.

        weight: [N, K] float32; inverse_factor: [K, K] float64, R with ``R^T R = H^-1``, in an
        order of channels [K], None: the weight's.
        Returns: [N, K] float32.
        """
        product = weight.double() @ self.cross.double()
        if order is not None:
            product = product[:, order]
        shift = (product @ inverse_factor.T @ inverse_factor).float()
        if order is not None:
            shift = torch.empty_like(shift).index_copy_(1, order, shift)
        found = self.quantized_inputs @ shift.T
        wanted = (self.inputs - self.quantized_inputs) @ weight.T
        energy = found.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        length = ((found * wanted).sum() / energy).clamp(0, 1)
        return weight + length * shift
