"""Which tensors a checkpoint must hold, by its configuration, and which values they may have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.format import KEY_ROTATION, WEIGHT_PACKED, WEIGHT_SCALE, CheckpointConfig

HEAD = "lm_head"
FLOATING = (torch.bfloat16, torch.float16, torch.float32)

ORTHOGONALITY_TOLERANCE = 2.0**-9
"""Of the entries of R R^T - I. Rounding R to float16 moves them by at most 2^-10 (each entry by
2^-11 of itself, rows have length 1); the rest is room for the arithmetic that made R."""


class TensorSpec(NamedTuple):
    """Shape and the dtypes that are allowed."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Sizes:
    """The widths that the shapes of a transformer are made of."""

    hidden: int
    query: int
    """num_attention_heads * head_dim."""
    key: int
    """num_key_value_heads * head_dim."""
    intermediate: int
    num_key_heads: int
    head_dim: int
    num_layers: int
    vocabulary: int


@dataclass(frozen=True)
class Architecture:
    """Names and shapes of one model class, inside `model.layers.N.`."""

    linears: dict[str, tuple[str, str]]
    """Linear: its output and input width, as attributes of Sizes."""
    norms: tuple[str, ...]
    """RMSNorms over the hidden channels."""
    has_bias: Callable[[dict[str, Any], str], bool]
    """Whether a linear has a bias, by config.json and the linear's name."""


def _llama_has_bias(model_config: dict[str, Any], linear: str) -> bool:
    key = "attention_bias" if linear.startswith("self_attn.") else "mlp_bias"
    return bool(model_config.get(key, False))


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        linears={
            "self_attn.q_proj": ("query", "hidden"),
            "self_attn.k_proj": ("key", "hidden"),
            "self_attn.v_proj": ("key", "hidden"),
            "self_attn.o_proj": ("hidden", "query"),
            "mlp.gate_proj": ("intermediate", "hidden"),
            "mlp.up_proj": ("intermediate", "hidden"),
            "mlp.down_proj": ("hidden", "intermediate"),
        },
        norms=("input_layernorm", "post_attention_layernorm"),
        has_bias=_llama_has_bias,
    )
}


def expected_tensors(
    model_config: dict[str, Any], config: CheckpointConfig
) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint by name.

    model_config: the content of config.json.
    Raises: UserError if config.json lacks a size, or its sizes and quantization_config disagree.
    """
    architecture = _architecture(model_config)
    sizes = _sizes(model_config)
    expected = {
        "model.embed_tokens.weight": TensorSpec((sizes.vocabulary, sizes.hidden), FLOATING),
        "model.norm.weight": TensorSpec((sizes.hidden,), FLOATING),
    }
    expected |= _head_tensors(model_config, config, sizes)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in architecture.norms:
            expected[f"{prefix}{norm}.weight"] = TensorSpec((sizes.hidden,), FLOATING)
        for linear, (out_width, in_width) in architecture.linears.items():
            name = prefix + linear
            shape = (getattr(sizes, out_width), getattr(sizes, in_width))
            expected |= _linear_tensors(name, shape, config)
            if architecture.has_bias(model_config, linear):
                expected[f"{name}.bias"] = TensorSpec(shape[:1], FLOATING)
        if config.kv_cache is not None:
            name = f"{prefix}self_attn.attn"
            _check_divides("kv_cache.group_size", config.kv_cache.group_size, sizes.head_dim, name)
            if config.kv_cache.key_rotation:
                expected[f"{name}.{KEY_ROTATION}"] = TensorSpec(
                    (sizes.num_key_heads, sizes.head_dim, sizes.head_dim), (torch.float16,)
                )
    return expected


def check_values(name: str, tensor: Tensor) -> str | None:
    """What is wrong with the values of a tensor, as the end of a sentence; None if nothing."""
    if not tensor.is_floating_point():
        return None  # every byte is a valid pair of codes
    # Row by row, to need no second tensor of this size.
    if not all(chunk.isfinite().all() for chunk in tensor.split(4096)):
        return "holds NaN or infinity"
    if name.endswith(f".{WEIGHT_SCALE}") and tensor.numel() and tensor.min() < 0:
        return "holds a negative scale"
    if name.endswith(f".{KEY_ROTATION}"):
        rotation = tensor.float()
        identity = torch.eye(rotation.shape[-1])
        error = (rotation @ rotation.mT - identity).abs().amax().item()
        if error > ORTHOGONALITY_TOLERANCE:
            return f"is not orthogonal (off by {error:.2g}, allowed is {ORTHOGONALITY_TOLERANCE})"
    return None


def _architecture(model_config: dict[str, Any]) -> Architecture:
    names = model_config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise UserError(
            f"config.json: architecture {name} is not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


def _sizes(model_config: dict[str, Any]) -> Sizes:
    def size(key: str, default: int | None = None) -> int:
        value = model_config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: {key} must be a positive number, not {value!r}")
        return value

    heads = size("num_attention_heads")
    key_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", size("hidden_size") // heads)
    return Sizes(
        hidden=size("hidden_size"),
        query=heads * head_dim,
        key=key_heads * head_dim,
        intermediate=size("intermediate_size"),
        num_key_heads=key_heads,
        head_dim=head_dim,
        num_layers=size("num_hidden_layers"),
        vocabulary=size("vocab_size"),
    )


def _head_tensors(
    model_config: dict[str, Any], config: CheckpointConfig, sizes: Sizes
) -> dict[str, TensorSpec]:
    tied, shape = model_config.get("tie_word_embeddings", False), (sizes.vocabulary, sizes.hidden)
    if config.head is None:
        return {} if tied else {f"{HEAD}.weight": TensorSpec(shape, FLOATING)}
    if tied:
        raise UserError(
            "config.json: tie_word_embeddings must be false where quantization_config has a head"
        )
    _check_divides("head.group_size", config.head.group_size, sizes.hidden, HEAD)
    return {
        f"{HEAD}.{WEIGHT_PACKED}": TensorSpec(shape, (torch.uint8,)),
        f"{HEAD}.{WEIGHT_SCALE}": TensorSpec((sizes.vocabulary, 1), (torch.float16,)),
    }


def _linear_tensors(
    name: str, shape: tuple[int, int], config: CheckpointConfig
) -> dict[str, TensorSpec]:
    if config.is_ignored(name):
        return {f"{name}.weight": TensorSpec(shape, FLOATING)}
    site = config.site_of(name)
    if site is None:
        raise UserError(f"quantization_config: {name} is neither in a site nor in ignore")
    out_features, in_features = shape
    _check_divides("group_size", site.group_size, in_features, name)
    if site.online_hadamard is not None:
        _check_divides("online_hadamard", site.online_hadamard, in_features, name)
    num_scales = 1
    if config.weights.group_size is not None:
        num_scales = in_features // config.weights.group_size
    return {
        f"{name}.{WEIGHT_PACKED}": TensorSpec((out_features, in_features // 2), (torch.uint8,)),
        f"{name}.{WEIGHT_SCALE}": TensorSpec((out_features, num_scales), (torch.float16,)),
    }


def _check_divides(key: str, size: int, channels: int, name: str) -> None:
    if channels % size:
        raise UserError(
            f"quantization_config: {key} {size} does not divide the {channels} channels of {name}"
        )
