"""Tiny random Hugging Face models, tokenizer included, for tests that need no real one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
INNER_STD = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": 1.0, "o_proj": 0.5} | dict.fromkeys(
    ["gate_proj", "up_proj", "down_proj"], 0.3
)
"""Times the square root of the input width."""


def make_tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
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
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.split(".")[-2]
            if kind.endswith("norm"):  # all ones would hide a forgotten gain
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                std = TIED_STD if tied and kind == "embed_tokens" else STD.get(kind)
                parameter.normal_(0, std or INNER_STD[kind] / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)
    make_tiny_tokenizer(vocab).save_pretrained(path)
    return path
