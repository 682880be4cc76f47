"""The report of a calibration run, format version 1."""

import math
from datetime import UTC
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from vllm_offq.format import KEY_ROTATION, WEIGHT_PACKED, WEIGHT_SCALE
from vllm_offq.wrappers import is_rest

FORMAT_VERSION: Final = 1

Name = Annotated[str, StringConstraints(min_length=1)]
SizeKind = Literal[
    "embedding",
    "head",
    "quantized weights",
    "weight scales",
    "key rotations",
    "norms",
    "image encoder",
    "other",
]
Stage = Literal["original", "rotated", "offset removed"]


class _Strict(BaseModel):
    # A NaN would be no JSON, and a picture of it a lie: the run is what has to be mended.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Spectrum(_Strict):
    """How the energy of the residual stream spreads over its principal directions."""

    basis: Name
    """Tokens that were counted: "top-1" or "all"."""
    fractions: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    """Leading eigenvalues of the uncentred second moment over the sum of all, falling."""

    @field_validator("fractions")
    @classmethod
    def _fall(cls, fractions: list[float]) -> list[float]:
        if any(left < right for left, right in pairwise(fractions)):
            raise ValueError("fractions must fall")
        if sum(fractions) > 1 + 1e-6:
            raise ValueError("fractions of one whole exceed it")
        return fractions


class Histogram(_Strict):
    """How often activations of each size occur."""

    stage: Stage
    bin_edges: Annotated[list[float], Field(min_length=2)]
    """Rising, one more than counts."""
    counts: Annotated[list[NonNegativeInt], Field(min_length=1)]
    max_magnitude: NonNegativeFloat
    rms: NonNegativeFloat
    """Root of the mean square."""
    kurtosis: NonNegativeFloat
    """Mean fourth power over the squared mean square: 3 for a normal distribution."""

    @model_validator(mode="after")
    def _edges_fit(self) -> "Histogram":
        if len(self.bin_edges) != len(self.counts) + 1:
            raise ValueError("bin_edges must be one more than counts")
        if any(left >= right for left, right in pairwise(self.bin_edges)):
            raise ValueError("bin_edges must rise")
        return self

    @property
    def peak_to_rms(self) -> float:
        """Largest magnitude over the rms; 0 where all values are 0."""
        return self.max_magnitude / self.rms if self.rms else 0.0


class Histograms(_Strict):
    """Activations of one place as quantization prepares them."""

    layer: Name
    """Full name, as in the checkpoint (model.layers.3)."""
    site: Name
    stages: Annotated[list[Histogram], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _differ(cls, stages: list[Histogram]) -> list[Histogram]:
        if len({histogram.stage for histogram in stages}) < len(stages):
            raise ValueError("every stage may occur once")
        return stages


class BasisCandidate(_Strict):
    """One basis of the residual rotation that was tried."""

    name: Name
    mean_error: NonNegativeFloat
    """Relative squared error of the quantized activations, mean over layers."""
    worst_error: NonNegativeFloat
    divergence: NonNegativeFloat
    """KL divergence of the predictions when these activations alone are quantized."""
    chosen: bool


class Refinement(_Strict):
    """What learning scales and gains brought, on sequences that were held aside."""

    steps: NonNegativeInt
    before: NonNegativeFloat
    """Mean KL divergence of the quantized model's predictions from the original's, nats."""
    after: NonNegativeFloat
    used: bool
    """False where the divergence did not fall, so the checkpoint stayed as it was."""


class Report(_Strict):
    """What a run was asked, did, and lost. Bytes, seconds, dB; errors are relative squares."""

    format_version: Literal[1] = FORMAT_VERSION
    model: Name
    architecture: Name
    produced_by: Name
    settings: dict[Name, JsonValue]
    """`asdict(Settings)`."""
    started: AwareDatetime
    """Kept in UTC."""
    seconds: NonNegativeFloat
    seconds_by_stage: dict[Name, NonNegativeFloat]
    """In the order in which they ran."""
    original_bytes: NonNegativeInt
    checkpoint_bytes: NonNegativeInt
    sizes: dict[SizeKind, NonNegativeInt]
    signal_to_noise: dict[Name, list[float]]
    """Of each site's quantized input, dB, a value a layer."""
    output_error: dict[Name, NonNegativeFloat]
    """Of each linear by full name: squared error of its output by rounding weights, relative."""
    spectrum: Spectrum | None = None
    """None: the residual stream has no fused rotation."""
    histograms: Histograms | None = None
    expert_counts: dict[Name, list[NonNegativeInt]] | None = None
    """Of each layer by full name: calibration tokens that its router sent to each expert."""
    basis_candidates: list[BasisCandidate] | None = None
    refinement: Refinement | None = None
    """None: not asked for."""
    clip_ratios: dict[Name, Annotated[float, Field(gt=0, le=1)]] | None = None
    """Of each site."""

    @field_validator("started")
    @classmethod
    def _utc(cls, started: AwareDatetime) -> AwareDatetime:
        return started.astimezone(UTC)

    @field_validator("settings")
    @classmethod
    def _finite(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key, value in settings.items():
            if not _is_finite(value):
                raise ValueError(f"{key} holds a number that is not finite")
        return settings

    @field_validator("basis_candidates")
    @classmethod
    def _one_chosen(cls, candidates: list[BasisCandidate] | None) -> list[BasisCandidate] | None:
        if candidates is not None and sum(candidate.chosen for candidate in candidates) != 1:
            raise ValueError("exactly one basis must be the chosen one")
        return candidates


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def size_kind(tensor: str) -> SizeKind:
    """What a checkpoint's tensor counts as, by its name, for `Report.sizes`."""
    last = tensor.rpartition(".")[2]
    if is_rest(tensor):
        return "image encoder"
    if "lm_head" in tensor:
        return "head"
    if "embed_tokens" in tensor:
        return "embedding"
    kinds: dict[str, SizeKind] = {
        WEIGHT_PACKED: "quantized weights",
        WEIGHT_SCALE: "weight scales",
        KEY_ROTATION: "key rotations",
    }
    return kinds.get(last, "norms" if "norm" in tensor else "other")
