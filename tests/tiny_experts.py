"""Tiny mixtures of experts: original, quantized by rounding to nearest, and simulated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import INNER_STD, STD, make_tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vllm_offq.checkpoint import CheckpointWriter
from vllm_offq.format import CheckpointConfig, SiteConfig, pack_int4, parse_config
from vllm_offq.quantizer import fake_quantize
from vllm_offq.rotation import apply_block_hadamard

GROUP_SIZE = 64
EXPERTS, INTERMEDIATE = 8, 128
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            intermediate_size=INTERMEDIATE,
        )
    ),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            intermediate_size=INTERMEDIATE,
            moe_intermediate_size=INTERMEDIATE,
            norm_topk_prob=True,
        )
    ),
}
EXPERT_STD = {"gate_up_proj": 0.4, "down_proj": 0.3, "gate": 2.0}
"""As in tiny_models; routers prefer some experts clearly."""


@torch.no_grad()
def make_tiny_experts(path: Path, name: str) -> Path:
    """Save a random float32 model, one of MODELS, under path. Returns: path."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for full_name, parameter in model.named_parameters():
        kind = full_name.removesuffix(".weight").rpartition(".")[2]
        if kind.endswith("norm"):  # all ones would hide a forgotten gain
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        else:
            std = (INNER_STD | EXPERT_STD).get(kind, 0.0) / parameter.shape[-1] ** 0.5
            parameter.normal_(0, STD.get(kind, std))
    model.save_pretrained(path)
    make_tiny_tokenizer(SIZES["vocab_size"]).save_pretrained(path)
    return path


def _quantization_config() -> dict[str, Any]:
    def site(*modules: str, online_hadamard: int | None = None) -> dict[str, Any]:
        return {
            "modules": list(modules),
            "bits": 4,
            "group_size": GROUP_SIZE,
            "symmetric": False,
            "clip_ratio": 1.0,
            "fused_rotation": "none",
            "online_hadamard": online_hadamard,
        }

    return {
        "quant_method": "offq",
        "format_version": 1,
        "produced_by": "vllm-offq test",
        "settings_sha256": "0" * 64,
        "recipe": "rtn",
        "weights": {"bits": 4, "group_size": None},
        "sites": {
            "attention": site("q_proj", "k_proj", "v_proj"),
            "attention_output": site("o_proj"),
            "experts": site("w1", "w3", "gate_proj", "up_proj"),
            "experts_output": site("w2", "down_proj", online_hadamard=GROUP_SIZE),
        },
        "head": None,
        "embedding": None,
        "kv_cache": None,
        "ignore": ["gate"],
    }


def round_to_nearest(weight: Tensor, site: SiteConfig) -> tuple[Tensor, Tensor]:
    """Codes and float16 scale of each row of a weight that meets an input of this site."""
    if site.online_hadamard:
        weight = apply_block_hadamard(weight, site.online_hadamard)
    scale = (weight.abs().amax(1, keepdim=True) / 7).half()
    return (weight / scale.float()).round().clamp(-8, 7).to(torch.int8), scale


def quantize_experts(original: Path, out: Path) -> Path:
    """Write an OffQ checkpoint: attention and experts quantized, the rest as it is."""
    raw = _quantization_config()
    config = parse_config(raw)
    with CheckpointWriter(out) as writer:
        for name, tensor in load_file(original / "model.safetensors").items():
            linear = name.removesuffix(".weight")
            site = None if config.is_ignored(linear) else config.site_of(linear)
            if site is None:
                writer.add(name, tensor)
                continue
            codes, scale = round_to_nearest(tensor, site)
            writer.add(f"{linear}.weight_packed", pack_int4(codes))
            writer.add(f"{linear}.weight_scale", scale)
        model_config = json.loads((original / "config.json").read_text())
        writer.add_text("config.json", json.dumps(model_config | {"quantization_config": raw}))
        for file in original.glob("tokenizer*"):
            writer.add_text(file.name, file.read_text())
    return out


class SimulatedLinear(nn.Module):
    """What is left of a linear behind the grids of its weight and its input."""

    def __init__(self, weight: Tensor, site: SiteConfig):
        super().__init__()
        codes, scale = round_to_nearest(weight, site)
        self.weight, self.site = codes * scale.float(), site

    def forward(self, x: Tensor) -> Tensor:
        if self.site.online_hadamard:
            x = apply_block_hadamard(x, self.site.online_hadamard)
        return fake_quantize(x, self.site.group_size) @ self.weight.T


class SimulatedExperts(nn.Module):
    """Each token by each of its experts."""

    def __init__(self, experts: Any, config: CheckpointConfig):
        super().__init__()
        sites = config.sites["experts"], config.sites["experts_output"]
        self.gate_up, self.down = (
            nn.ModuleList(SimulatedLinear(weight, site) for weight in weights)
            for weights, site in zip((experts.gate_up_proj, experts.down_proj), sites, strict=True)
        )

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for t, ids in enumerate(topk_ids.tolist()):
            for expert, weight in zip(ids, topk_weights[t], strict=True):
                gate, up = self.gate_up[expert](x[t]).chunk(2, -1)
                y[t] += weight * self.down[expert](nn.functional.silu(gate) * up)
        return y


@torch.no_grad()
def simulate_experts(original: Path) -> PreTrainedModel:
    """The checkpoint of quantize_experts in plain transformers."""
    config = parse_config(_quantization_config())
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last == "experts":
            setattr(model.get_submodule(parent), last, SimulatedExperts(module, config))
        elif site := config.site_of(name):
            setattr(model.get_submodule(parent), last, SimulatedLinear(module.weight, site))
    return model
