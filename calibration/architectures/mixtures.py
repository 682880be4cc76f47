"""Mixtures of experts: Mixtral and Qwen 3 MoE. The router reads the rotated stream in 16 bit."""

from dataclasses import replace
from typing import Any

from calibration.architectures.base import Architecture
from calibration.architectures.llama import MISTRAL
from calibration.architectures.qwen import QWEN3
from vllm_offq.architectures import LAYOUTS


def _every_block(config: Any) -> str | None:
    """Refuses blocks with an MLP instead: they would need a site of another width."""
    mlp_only, step = getattr(config, "mlp_only_layers", None), config.decoder_sparse_step
    return "blocks without experts" if mlp_only or step != 1 else QWEN3.refusal(config)


MIXTRAL = replace(MISTRAL, layout=LAYOUTS["MixtralForCausalLM"])
QWEN3_MOE = Architecture(LAYOUTS["Qwen3MoeForCausalLM"], refusal=_every_block)
