"""What is chosen or refused before any long work: group sizes, settings, memory."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig

from calibration.architectures import find_architecture
from calibration.plan import pick_group_size, plan
from calibration.settings import Settings
from vllm_offq.errors import UserError
from vllm_offq.format import CheckpointConfig

LLAMA = find_architecture(["LlamaForCausalLM"])
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
)
LLAMA3 = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
)


def sizes(config: CheckpointConfig) -> list[int]:
    return [site.group_size for site in config.sites.values()]


@pytest.mark.parametrize(
    ("widths", "asked", "size"),
    [
        ({"q_proj": 4096, "down_proj": 14336}, None, 128),
        ({"q_proj": 576, "down_proj": 1536}, None, 64),
        ({"q_proj": 4096, "down_proj": 14336}, 64, 64),
    ],
)
def test_group_size(widths: dict[str, int], asked: int | None, size: int) -> None:
    assert pick_group_size(widths, asked) == size


@pytest.mark.parametrize("asked", [128, None])
def test_refusal_names_the_linear_and_what_can_work(asked: int | None) -> None:
    with pytest.raises(UserError, match=r"down_proj with 96 input .* from \[32, 16\]"):
        pick_group_size({"q_proj": 128, "down_proj": 96}, asked)
    with pytest.raises(UserError, match="none of 16 to 256"):
        pick_group_size({"q_proj": 50}, asked)


def test_offq_groups_by_the_default_size_and_heads_by_theirs() -> None:
    assert sizes(plan(SMOLLM2, LLAMA, Settings())) == [64, 64, 64, 64]
    assert sizes(plan(LLAMA3, LLAMA, Settings())) == [128, 128, 128, 128]
    cache = plan(LLAMA3, LLAMA, Settings()).kv_cache
    assert cache is not None and cache.group_size == 128


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_bits": 4},
        {"activation_bits": 8},
        {"head_bits": "2"},
        {"dtype": "int8"},
        {"weights": "awq"},
        {"recipe": "spinquant"},
    ],
)
def test_what_is_no_choice_is_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    option = name.replace("_", "-")
    with pytest.raises(UserError, match=f"^--{option} {value!r} is unknown; choose from [a-z48]"):
        Settings(**wrong)


def test_a_head_that_is_the_embedding_has_no_four_bits() -> None:
    config = Gemma2Config(hidden_size=256, num_attention_heads=4, head_dim=64)
    gemma = find_architecture(["Gemma2ForCausalLM"]).of(config)
    assert plan(config, gemma, Settings()).head is None
    with pytest.raises(UserError, match="--head-bits 4 is not supported for Gemma2ForCausalLM"):
        plan(config, gemma, Settings(head_bits="4"))


@pytest.mark.parametrize(
    ("dim", "group_size", "cache_group_size"),
    [(64, 32, 32), (64, 16, 32), (128, 64, 64), (128, 32, 64), (96, 16, 48), (96, 32, 96)],
)
def test_caches_have_groups_of_half_a_head_at_least(
    dim: int, group_size: int, cache_group_size: int
) -> None:
    model = LlamaConfig(hidden_size=4 * dim, intermediate_size=512, head_dim=dim)
    model.num_attention_heads, model.num_key_value_heads = 4, 2
    config = plan(model, LLAMA, Settings(group_size=group_size))
    assert config.kv_cache is not None and config.kv_cache.group_size == cache_group_size
    assert config.sites["attention_output"].group_size == group_size


def test_peers_round_whole_tokens() -> None:
    for recipe in ("quarot", "rtn"):
        config = plan(SMOLLM2, LLAMA, Settings(recipe=recipe))
        assert sizes(config) == [576, 576, 576, 1536]
        assert all(site.symmetric for site in config.sites.values())
        assert config.kv_cache is not None and config.kv_cache.group_size == 64


def test_weight_groups_are_one_or_several_of_the_activations() -> None:
    settings = Settings(weight_group_size=64)
    assert plan(SMOLLM2, LLAMA, settings).weights.group_size == 64
    finer = plan(LLAMA3, LLAMA, replace(settings, group_size=32))
    assert (sizes(finer), finer.weights.group_size) == ([32, 32, 32, 32], 64)
    with pytest.raises(UserError, match=r"64 does not work for .* 128 that share a scale"):
        plan(LLAMA3, LLAMA, settings)
    with pytest.raises(UserError, match=r"128 does not work for .* 576 input channels"):
        plan(SMOLLM2, LLAMA, replace(settings, weight_group_size=128))
