"""Qwen 2, 2.5 (biases on query, key and value) and 3 (norms of each query and key head).

Qwen 3's head norms come before the rotary embedding and key rotations after it, so they stay.
"""

from typing import Any

from calibration.architectures.base import Architecture, layer_windows
from vllm_offq.architectures import LAYOUTS


def _refusal(config: Any) -> str | None:
    if getattr(config, "dual_chunk_attention_config", None):
        return "dual chunk attention"
    return layer_windows(config)


def _qwen3_refusal(config: Any) -> str | None:
    if config.attention_bias:
        return "biases in attention, which vLLM's class does not have"
    return _refusal(config)


QWEN2 = Architecture(LAYOUTS["Qwen2ForCausalLM"], refusal=_refusal)
QWEN3 = Architecture(LAYOUTS["Qwen3ForCausalLM"], refusal=_qwen3_refusal)
