"""From model, recipe and settings to the checkpoint's configuration: sizes that fit, or refusal."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

import vllm_offq
from calibration.architectures import Architecture
from calibration.architectures.base import Site, head_size
from calibration.loader import Original
from calibration.settings import RECIPES, Settings
from vllm_offq.errors import UserError
from vllm_offq.format import (
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointConfig,
    EmbeddingConfig,
    HeadConfig,
    KVCacheConfig,
    SiteConfig,
    WeightConfig,
)
from vllm_offq.rotation import hadamard_core

DEFAULT_SIZES = (128, 64)
POSSIBLE_SIZES = (256, 128, 64, 32, 16)


def plan(
    model_config: Any,
    architecture: Architecture,
    settings: Settings,
    rest: Sequence[str] = (),
) -> CheckpointConfig:
    """The configuration that a run will write; decides every group size before any long work.

    model_config: the Hugging Face config; rest: paths of what is not the language model.
    Raises: UserError naming the layer and the group sizes that can work, or what of the model or
    of the settings is not supported.
    """
    recipe = RECIPES[settings.recipe]
    _refuse_variants(model_config, architecture)
    if architecture.num_experts and settings.gptq_inputs != "original":
        raise UserError(
            f"--gptq-inputs {settings.gptq_inputs} is not supported for mixtures of experts, whose "
            "inputs would be calculated once for every expert; leave it out"
        )
    if settings.basis != "auto" and not architecture.rotates_stream:
        raise UserError(
            f"--basis {settings.basis} does nothing for {architecture.name}, whose norms after "
            "attention and MLP let no rotation pass; leave it out"
        )
    longest = model_config.max_position_embeddings
    if settings.sequence_length > longest:
        raise UserError(
            f"--sequence-length {settings.sequence_length} is more than the {longest} tokens that "
            f"the model was made for; give {longest} or less"
        )
    dim = head_size(model_config)
    widths = {
        "attention_input": model_config.hidden_size,
        "attention_output": model_config.num_attention_heads * dim,
        "mlp_input": model_config.hidden_size,
        "mlp_output": architecture.intermediate_size(model_config),
    }
    whole_groups = {
        "/".join(_names(site)): widths[site.name]
        for site in architecture.sites
        if site.name != "attention_output"
    }
    group_size = DEFAULT_SIZES[0]  # of heads, where the recipe groups nothing else
    if recipe.grouped:
        group_size = pick_group_size(whole_groups, settings.group_size)
    head_group = _head_group_size(dim, group_size)

    bits: Literal[4, 8] = 8 if settings.activation_bits == "8" else 4
    # 256 levels resolve the whole range: clipping would be all that is left of the error.
    clip_ratio = settings.clip_ratio
    if clip_ratio is None or clip_ratio == "auto":
        clip_ratio = recipe.clip_ratio if bits == 4 else 1.0

    def site_config(site: Site) -> SiteConfig:
        width = widths[site.name]
        what = "/".join(_names(site))
        site_group = width
        if recipe.grouped:
            site_group = head_group if site.name == "attention_output" else group_size
        weight_group = settings.weight_group_size
        if weight_group is not None and (weight_group % site_group or width % weight_group):
            raise UserError(
                f"weight group size {weight_group} does not work for {what}: their {width} input "
                f"channels must be a multiple of it, and it one of the {site_group} that share a "
                "scale; change --weight-group-size or --group-size"
            )
        # Elsewhere the rotation is fused as a whole.
        online = site.name == "mlp_output" or (
            site.reads_residual and not architecture.rotates_stream
        )
        rotation = recipe.rotation
        if online and rotation == "hadamard":
            hadamard_core(site_group)  # refuses an order that has none before the long work
        return SiteConfig(
            modules=_names(site),
            bits=bits,
            group_size=site_group,
            symmetric=recipe.symmetric,
            clip_ratio=clip_ratio,
            fused_rotation="permutation" if online and rotation == "principal" else rotation,
            online_hadamard=site_group if online and rotation != "none" else None,
        )

    sites: dict[str, SiteConfig] = {site.name: site_config(site) for site in architecture.sites}
    if settings.head_bits == "4" and architecture.layout.head_is_embedding:
        raise UserError(
            f"--head-bits 4 is not supported for {architecture.name}, whose head is the embedding, "
            "which vLLM keeps in 16 bit; leave it out"
        )
    head = None
    if settings.head_bits != "16" and not architecture.layout.head_is_embedding:
        head = HeadConfig(
            bits=4 if settings.head_bits == "4" else 8,
            group_size=sites["attention_input"].group_size,
        )
    embedding = None
    if settings.embedding_bits != "16":
        if not architecture.layout.quantizes_embedding:
            raise UserError(
                f"--embedding-bits {settings.embedding_bits} is not supported for "
                f"{architecture.name}, whose embedding vLLM keeps in 16 bit; leave it out"
            )
        embedding = EmbeddingConfig(bits=8)
        if settings.embedding_bits == "4":
            size = sites["attention_input"].group_size
            embedding = EmbeddingConfig(bits=4, group_size=size)
    kv_cache = None
    if settings.kv_bits == "4":
        kv_cache = KVCacheConfig(
            bits=4,
            group_size=_cache_group_size(dim, head_group),
            key_rotation=recipe.rotation != "none",
        )
    return CheckpointConfig(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        produced_by=f"vllm-offq {vllm_offq.__version__}",
        settings_sha256=settings.sha256(),
        recipe=settings.recipe,
        weights=WeightConfig(bits=4, group_size=settings.weight_group_size),
        sites=sites,
        head=head,
        embedding=embedding,
        kv_cache=kv_cache,
        ignore=[_last(site.router) for site in architecture.sites if site.router]
        + ([] if head else [architecture.head])
        + [*rest],
    )


def stored_dtype(settings: Settings, original: Original) -> torch.dtype:
    """Of what stays unquantized."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.bfloat16 if original.dtype == torch.float32 else original.dtype


