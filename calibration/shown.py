"""The activations that the report shows: of one site, in the block in the middle."""

from typing import Any

from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.architectures.base import SiteName
from calibration.report.collect import ActivationHistograms
from calibration.rotations import Rotations
from calibration.statistics import invertible
from vllm_offq.format import CheckpointConfig

SHOWN_SITE: SiteName = "attention_input"


class ShownActivations:
    """Histograms of a block's SHOWN_SITE, as the model has it and rotated.

    layer: the block, whose norm has the original's gain until `rotations` are fused into it.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        architecture: Architecture,
        config: CheckpointConfig,
        rotations: Rotations,
    ) -> None:
        grid = config.sites[SHOWN_SITE]
        self._histograms = ActivationHistograms(
            f"{architecture.layers}.{index}",
            SHOWN_SITE,
            grid.group_size,
            grid.clip_ratio,
            grid.symmetric,
        )
        self._rotations = rotations
        self._norm: nn.Module | None = None
        if architecture.attention_norm is not None:
            self._norm = layer.get_submodule(architecture.attention_norm)
            self._offset = architecture.gain_offset
            gain = self._norm.get_parameter("weight") + self._offset
            order = rotations.residual_order
            self._gain = gain.clone() if order is None else gain[order]

    def add(self, x: Tensor) -> None:
        """Count a batch of what the fused block's linears see, [..., n]."""
        original = self._rotations.undo_residual(x)
        if self._norm is not None:  # what it is left with, see calibration.fuse
            kept = self._norm.get_parameter("weight") + self._offset
            original = original * (self._gain / invertible(kept))
        self._histograms.add_original(original)
        self._histograms.add_rotated(x)

    def result(self) -> dict[str, Any] | None:
        """For the record; None where nothing was added."""
        found = self._histograms.result()
        return None if found is None else found.model_dump()
