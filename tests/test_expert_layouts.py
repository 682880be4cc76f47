"""Names and shapes of the linears of mixtures of experts."""

from typing import Any

import pytest
from sample_checkpoint import HEAD_DIM, HIDDEN, INTERMEDIATE, KV_HEADS, model_config
from sample_checkpoint import quantization_config as sample_quantization_config

from vllm_offq.errors import UserError
from vllm_offq.format import parse_config
from vllm_offq.manifest import expected_tensors

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2, "moe_intermediate_size": 96}


def quantization_config(**changes: Any) -> dict[str, Any]:
    raw = sample_quantization_config(**{"ignore": ["gate"]} | changes)
    raw["sites"]["mlp"]["modules"] += ["w1", "w3"]
    raw["sites"]["mlp_output"]["modules"] += ["w2"]
    return raw


def shapes(architecture: dict[str, Any], **changes: Any) -> dict[str, tuple[int, ...]]:
    """Of one block, without attention and norms."""
    config = parse_config(quantization_config())
    expected = expected_tensors(model_config(**architecture | changes), config)
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): spec.shape
        for name, spec in expected.items()
        if name.startswith(prefix) and not ("attn" in name or "norm" in name)
    }


@pytest.mark.parametrize(
    ("architecture", "mixture", "names", "width"),
    [
        (MIXTRAL, "block_sparse_moe", ("w1", "w3", "w2"), INTERMEDIATE),
        (QWEN3, "mlp", ("gate_proj", "up_proj", "down_proj"), 96),
    ],
)
def test_experts(
    architecture: dict[str, Any], mixture: str, names: tuple[str, str, str], width: int
) -> None:
    expected: dict[str, tuple[int, ...]] = {f"{mixture}.gate.weight": (2, HIDDEN)}
    outputs, inputs = (width, width, HIDDEN), (HIDDEN, HIDDEN, width)
    for expert in range(2):
        for name, n, k in zip(names, outputs, inputs, strict=True):
            prefix = f"{mixture}.experts.{expert}.{name}"
            expected[f"{prefix}.weight_packed"] = (n, k // 2)
            expected[f"{prefix}.weight_scale"] = (n, 1)
    assert shapes(architecture) == expected


def test_the_number_of_experts_has_two_names() -> None:
    renamed = {key: value for key, value in QWEN3.items() if key != "num_experts"}
    assert shapes(renamed, num_local_experts=2) == shapes(QWEN3)


@pytest.mark.parametrize("sparse", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_a_block_may_have_an_mlp_instead(sparse: dict[str, Any]) -> None:
    assert shapes(QWEN3, **sparse)["mlp.gate_proj.weight_packed"] == (INTERMEDIATE, HIDDEN // 2)


def test_heads_have_norms() -> None:
    expected = expected_tensors(model_config(**QWEN3), parse_config(quantization_config()))
    assert expected["model.layers.1.self_attn.k_norm.weight"].shape == (HEAD_DIM,)
    keys = (KV_HEADS * HEAD_DIM, HIDDEN // 2)
    assert expected["model.layers.1.self_attn.k_proj.weight_packed"].shape == keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts must be a positive number, not None"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive number, not 0"),
        ({"decoder_sparse_step": "2"}, "decoder_sparse_step must be a positive number, not '2'"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list, not 1"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {message}"):
        shapes(QWEN3, **changes)


def test_a_quantized_router_is_refused() -> None:
    config = parse_config(quantization_config(ignore=[]))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate must be in ignore"):
        expected_tensors(model_config(**QWEN3), config)
