"""A small OffQ checkpoint of random tensors, and its configuration."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_offq.checkpoint import CheckpointWriter
from vllm_offq.rotation import hadamard

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 2, 64, 4, 2, 16, 128, 50


def quantization_config(**changes: Any) -> dict[str, Any]:
    def site(*modules: str, **changes: Any) -> dict[str, Any]:
        return {
            "modules": modules and list(modules),
            "bits": 4,
            "group_size": 32,
            "symmetric": False,
            "clip_ratio": 0.95,
            "fused_rotation": "principal",
            "online_hadamard": None,
        } | changes

    return {
        "quant_method": "offq",
        "format_version": 1,
        "produced_by": "vllm-offq test",
        "settings_sha256": "0" * 64,
        "recipe": "offq",
        "weights": {"bits": 4, "group_size": None},
        "sites": {
            "attention": site("q_proj", "k_proj", "v_proj"),
            "attention_output": site("o_proj", group_size=16),
            "mlp": site("gate_proj", "up_proj"),
            "mlp_output": site("down_proj", fused_rotation="permutation", online_hadamard=32),
        },
        "head": {"bits": 8, "group_size": 32},
        "embedding": None,
        "kv_cache": {"bits": 4, "group_size": 16, "key_rotation": True},
        "ignore": [],
    } | changes


def model_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "quantization_config": quantization_config(),
    } | changes


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)

    def packed(name: str, out_features: int, in_features: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight_packed": torch.randint(
                256, (out_features, in_features // 2), dtype=torch.uint8
            ),
            f"{name}.weight_scale": torch.rand(out_features, 1).half(),
        }

    result = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16(),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        **packed("lm_head", VOCABULARY, 2 * HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, out_features, in_features in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ):
            result |= packed(prefix + name, out_features, in_features)
        result[f"{prefix}self_attn.attn.key_rotation"] = (
            hadamard(HEAD_DIM).half().expand(KV_HEADS, -1, -1)
        )
    return result


def write(out: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    with CheckpointWriter(out, **options) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
        writer.add_text("config.json", json.dumps(config or model_config()))
    return out
