"""From model, recipe and settings to the checkpoint's configuration: sizes that fit, or refusal."""

from typing import Any

import vllm_offq
from calibration.architectures import Architecture
from calibration.architectures.base import Site, head_size
from calibration.settings import RECIPES, Settings
from vllm_offq.errors import UserError
from vllm_offq.format import (
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointConfig,
    KVCacheConfig,
    SiteConfig,
    WeightConfig,
    pick_group_size,
)

LARGEST_HEAD_GROUP = 128


def plan(model_config: Any, architecture: Architecture, settings: Settings) -> CheckpointConfig:
    """The configuration that a run will write; decides every group size before any long work.

    model_config: the Hugging Face config.
    Raises: UserError naming the layer and the group sizes that can work.
    """
    recipe = RECIPES[settings.recipe]
    dim = head_size(model_config)
    head_group = _head_group_size(dim, settings.group_size)
    widths = {
        "attention_input": model_config.hidden_size,
        "attention_output": model_config.num_attention_heads * dim,
        "mlp_input": model_config.hidden_size,
        "mlp_output": model_config.intermediate_size,
    }

    def site_config(site: Site) -> SiteConfig:
        width = widths[site.name]
        what = "/".join(_last(path) for path in site.modules)
        group_size = width
        if recipe.grouped:
            grouped_by_head = site.name == "attention_output"
            group_size = (
                head_group if grouped_by_head else pick_group_size(width, settings.group_size, what)
            )
        if settings.weight_group_size not in (None, group_size):
            raise UserError(
                f"weight group size {settings.weight_group_size} differs from the {group_size} "
                f"channels that share a scale at the input of {what}; pass the same number to "
                "--group-size and --weight-group-size"
            )
        last = site.name == "mlp_output"
        rotation = recipe.rotation
        return SiteConfig(
            modules=[_last(path) for path in site.modules],
            bits=4,
            group_size=group_size,
            symmetric=recipe.symmetric,
            clip_ratio=recipe.clip_ratio,
            fused_rotation="permutation" if last and rotation == "principal" else rotation,
            online_hadamard=None if not last or rotation == "none" else group_size,
        )

    kv_cache = None
    if settings.kv_bits == "4":
        kv_cache = KVCacheConfig(
            bits=4,
            group_size=head_group,
            key_rotation=recipe.rotation != "none",
        )
    return CheckpointConfig(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        produced_by=f"vllm-offq {vllm_offq.__version__}",
        settings_sha256=settings.sha256(),
        recipe=settings.recipe,
        weights=WeightConfig(bits=4, group_size=settings.weight_group_size),
        sites={site.name: site_config(site) for site in architecture.sites},
        kv_cache=kv_cache,
        ignore=[architecture.head],
    )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _head_group_size(dim: int, group_size: int | None) -> int:
    """Values and keys never share a group across heads: the head size where that is smaller."""
    group = min(dim, group_size or LARGEST_HEAD_GROUP)
    if dim % group:
        raise UserError(
            f"group size {group_size} does not divide the head size {dim} of o_proj's input; "
            f"choose --group-size from {[size for size in (128, 64, 32, 16) if dim % size == 0]}"
        )
    return group