def _refuse_variants(model_config: Any, architecture: Architecture) -> None:
    """Raises: UserError for what a class can be configured to and OffQ or vLLM does not do."""
    layer_types = getattr(model_config, "layer_types", None) or []
    unknown = sorted({*layer_types} - {"full_attention", "sliding_attention"})
    refusal = architecture.refusal(model_config)
    if unknown:
        refusal = f"layers of {' and '.join(unknown)}"
    if not getattr(model_config, "is_causal", True):
        refusal = "attention that is not causal"
    if refusal:
        raise UserError(f"{architecture.name} with {refusal} is not supported")


def _names(site: Site) -> list[str]:
    """Last name components of its linears; those of all experts are the same."""
    return [_last(path) for path in site.groups[0]]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def pick_group_size(widths: dict[str, int], group_size: int | None) -> int:
    """One group size for all: the one asked for, else 128, or 64 where 128 does not divide.

    widths: input channels by linear.
    Raises: UserError naming the linear and the sizes that can work.
    """
    for size in DEFAULT_SIZES if group_size is None else (group_size,):
        if size in POSSIBLE_SIZES and all(width % size == 0 for width in widths.values()):
            return size
    tried = group_size or " or ".join(map(str, DEFAULT_SIZES))
    smallest = group_size or min(DEFAULT_SIZES)
    what = next((what for what, width in widths.items() if width % smallest), min(widths))
    possible = [s for s in POSSIBLE_SIZES if all(width % s == 0 for width in widths.values())]
    raise UserError(
        f"group size {tried} does not work for {what} with {widths[what]} input channels; "
        + (f"choose --group-size from {possible}" if possible else "none of 16 to 256 does")
    )


def _head_group_size(dim: int, group_size: int) -> int:
    """Values and keys never share a group across heads: the head size where that is smaller."""
    group = min(dim, group_size)
    if dim % group:
        raise UserError(
            f"group size {group_size} does not divide the head size {dim} of o_proj's input; "
            f"choose --group-size from {[size for size in POSSIBLE_SIZES if dim % size == 0]}"
        )
    return group


def _cache_group_size(dim: int, head_group: int) -> int:
    """Of keys and values: half a head at least, the Triton kernels know no smaller ones.

    A multiple of head_group, so that what a group has in common is common in all of o_proj's too.
    """
    sizes = (head_group, dim // 2, dim)
    return next(size for size in sizes if dim <= 2 * size and size % head_group == 0)
