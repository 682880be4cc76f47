"""Llama 2 and 3, what is built like them (SmolLM2), and Mistral, with windows in all layers."""

from calibration.architectures.base import Architecture, layer_windows
from vllm_offq.architectures import LAYOUTS

LLAMA = Architecture(LAYOUTS["LlamaForCausalLM"], refusal=layer_windows)
MISTRAL = Architecture(LAYOUTS["MistralForCausalLM"], refusal=layer_windows)
