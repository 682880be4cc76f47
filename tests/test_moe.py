"""Mixtures of experts without an engine: choosing the method, refusing, sharding, loading."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_checkpoint import quantization_config

from vllm_offq import kernels
from vllm_offq.errors import UserError

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_offq.config import OffQConfig
from vllm_offq.format import pack_int4
from vllm_offq.kernels import ops
from vllm_offq.kernels.reference import silu_and_mul
from vllm_offq.moe import OffQMoEMethod
from vllm_offq.quantizer import fake_quantize
from vllm_offq.rotation import apply_block_hadamard

EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 128
PREFIX = "model.layers.0.mlp.experts"
NAMES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
NAMES |= {"down_proj": (HIDDEN, INTERMEDIATE)}


def config(**changes: Any) -> OffQConfig:
    return OffQConfig.from_config(quantization_config(**changes))


def expert_layer(tp_size: int = 1, tp_rank: int = 0, ep_rank: int | None = None) -> Any:
    """What vLLM builds, without its constructor, which would need an engine.

    ep_rank: with one expert on each rank.
    """
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    local = list(range(EXPERTS)) if ep_rank is None else [ep_rank]
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[local] = torch.arange(len(local), dtype=torch.int32)
    layer._expert_map = None if ep_rank is None else expert_map
    layer.layer_name, layer.quant_config = PREFIX, None
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "gate_proj", "up_proj"
    layer.ckpt_down_proj_name, layer.lora_base_layer_prefix = "down_proj", ""
    layer.is_fused_checkpoint_transposed = layer.apply_router_weight_on_input = False
    layer.swiglu_limit = layer.swiglu_alpha = layer.swiglu_beta = None
    layer._fused_shared_expert_quantizer = None
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, INTERMEDIATE // tp_size
    layer.global_num_experts, layer.local_num_experts = EXPERTS, len(local)
    layer.moe_config = SimpleNamespace(
        num_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        is_act_and_mul=True,
        has_bias=False,
        tp_size=tp_size,
        tp_rank=tp_rank,
        dp_size=1,
        is_sequence_parallel=False,
        tp_shard_with_padding=False,
        moe_parallel_config=SimpleNamespace(tp_size=tp_size),
    )
    layer.expert_map_manager = SimpleNamespace(
        num_fused_shared_experts=0, map_global_to_local=lambda e: int(expert_map[e])
    )
    return layer


def with_weights(layer: Any, **changes: Any) -> Any:
    layer.quant_method = config(**changes).get_quant_method(layer, PREFIX)
    assert isinstance(layer.quant_method, OffQMoEMethod)
    layer.quant_method.create_weights(
        layer,
        layer.local_num_experts,
        HIDDEN,
        layer.intermediate_size_per_partition,
        torch.bfloat16,
        weight_loader=layer.weight_loader,
        global_num_experts=EXPERTS,
    )
    return layer


def tensors(group_size: int | None = None) -> dict[str, torch.Tensor]:
    """Of a checkpoint, as vLLM names them within the layer."""
    torch.manual_seed(0)
    stored = {}
    for expert in range(EXPERTS):
        for name, (out_features, in_features) in NAMES.items():
            codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
            scale = torch.rand(out_features, in_features // (group_size or in_features)) / 20
            stored[f"{expert}.{name}.weight_packed"] = pack_int4(codes)
            stored[f"{expert}.{name}.weight_scale"] = scale.half()
    return stored


def load(layer: Any, stored: dict[str, torch.Tensor]) -> None:
    assert len(list(layer.load_weights(stored.items()))) == 6 * layer.local_num_experts


def run(layer: Any, x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    topk_weights = torch.tensor([[0.75, 0.25]]).expand(len(x), 2)
    return layer.quant_method.apply(layer, x, topk_weights, topk_ids, None, None)


def expected(x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Plain torch on dequantized weights, by the sites of sample_checkpoint."""
    stored, y = tensors(), torch.zeros_like(x)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        packed, scale = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale"))
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
        return fake_quantize(x, 32, clip_ratio=0.95) @ (codes * scale.float()).T

    for t in range(len(x)):
        for expert, weight in zip(topk_ids[t].tolist(), (0.75, 0.25), strict=True):
            gate_up = [linear(x[t], f"{expert}.{name}") for name in ("gate_proj", "up_proj")]
            activated = silu_and_mul(torch.cat(gate_up))
            rotated = apply_block_hadamard(activated, 32)
            y[t] += weight * linear(rotated, f"{expert}.down_proj")
    return y


IDS = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1]], dtype=torch.int32)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, HIDDEN)


def test_a_layer_computes_its_experts(x: torch.Tensor) -> None:
    layer = with_weights(expert_layer())
    load(layer, tensors())
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(run(layer, x, IDS), expected(x, IDS))


