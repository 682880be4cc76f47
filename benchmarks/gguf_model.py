"""Write a Hugging Face Llama as a GGUF file without a tokenizer: enough to measure speed with."""

import sys
from pathlib import Path

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig


def write_gguf(model: Path, path: Path) -> None:
    """In 16 bit. RoPE scaling is left out: it changes what is said, not how fast."""
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "llama":
        sys.exit(f"{model} is a {config.model_type}; only a llama can be compared with llama.cpp")
    writer = GGUFWriter(path, "llama")
    add_metadata(writer, config)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dictionary
                tensor = tensors.get_tensor(name)
                for module, count in heads.items():
                    if module in name:
                        tensor = interleave(tensor, count)
                dtype = torch.float32 if tensor.ndim == 1 else torch.float16
                gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise ValueError(f"GGUF has no name for the tensor {name}")
                writer.add_tensor(gguf_name, tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, config: PretrainedConfig) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's RoPE pairs neighbouring channels, Hugging Face's pairs the halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape).contiguous()
