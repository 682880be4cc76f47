"""Gemma 2 and 3: norms before and after attention and MLP, gains stored as their difference to 1.

The scaled embedding, the soft caps and the windows of local layers are left as they are.
"""

from typing import Any

from calibration.architectures.base import Architecture
from vllm_offq.architectures import LAYOUTS

OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def _refusal(config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention"
    return None


def _gemma2_refusal(config: Any) -> str | None:
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"the activation {config.hidden_activation}, which vLLM's class does not have"
    return _refusal(config)


GEMMA2 = Architecture(
    LAYOUTS["Gemma2ForCausalLM"],
    mlp_norm="pre_feedforward_layernorm",
    output_norms=OUTPUT_NORMS,
    gain_offset=1.0,
    refusal=_gemma2_refusal,
)
GEMMA3 = Architecture(
    LAYOUTS["Gemma3ForCausalLM"],
    mlp_norm="pre_feedforward_layernorm",
    output_norms=OUTPUT_NORMS,
    gain_offset=1.0,
    refusal=_refusal,
)