def test_weights_are_kept_once(x: torch.Tensor) -> None:
    layer = with_weights(expert_layer())
    load(layer, tensors())
    layer.quant_method.process_weights_after_loading(layer)
    parts = [
        f"{name}_weight_{part}" for name in ("w13", "w2") for part in ("codes", "scale", "sums")
    ]
    assert [name for name, _ in layer.named_parameters()] == parts
    assert layer.w13_weight_codes.nbytes == EXPERTS * INTERMEDIATE * HIDDEN


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_takes_its_part(rank: int, group_size: int | None) -> None:
    sites = quantization_config()["sites"]
    del sites["attention_output"]  # whose groups are smaller than those of the others
    weights = {"bits": 4, "group_size": group_size}
    layer = with_weights(expert_layer(tp_size=2, tp_rank=rank), weights=weights, sites=sites)
    stored, part = tensors(group_size), slice(rank * 64, rank * 64 + 64)
    load(layer, stored)
    for expert in range(EXPERTS):
        for suffix in ("weight_packed", "weight_scale"):
            gate, up, down = (stored[f"{expert}.{name}.{suffix}"] for name in NAMES)
            w13 = getattr(layer, f"w13_{suffix}")[expert]
            assert torch.equal(w13, torch.cat([gate[part], up[part]]))
            if down.shape[1] > 1:
                down = down.chunk(2, 1)[rank]
            assert torch.equal(getattr(layer, f"w2_{suffix}")[expert], down)


def test_ranks_of_an_expert_group_add_up(x: torch.Tensor) -> None:
    total = torch.zeros_like(x)
    for rank in range(EXPERTS):
        layer = with_weights(expert_layer(ep_rank=rank))
        load(layer, tensors())
        layer.quant_method.process_weights_after_loading(layer)
        total += run(layer, x, IDS)
    torch.testing.assert_close(total, expected(x, IDS))


def test_a_tensor_parallel_size_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"size 8 cuts .* w2 of .*mlp.experts; .*for it: 1, 2, 4"):
        with_weights(expert_layer(tp_size=8))


@pytest.mark.parametrize("missing", ["1.up_proj", "1.down_proj"])
def test_a_missing_expert_is_refused(missing: str) -> None:
    layer = with_weights(expert_layer())
    stored = tensors()
    del stored[f"{missing}.weight_scale"]
    list(layer.load_weights(stored.items()))
    with pytest.raises(UserError, match=r"mlp.experts: weight_scale of .* expert 1 .* is missing"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 7.0}, "a clamped activation"),
        ({"apply_router_weight_on_input": True}, "router weights applied to .*input"),
        ({"activation": MoEActivation.GELU}, "gelu as the experts' activation"),
        ({"has_bias": True}, "biases of experts"),
        ({"dp_size": 2}, "data parallelism"),
    ],
)
def test_unsupported_experts_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    layer = expert_layer()
    for name, value in changes.items():
        setattr(layer if hasattr(layer, name) else layer.moe_config, name, value)
    with pytest.raises(UserError, match=f"{message}.* not supported by OffQ yet: {PREFIX}"):
        config().get_quant_method(layer, PREFIX)


def test_ignored_experts_are_left_to_vllm() -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    assert config(ignore=names).get_quant_method(expert_layer(), PREFIX) is None
    for some in names[:2], [f"{PREFIX}.1.down_proj"]:
        with pytest.raises(UserError, match=r"computes the experts .*mlp.experts together"):
            config(ignore=some).get_quant_method(expert_layer(), PREFIX)


def test_experts_in_no_site_are_refused() -> None:
    layer = expert_layer()
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "w1", "w3"
    with pytest.raises(UserError, match="neither quantized nor ignored"):
        config().get_quant_method(layer, PREFIX)
    layer.ckpt_gate_proj_name = "gate_proj"
    with pytest.raises(UserError, match="gate_proj and w3 as one linear"):
        config().get_quant_method(layer, PREFIX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operator_can_be_compiled(dtype: torch.dtype) -> None:
    linears: list[Any] = []
    for outputs, inputs in (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE):
        packed = torch.randint(0, 256, (EXPERTS, outputs, inputs // 2), dtype=torch.uint8)
        scale = torch.rand(EXPERTS, outputs, 1).half() / 20
        weights = [
            kernels.backend().prepare_weight(*e, 32) for e in zip(packed, scale, strict=True)
        ]
        stacked = [torch.stack(parts) for parts in zip(*weights, strict=True)]
        linears += [stacked, outputs, 32, 0, 0.95, False, 4]
    arguments = (torch.randn(4, HIDDEN, dtype=dtype), IDS, torch.rand(4, 2), *linears)
    torch.library.opcheck(ops.experts, arguments, test_utils=("test_schema", "test_faketensor"))
