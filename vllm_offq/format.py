"""The OffQ checkpoint, format version 1: configuration schema, tensor names, int4 packing.

Calibration writes by this module, the plugin reads by it; docs/format.md describes it.
"""

from typing import Annotated, Any, Final, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from vllm_offq.errors import UserError

QUANT_METHOD: Final = "offq"
FORMAT_VERSION: Final = 1

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

WEIGHT_PACKED = "weight_packed"
"""[out_features, in_features / 2] uint8, see pack_int4; of an 8-bit head twice that, pack_int8. Of
an embedding [vocabulary, width] int8, the codes as they are, or in 4 bits as of a linear."""
WEIGHT_SCALE = "weight_scale"
"""[out_features, 1], or [out_features, in_features / group_size], float16."""
HEAD_CODE_MAX: Final = 119
"""16 high + low reaches it with two 4-bit codes; every code of the head is at most that large."""
EMBEDDING_CODE_MAX: Final = 127
KEY_ROTATION = "key_rotation"
"""Of an attention layer: [num_kv_heads, head_size, head_size] float16, q and k after RoPE @ it."""

Name = Annotated[str, StringConstraints(min_length=1)]
ClipRatio = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightConfig(_Strict):
    """Symmetric codes of every quantized linear; group_size None: one scale per channel."""

    bits: Literal[4]
    group_size: PositiveInt | None


class SiteConfig(_Strict):
    """One place in a block whose linears share an input, hence its rotation and grid."""

    modules: Annotated[list[Name], Field(min_length=1)]
    """Last name components of its linears, as in the checkpoint (q_proj, ...)."""
    bits: Literal[4, 8]
    group_size: PositiveInt
    symmetric: bool
    clip_ratio: ClipRatio
    fused_rotation: Literal["none", "principal", "hadamard", "permutation"]
    """What the weights carry already: nothing to do at run time."""
    online_hadamard: PositiveInt | None
    """Block size of the Hadamard that the input is multiplied by at run time."""


class HeadConfig(_Strict):
    """The output head: its codes, and its input on an asymmetric grid of 8 bits.

    In 8 bits a row has one scale, in 4 bits it has one for each group of the input.
    """

    bits: Literal[4, 8]
    group_size: PositiveInt
    """Of the input."""

    @property
    def weight_group_size(self) -> int | None:
        """Channels that share a scale; None: all of a row."""
        return self.group_size if self.bits == 4 else None

    @property
    def site(self) -> SiteConfig:
        """Its input as one more site."""
        return SiteConfig(
            modules=["lm_head"],
            bits=8,
            group_size=self.group_size,
            symmetric=False,
            clip_ratio=1.0,
            fused_rotation="none",
            online_hadamard=None,
        )


class EmbeddingConfig(_Strict):
    """The token embedding: symmetric codes."""

    bits: Literal[4, 8]
    group_size: PositiveInt | None = None
    """Channels that share a scale; None: all of a row."""


class KVCacheConfig(_Strict):
    """Keys (after RoPE, rotated if key_rotation) and values: asymmetric, float16 scale, offset."""

    bits: Literal[4]
    group_size: PositiveInt
    key_rotation: bool


class CheckpointConfig(_Strict):
    """`quantization_config` in config.json."""

    quant_method: Literal["offq"]
    format_version: Literal[1]
    produced_by: Name
    """Not `producer`: vLLM reads that key as an object, as ModelOpt writes it."""
    settings_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the calibration settings, as canonical JSON."""
    recipe: Name
    weights: WeightConfig
    sites: Annotated[dict[Name, SiteConfig], Field(min_length=1)]
    head: HeadConfig | None
    """None: the head stays in 16 bit."""
    embedding: EmbeddingConfig | None = None
    """None: the embedding stays in 16 bit."""
    kv_cache: KVCacheConfig | None
    """None: the cache keeps vLLM's own format."""
    ignore: list[Name]
    """Linears left in 16 bit, by last name component, by full name or by that of a parent."""

    @field_validator("sites")
    @classmethod
    def _one_site_per_module(cls, sites: dict[str, SiteConfig]) -> dict[str, SiteConfig]:
        modules = [module for site in sites.values() for module in site.modules]
        for module in modules:
            if modules.count(module) > 1:
                raise ValueError(f"module {module} is listed in more than one place")
        return sites

    @model_validator(mode="after")
    def _sizes_fit(self) -> "CheckpointConfig":
        sizes = [site.group_size for site in self.sites.values()]
        if any(size % 2 for size in (*sizes, self.head.group_size if self.head else 0)):
            raise ValueError("every group_size must be even (two codes share a byte)")
        size = self.weights.group_size
        for name, site in self.sites.items():
            if size is not None and size % site.group_size:
                raise ValueError(
                    f"weights.group_size {size} must be null or a multiple of group_size "
                    f"{site.group_size} of site {name}: a group has one scale on each side"
                )
        return self

    def site_of(self, module: str) -> SiteConfig | None:
        """The site of a linear, by its full name or last component; None if it has none."""
        last = module.rpartition(".")[2]
        return next((site for site in self.sites.values() if last in site.modules), None)

    def is_ignored(self, module: str) -> bool:
        """Whether a linear stays in 16 bit."""
        if module.rpartition(".")[2] in self.ignore:
            return True
        return any(module == name or module.startswith(f"{name}.") for name in self.ignore)


def parse_config(raw: Any) -> CheckpointConfig:
    """Validate a `quantization_config`.

    Raises: UserError, one sentence that names the key and what is wrong with it.
    """
    if not isinstance(raw, dict):
        raise UserError("quantization_config must be a JSON object; quantize the model again")
    if raw.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"quantization_config has quant_method {raw.get('quant_method')!r}, not "
            f"{QUANT_METHOD!r}: this is no OffQ checkpoint; make one with `offq quantize`"
        )
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has OffQ format version {version}, this vllm-offq reads up to "
            f"{FORMAT_VERSION}; upgrade vllm-offq"
        )
    try:
        return CheckpointConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        wrong = problem["msg"].removeprefix("Value error, ")
        message = {
            "extra_forbidden": f"{key} is an unknown key",
            "missing": f"{key} is missing",
        }.get(problem["type"], f"{key} is wrong: {wrong}" if key else wrong)
        raise UserError(f"quantization_config: {message}") from None


def pack_int4(codes: Tensor) -> Tensor:
    """Two adjacent codes a byte, the even one in the low nibble, each stored as code + 8.

    codes: [..., n] int8 in [-8, 7], n even. Returns: [..., n / 2] uint8.
    """
    low, high = (codes + 8).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of pack_int4. packed: [..., n / 2] uint8. Returns: [..., n] int8."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).view(torch.int8) - 8


def pack_int8(codes: Tensor) -> Tensor:
    """Codes of 8 bits as two of 4, ``16 high + low``: first all high ones, then all low ones.

    A product with them is one with 4-bit codes and the input twice, the first time 16-fold.
    codes: [..., n] int8, at most HEAD_CODE_MAX in magnitude. Returns: [..., n] uint8, as pack_int4
    of [..., 2 n].
    """
    high = (codes.short() + 8) >> 4
    return pack_int4(torch.cat([high, codes - 16 * high], -1).to(torch.int8))


def unpack_int8(packed: Tensor) -> Tensor:
    """Inverse of pack_int8. packed: [..., n] uint8. Returns: [..., n] int16."""
    high, low = unpack_int4(packed).short().chunk(2, -1)
    return 16 * high + low
