"""Tiny random Hugging Face models, tokenizer included, for tests that need no real one."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog.\n"
    "Every model answers the same question in its own words, and none of them is wrong.\n"
    "In 1969 three people flew to the moon; two of them walked there, one waited above.\n"
    "A cache keeps what was computed once, so that it need not be computed again.\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Chosen so that logits are peaked, attention matters (without it the KL divergence is 0.3) and
# yet 4-bit noise stays small (0.03): the residual stream outweighs what layers add, as in
# trained models. With uniformly large weights any rounding difference grows to chaos.
STD = {"embed_tokens": 1.0, "lm_head": 0.2}
TIED_STD = 0.1
INNER_STD = (
    dict.fromkeys(["q_proj", "k_proj", "v_proj", "qkv_proj"], 1.0)
    | {"o_proj": 0.5}
    | dict.fromkeys(["gate_proj", "up_proj", "gate_up_proj", "down_proj"], 0.3)
)
"""Times the square root of the input width."""
OUTPUT_GAIN = 0.1
"""Of norms on what layers add: for the same reason."""
TIED_OUTPUT_GAIN = 1.5
"""Where the embedding is scaled up by the square root of its width."""

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
WINDOW = 4
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": (
        "Llama",
        {
            "head_dim": 128,
            "rope_parameters": {  # of Llama 3.1 and later
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "Mistral": ("Mistral", {"head_dim": 128, "sliding_window": WINDOW}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "Phi3": (
        "Phi3",
        {
            "hidden_size": 384,  # heads of 96
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "Gemma2": (
        "Gemma2",
        {
            "head_dim": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 144,
            "attn_logit_softcapping": 2.0,  # low enough to matter
            "final_logit_softcapping": 20.0,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_AND_GLOBAL,
        },
    ),
    "Gemma3": (
        "Gemma3Text",
        {
            "head_dim": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 144,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_AND_GLOBAL,
        },
    ),
    "Olmo2": ("Olmo2", {"num_key_value_heads": 4}),
}
"""By the prefix of the model's class: that of the configuration's class, and what differs from
SIZES and the class's own."""


def make_tiny_tokenizer(vocab_size: int = 512, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on CORPUS; it may have fewer tokens than vocab_size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        **options,
    )


def make_tiny_llama(
    path: Path,
    *,
    head_dim: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    hidden: int = 256,
    intermediate: int = 384,
    layers: int = 2,
    tied: bool = True,
    bias: bool = False,
    vocab: int = 512,
    max_position: int = 1024,
    seed: int = 0,
) -> Path:
    """Save a random float32 Llama under path. Returns: path."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    return _save(LlamaForCausalLM(config), path)


def make_tiny(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random float32 model of one of FAMILIES under path. Returns: path."""
    torch.manual_seed(seed)
    config_class, values = FAMILIES[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "dtype": "float32"}
    config = getattr(transformers, f"{config_class}Config")(**SIZES | tokens | values | changes)
    return _save(AutoModelForCausalLM.from_config(config), path)


def _save(model: PreTrainedModel, path: Path) -> Path:
    initialise(model)
    model.save_pretrained(path)
    make_tiny_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


@torch.no_grad()
def initialise(model: PreTrainedModel) -> None:
    """Give a language model the weights that are described above."""
    config = model.config
    output_norms = ["post_feedforward_layernorm"]
    if "post_feedforward_layernorm" in str(model):
        output_norms.append("post_attention_layernorm")
    is_gemma = config.model_type.startswith("gemma")
    output_gain = TIED_OUTPUT_GAIN if is_gemma else OUTPUT_GAIN
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if kind.endswith("norm"):  # all ones would hide a forgotten gain
            size = output_gain if kind in output_norms else 1.0
            gain = size * (1 + 0.2 * torch.randn_like(parameter))
            parameter.copy_(gain - 1 if is_gemma else gain)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            tied = config.tie_word_embeddings and kind == "embed_tokens"
            std = TIED_STD if tied else STD.get(kind)
            parameter.normal_(0, std or INNER_STD[kind] / parameter.shape[1] ** 0.5)
