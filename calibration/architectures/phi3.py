"""Phi-3 and Phi-4: query, key and value in one linear, gate and up in another."""

from calibration.architectures.base import Architecture, layer_windows
from vllm_offq.architectures import LAYOUTS

PHI3 = Architecture(
    LAYOUTS["Phi3ForCausalLM"],
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    refusal=layer_windows,
)
