"""Which tensors a checkpoint of each model class must hold."""

from typing import Any

import pytest
import torch
from sample_checkpoint import HIDDEN, INTERMEDIATE, VOCABULARY, model_config, quantization_config

from vllm_offq.architectures import LAYOUTS
from vllm_offq.errors import UserError
from vllm_offq.format import parse_config
from vllm_offq.manifest import TensorSpec, expected_tensors

LAYER = "model.layers.1."


def expected(name: str, quantization: dict[str, Any], **changes: Any) -> dict[str, TensorSpec]:
    config = model_config(architectures=[name], quantization_config=quantization, **changes)
    return expected_tensors(config, parse_config(quantization))


def fused() -> dict[str, Any]:
    """The sample with the linears of Phi-3."""
    raw = quantization_config()
    raw["sites"]["attention"]["modules"] = ["qkv_proj"]
    raw["sites"]["mlp"]["modules"] = ["gate_up_proj"]
    return raw


def test_every_class_holds_embedding_norms_and_linears() -> None:
    for name, layout in LAYOUTS.items():
        if name == "Phi3ForCausalLM" or layout.experts is not None:
            continue
        raw = quantization_config(**({"head": None} if layout.head_is_embedding else {}))
        tensors = expected(name, raw)
        assert tensors["model.embed_tokens.weight"].shape == (VOCABULARY, HIDDEN)
        for linear in layout.linears:
            assert f"{LAYER}{linear}.weight_packed" in tensors
        for norm in layout.norms:
            assert f"{LAYER}{norm}.weight" in tensors


def test_fused_linears_hold_the_rows_of_their_parts() -> None:
    tensors = expected("Phi3ForCausalLM", fused())
    # 4 query heads and 2 each of keys and values, of 16 channels
    assert tensors[f"{LAYER}self_attn.qkv_proj.weight_packed"].shape == (8 * 16, HIDDEN // 2)
    assert tensors[f"{LAYER}mlp.gate_up_proj.weight_scale"].shape == (2 * INTERMEDIATE, 1)
    with pytest.raises(UserError, match=r"mlp\.gate_up_proj is neither in a site nor in ignore"):
        expected(
            "Phi3ForCausalLM",
            quantization_config()
            | {"sites": fused()["sites"] | {"mlp": quantization_config()["sites"]["mlp"]}},
        )


def test_biases() -> None:
    tensors = expected("Qwen2ForCausalLM", quantization_config())
    biases = {name.removeprefix(LAYER) for name in tensors if name.startswith(LAYER)}
    biases = {name for name in biases if name.endswith(".bias")}
    assert biases == {f"self_attn.{part}_proj.bias" for part in "qkv"}
    for name, count in ("Gemma3ForCausalLM", 4), ("Olmo2ForCausalLM", 4), ("MistralForCausalLM", 0):
        tensors = expected(name, quantization_config(), attention_bias=True)
        assert sum(tensor.endswith(".bias") for tensor in tensors) == 2 * count


def test_head_norms_and_norms_over_all_heads() -> None:
    for name, widths in ("Qwen3ForCausalLM", (16, 16)), ("Olmo2ForCausalLM", (64, 32)):
        tensors = expected(name, quantization_config())
        shapes = [tensors[f"{LAYER}self_attn.{part}_norm.weight"].shape[0] for part in "qk"]
        assert tuple(shapes) == widths


def test_an_embedding_of_eight_bits() -> None:
    tensors = expected("LlamaForCausalLM", quantization_config(embedding={"bits": 8}))
    assert "model.embed_tokens.weight" not in tensors
    assert tensors["model.embed_tokens.weight_packed"] == ((VOCABULARY, HIDDEN), (torch.int8,))
    assert tensors["model.embed_tokens.weight_scale"] == ((VOCABULARY, 1), (torch.float16,))
    with pytest.raises(UserError, match="the embedding of MixtralForCausalLM stays in 16 bit"):
        expected("MixtralForCausalLM", quantization_config(embedding={"bits": 8}))
    with pytest.raises(UserError, match=r"tie_word_embeddings must be false .* an embedding"):
        expected(
            "LlamaForCausalLM",
            quantization_config(embedding={"bits": 8}, head=None, ignore=["lm_head"]),
            tie_word_embeddings=True,
        )


def test_a_head_that_is_the_embedding() -> None:
    assert not any(
        "lm_head" in name
        for name in expected(
            "Gemma2ForCausalLM", quantization_config(head=None), tie_word_embeddings=True
        )
    )
    with pytest.raises(UserError, match="the head of Gemma2ForCausalLM is its embedding"):
        expected("Gemma2ForCausalLM", quantization_config())
