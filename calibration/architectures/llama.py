"""Llama 2 and 3, and what is built like them (SmolLM2)."""

from calibration.architectures.base import Architecture

LLAMA = Architecture(
    name="LlamaForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    input_norm="input_layernorm",
    post_attention_norm="post_attention_layernorm",
)
