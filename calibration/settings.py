"""What a calibration run is asked to do, and the recipes it can follow."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from calibration.data_sources import SELF, shares
from vllm_offq.errors import UserError

RecipeName = Literal["offq", "quarot", "rtn"]
Rounding = Literal["gptq", "rtn"]
Basis = Literal["auto", "top-1", "all", "sink", "permutation"]
ActivationBits = Literal["4", "8"]
KVBits = Literal["4", "16"]
HeadBits = Literal["4", "8", "16"]
EmbeddingBits = Literal["4", "8", "16"]
HeadBasis = Literal["principal", "hadamard"]
GPTQInputs = Literal["original", "quantized", "corrected"]
GPTQOrder = Literal["channels", "activation"]
DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
CHOICES: dict[str, tuple[str | None, ...]] = {
    "recipe": get_args(RecipeName),
    "weights": (None, *get_args(Rounding)),
    "basis": get_args(Basis),
    "head_basis": get_args(HeadBasis),
    "gptq_inputs": get_args(GPTQInputs),
    "gptq_order": get_args(GPTQOrder),
    "activation_bits": get_args(ActivationBits),
    "kv_bits": get_args(KVBits),
    "head_bits": get_args(HeadBits),
    "embedding_bits": get_args(EmbeddingBits),
    "dtype": get_args(DTypeName),
}
"""What settings of few values may be."""
GPTQ_ONLY = ("gptq_inputs", "gptq_order", "refits")
"""Settings that rounding to nearest does not read."""


@dataclass(frozen=True)
class Recipe:
    """How rotations are made and activations rounded."""

    rotation: Literal["principal", "hadamard", "none"]
    grouped: bool
    """A grid per group of channels; otherwise one per token."""
    symmetric: bool
    clip_ratio: float


RECIPES: dict[RecipeName, Recipe] = {
    "offq": Recipe(rotation="principal", grouped=True, symmetric=False, clip_ratio=0.95),
    "quarot": Recipe(rotation="hadamard", grouped=False, symmetric=True, clip_ratio=0.9),
    "rtn": Recipe(rotation="none", grouped=False, symmetric=True, clip_ratio=1.0),
}
"""offq: arXiv 2606.07116, this project's method; quarot: arXiv 2404.00456, the peer to compare
with; rtn: no rotation."""


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of a checkpoint besides the model and the calibration text."""

    recipe: RecipeName = "offq"
    weights: Rounding | None = None
    """None: gptq, but rtn for the recipe rtn."""
    group_size: int | None = None
    """Of activations; None: 128 where it divides, else 64."""
    weight_group_size: int | None = None
    """Of weight scales, one or several groups of activations; None: one per output channel."""
    basis: Basis = "auto"
    """Of the residual stream; auto: the best of all on calibration tokens."""
    head_basis: HeadBasis = "principal"
    """What keys and values of each head are rotated by."""
    clip_ratio: float | Literal["auto"] | None = None
    """Of activations; None: the recipe's, but 1 for 8 bits; auto: each site's best."""
    gptq_inputs: GPTQInputs = "original"
    """What errors are minimised on: the original's inputs; those that come through the layers
    quantized before; or these, with weights that make up for the difference (GPTAQ)."""
    gptq_order: GPTQOrder = "channels"
    """In which channels are rounded: as they are, or those of most energy first."""
    refits: int = 1
    """Rounds that fit scales to codes and codes to each other after GPTQ."""
    refine: int = 0
    """Steps of learning scales and norm gains from the original's predictions, in the end."""
    activation_bits: ActivationBits = "4"
    kv_bits: KVBits = "4"
    head_bits: HeadBits = "8"
    """Of the output head's weights; its input has 8 where they have fewer than 16."""
    embedding_bits: EmbeddingBits = "16"
    calibration: tuple[str, ...] = (SELF,)
    """Values of --calibration, SOURCE or SOURCE=WEIGHT."""
    samples: int = 32
    sequence_length: int = 512
    seed: int = 0
    dtype: DTypeName = "auto"
    """Of what stays unquantized; auto: the original's, but bfloat16 for a float32 original."""

    def __post_init__(self) -> None:
        for name, possible in CHOICES.items():
            if (given := getattr(self, name)) not in possible:
                known = ", ".join(filter(None, possible))
                raise UserError(f"{_option(name)} {given!r} is unknown; choose from {known}")
        if self.samples < 1 or self.sequence_length < 2:
            raise UserError("--samples must be at least 1 and --sequence-length at least 2")
        self._refuse_groups("--group-size", self.group_size)
        self._refuse_groups("--weight-group-size", self.weight_group_size)
        if self.rounding == "rtn":
            self._refuse_unused("weights that are rounded to nearest", *GPTQ_ONLY)
        if RECIPES[self.recipe].rotation != "principal":
            self._refuse_unused(f"the recipe {self.recipe}", "basis", "head_basis")
        if not 0 <= self.seed < 2**64:  # what torch takes, and the datasets library
            raise UserError(f"--seed must be from 0 to 2^64 - 1, not {self.seed}")
        if isinstance(self.calibration, str):  # or its letters would be the sources
            raise UserError(f"calibration is a tuple of sources; give ({self.calibration!r},)")
        ratio = self.clip_ratio
        if ratio not in (None, "auto") and not (isinstance(ratio, float | int) and 0 < ratio <= 1):
            raise UserError("--clip-ratio must be above 0 and at most 1, or auto")
        if self.refits < 0 or self.refine < 0:
            raise UserError("--refits and --refine must not be negative")
        if self.refine and self.samples < 2:
            raise UserError("--refine holds sequences aside, so --samples must be at least 2")
        shares(self.calibration, self.samples)  # refuses before a large model is read

    def _refuse_unused(self, what: str, *names: str) -> None:
        """Raises: UserError for one of these settings that is neither its default nor off."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value not in (field.default, 0):
                raise UserError(
                    f"{_option(field.name)} {value} does nothing for {what}; leave it out"
                )

    def _refuse_groups(self, option: str, size: int | None) -> None:
        if size is None:
            return
        if size < 1:
            raise UserError(f"{option} must be positive, not {size}; leave it out for the default")
        if not RECIPES[self.recipe].grouped:
            raise UserError(
                f"{option} does nothing for the recipe {self.recipe}, which has one scale for a "
                "whole token; leave it out"
            )

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded: gptq or rtn."""
        return self.weights or ("rtn" if self.recipe == "rtn" else "gptq")

    def sha256(self) -> str:
        """Digest of the settings as canonical JSON (sorted keys, no spaces)."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
