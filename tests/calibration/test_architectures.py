"""Each model family from end to end, and what is refused of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, make_tiny
from transformers import AutoModelForCausalLM, PreTrainedConfig

from calibration.architectures import ARCHITECTURES, find_architecture
from calibration.pipeline import quantize
from calibration.plan import plan
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.architectures import LAYOUTS
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError

KL = 0.2
"""Of rounding the tiny models to 4 bits; a rotation in the wrong place gives 2 and more."""


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    config_class, values = FAMILIES[family]
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 1024}
    sizes["num_hidden_layers"] = 2
    return getattr(transformers, f"{config_class}Config")(**values | sizes | changes)


def test_one_table_a_layout() -> None:
    assert ARCHITECTURES.keys() == LAYOUTS.keys()
    dense = {name for name, layout in LAYOUTS.items() if layout.experts is None}
    assert {f"{family}ForCausalLM" for family in FAMILIES} == dense


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized(family: str, tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "model", family)
    out = tmp_path / "offq"
    quantize(str(source), out, Settings(samples=4, sequence_length=64))
    validate_checkpoint(out)
    tied = LAYOUTS[f"{family}ForCausalLM"].head_is_embedding
    config = Checkpoint(out).config
    assert (config.head is None) == tied
    tokens = torch.randint(2, 400, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        original, simulated = (
            model(tokens).logits.log_softmax(-1)
            for model in (
                AutoModelForCausalLM.from_pretrained(
                    source, dtype=torch.float32, attn_implementation="eager"
                ),
                load_simulated(out)[0],
            )
        )
    assert float((original.exp() * (original - simulated)).sum(-1).mean()) < KL


@pytest.mark.parametrize("recipe", ["quarot", "rtn"])
@pytest.mark.parametrize("family", ["Gemma3", "Olmo2", "Phi3"])
def test_peers_are_valid(family: str, recipe: str, tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "model", family)
    settings = Settings(recipe=recipe, weights="rtn", samples=2, sequence_length=32)  # type: ignore[arg-type]
    quantize(str(source), tmp_path / "offq", settings)
    validate_checkpoint(tmp_path / "offq")


def test_output_norms_take_the_rotation_online() -> None:
    architecture = find_architecture(["Gemma3ForCausalLM"])
    offq = plan(config_of("Gemma3"), architecture, Settings()).sites
    assert [site.online_hadamard for site in offq.values()] == [128, None, 128, 128]
    assert offq["attention_input"].fused_rotation == "permutation"
    quarot = plan(config_of("Gemma3"), architecture, Settings(recipe="quarot")).sites
    assert [site.online_hadamard for site in quarot.values()] == [512, None, 512, 1024]
    with pytest.raises(UserError, match=r"--basis sink does nothing for Gemma3ForCausalLM, .*out"):
        plan(config_of("Gemma3"), architecture, Settings(basis="sink"))


def changed(name: str, value: Any) -> Callable[[PreTrainedConfig], None]:
    return lambda config: setattr(config, name, value)


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        ("Qwen2", changed("layer_types", ["sliding_attention"]), "sliding windows in some layers"),
        ("Phi3", changed("layer_types", ["sliding_attention"]), "sliding windows in some layers"),
        ("Qwen2", changed("dual_chunk_attention_config", {"a": 1}), "dual chunk attention"),
        ("Qwen3", changed("attention_bias", True), "biases in attention"),
        ("Gemma2", changed("hidden_activation", "relu"), "the activation relu"),
        ("Gemma3", changed("use_bidirectional_attention", True), "bidirectional attention"),
        ("Mistral", changed("layer_types", ["chunked_attention"]), "layers of chunked_attention"),
        ("Olmo2", changed("is_causal", False), "attention that is not causal"),
    ],
)
def test_variants_are_refused(
    family: str, change: Callable[[PreTrainedConfig], None], sentence: str
) -> None:
    config = config_of(family)
    change(config)
    name = f"{family}ForCausalLM"
    with pytest.raises(UserError, match=f"^{name} with {sentence}.* is not supported$"):
        plan(config, find_architecture([name]), Settings())


def test_a_width_without_hadamard_matrix_is_refused_before_the_work() -> None:
    architecture = find_architecture(["Olmo2ForCausalLM"])
    config = config_of("Olmo2", hidden_size=344)
    with pytest.raises(UserError, match="Hadamard"):
        plan(config, architecture, Settings(recipe="quarot"))
