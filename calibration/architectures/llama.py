"""Llama 2 and 3, what is built like them (SmolLM2), and Mistral."""

from calibration.architectures.base import Architecture
from vllm_offq.architectures import LAYOUTS

LLAMA = Architecture(LAYOUTS["LlamaForCausalLM"])
MISTRAL = Architecture(LAYOUTS["MistralForCausalLM"])
