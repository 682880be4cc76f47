"""Which tensors a checkpoint must hold, by its configuration, and which values they may have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_offq.architectures import Layout, Sizes, find_layout, language_config, read_sizes
from vllm_offq.errors import UserError
from vllm_offq.format import KEY_ROTATION, WEIGHT_PACKED, WEIGHT_SCALE, CheckpointConfig

FLOATING = (torch.bfloat16, torch.float16, torch.float32)

ORTHOGONALITY_TOLERANCE = 2.0**-9
"""Of the entries of R R^T - I. Rounding R to float16 moves them by at most 2^-10 (each entry by
2^-11 of itself, rows have length 1); the rest is room for the arithmetic that made R."""


class TensorSpec(NamedTuple):
    """Shape and the dtypes that are allowed."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def expected_tensors(
    model_config: Mapping[str, Any], config: CheckpointConfig
) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint's language model by name.

    model_config: the content of config.json.
    Raises: UserError if config.json lacks a size, or its sizes and quantization_config disagree.
    """
    layout = find_layout(model_config)
    model_config = language_config(model_config)
    sizes = read_sizes(model_config)
    expected = {
        f"{layout.final_norm}.weight": TensorSpec((sizes.hidden,), FLOATING),
    }
    expected |= _embedding_tensors(config, layout, sizes)
    expected |= _head_tensors(model_config, config, layout, sizes)
    for layer in range(sizes.num_layers):
        prefix = f"{layout.layers}.{layer}."
        for norm, width in layout.norms.items():
            expected[f"{prefix}{norm}.weight"] = TensorSpec((getattr(sizes, width),), FLOATING)
        for linear, shape in layout.linear_shapes(model_config, sizes, layer).items():
            name = prefix + linear
            if layout.experts is not None and linear == layout.experts.router:
                _check_router(name, config)
            expected |= _linear_tensors(name, shape, config)
            if layout.has_bias(model_config, linear):
                expected[f"{name}.bias"] = TensorSpec(shape[:1], FLOATING)
        if config.kv_cache is not None:
            name = f"{prefix}{layout.attention}.attn"
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


def _embedding_tensors(
    config: CheckpointConfig, layout: Layout, sizes: Sizes
) -> dict[str, TensorSpec]:
    name, shape = layout.embedding, (sizes.vocabulary, sizes.hidden)
    if config.embedding is None:
        return {f"{name}.weight": TensorSpec(shape, FLOATING)}
    if not layout.quantizes_embedding:
        raise UserError(
            f"quantization_config: the embedding of {layout.name} stays in 16 bit in vLLM"
        )
    width, group_size = sizes.hidden, config.embedding.group_size or sizes.hidden
    _check_divides("embedding.group_size", group_size, width, name)
    codes = TensorSpec(shape, (torch.int8,))
    if config.embedding.bits == 4:
        codes = TensorSpec((sizes.vocabulary, width // 2), (torch.uint8,))
    scales = TensorSpec((sizes.vocabulary, width // group_size), (torch.float16,))
    return {f"{name}.{WEIGHT_PACKED}": codes, f"{name}.{WEIGHT_SCALE}": scales}


def _head_tensors(
    model_config: Mapping[str, Any], config: CheckpointConfig, layout: Layout, sizes: Sizes
) -> dict[str, TensorSpec]:
    name, shape = layout.head, (sizes.vocabulary, sizes.hidden)
    tied = layout.head_is_embedding or model_config.get("tie_word_embeddings", False)
    if tied and config.embedding is not None:
        raise UserError(
            "config.json: tie_word_embeddings must be false where quantization_config has an "
            "embedding"
        )
    if config.head is None:
        return {} if tied else {f"{name}.weight": TensorSpec(shape, FLOATING)}
    if layout.head_is_embedding:
        raise UserError(
            f"quantization_config: the head of {layout.name} is its embedding and stays in 16 bit"
        )
    if tied:
        raise UserError(
            "config.json: tie_word_embeddings must be false where quantization_config has a head"
        )
    width = sizes.hidden
    _check_divides("head.group_size", config.head.group_size, width, name)
    num_bytes = width * config.head.bits // 8
    num_scales = width // (config.head.weight_group_size or width)
    return {
        f"{name}.{WEIGHT_PACKED}": TensorSpec((sizes.vocabulary, num_bytes), (torch.uint8,)),
        f"{name}.{WEIGHT_SCALE}": TensorSpec((sizes.vocabulary, num_scales), (torch.float16,)),
    }


def _check_router(name: str, config: CheckpointConfig) -> None:
    if not config.is_ignored(name):
        raise UserError(
            f"quantization_config: {name} must be in ignore: vLLM computes a router in 16 bit"
        )


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
        _check_divides("weights.group_size", config.weights.group_size, in_features, name)
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
