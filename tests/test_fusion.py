"""Norms and activations that become one operator with the OffQ linear that reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from fused_linears import CHANNELS, GROUP_SIZE, linear, parameters
from torch._inductor.pattern_matcher import fwd_only
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_offq import fusion
from vllm_offq.kernels import ops

EPSILON = 1e-6

pytestmark = pytest.mark.usefixtures("reference_kernels")
silu_and_mul = SiluAndMul.forward_native


def norm_linear(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(ir.ops.rms_norm(x, norm_weight, EPSILON), *weight)


def add_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, *weight: Tensor
) -> tuple[Tensor, ...]:
    """The sum is read before the linear, and after it."""
    normalized, total = ir.ops.fused_add_rms_norm(x, residual, norm_weight, EPSILON)
    doubled = 2 * total
    return linear(normalized, *weight), total, doubled


def activation_linear(x: Tensor, *weight: Tensor) -> Tensor:
    return linear(silu_and_mul(x), *weight)


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Weights of powers of two: times them nothing is rounded, where vLLM rounds more often."""
    weight = 2.0 ** torch.randint(-2, 3, (CHANNELS,))
    return [torch.randn(5, CHANNELS).to(dtype), weight.to(dtype)]


def gate_up(dtype: torch.dtype) -> Tensor:
    """Gates whose sigmoid is 1, and products that every dtype holds."""
    return torch.cat([torch.randint(low, 28, (5, CHANNELS)) for low in (20, -9)], 1).to(dtype)


def operators(graph: torch.fx.Graph) -> list[str]:
    graph.eliminate_dead_code()
    targets = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in targets if name.startswith(("vllm", "aten"))]


def fuse(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """Operators after the pass, which must not change what is computed."""
    traced = fwd_only(function, inputs)
    expected = traced(*inputs)
    fusion.FuseInputsPass()(traced.graph)
    names = operators(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), expected, rtol=0, atol=0)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestFused:
    def test_norm(self, dtype: torch.dtype) -> None:
        inputs = *norm_inputs(dtype), *parameters()
        assert fuse(norm_linear, *inputs) == ["rms_norm_linear"]

    def test_norm_with_a_weight_in_float32(self, dtype: torch.dtype) -> None:
        """Gemma's, which is 1 + w."""

        def gemma(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
            return norm_linear(x, norm_weight.float() + 1.0, *weight)

        x, weight = norm_inputs(dtype)
        assert fuse(gemma, x, weight - 1, *parameters())[-1] == "rms_norm_linear"

    def test_norm_of_a_sum(self, dtype: torch.dtype) -> None:
        x, weight = norm_inputs(dtype)
        names = fuse(add_norm_linear, x, torch.randn_like(x), weight, *parameters())
        assert sorted(names) == ["fused_add_rms_norm_linear", "mul"]

    @pytest.mark.parametrize("shape", [(-1,), (1, 5, -1)])
    def test_activation(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x = gate_up(dtype).view(*shape[:-1] or (5,), -1)
        assert fuse(activation_linear, x, *parameters()) == ["silu_and_mul_linear"]

    def test_linears_after_each_other(self, dtype: torch.dtype) -> None:
        def mlp(x: Tensor, norm_weight: Tensor, *weights: Tensor) -> Tensor:
            return activation_linear(norm_linear(x, norm_weight, *weights[:3]), *weights[3:])

        weights = *parameters(outputs=2 * CHANNELS), *parameters()
        traced = fwd_only(mlp, (*norm_inputs(dtype), *weights))
        fusion.FuseInputsPass()(traced.graph)
        assert operators(traced.graph) == ["rms_norm_linear", "silu_and_mul_linear"]


def read_twice(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
    normalized = ir.ops.rms_norm(x, norm_weight, EPSILON)
    return linear(normalized, *weight), normalized


def read_by_two_linears(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
    normalized = ir.ops.rms_norm(x, norm_weight, EPSILON)
    return linear(normalized, *weight), linear(normalized, *weight)


def without_weight(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(ir.ops.rms_norm(x, None, EPSILON), *weight)


def of_some_channels(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(ir.ops.rms_norm(x, norm_weight, EPSILON, CHANNELS // 2), *weight)


def one_weight_for_all(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(ir.ops.rms_norm(x, norm_weight[:1], EPSILON), *weight)


def sum_read_twice(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
    normalized, total = ir.ops.fused_add_rms_norm(x, x, norm_weight, EPSILON)
    return linear(normalized, *weight), normalized, total


def bias_of_the_sum(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    normalized, total = ir.ops.fused_add_rms_norm(x, x, norm_weight, EPSILON)
    return linear(normalized, *weight, bias=total.flatten()[: len(weight[0])])


def sum_itself(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
    normalized, total = ir.ops.fused_add_rms_norm(x, x, norm_weight, EPSILON)
    return linear(total, *weight), normalized


def another_tuple(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(torch.ops.aten.sort(x)[0], *weight)


def norm_elsewhere(x: Tensor, norm_weight: Tensor, *weight: Tensor) -> Tensor:
    return linear(torch.relu(ir.ops.rms_norm(x, norm_weight, EPSILON)), *weight)


@pytest.mark.parametrize(
    "function",
    [
        read_twice,
        read_by_two_linears,
        without_weight,
        of_some_channels,
        one_weight_for_all,
        sum_read_twice,
        bias_of_the_sum,
        sum_itself,
        another_tuple,
        norm_elsewhere,
    ],
)
def test_other_norms_are_left_alone(function: Callable[..., Any]) -> None:
    assert "linear" in fuse(function, *norm_inputs(torch.bfloat16), *parameters())


def silu_times(x: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(x[:, :CHANNELS]) * up


@pytest.mark.parametrize(
    "activate",
    [
        lambda x: nn.functional.gelu(x[:, :CHANNELS]) * x[:, CHANNELS:],
        lambda x: nn.functional.silu(x[:, CHANNELS:]) * x[:, :CHANNELS],
        lambda x: silu_times(x, x[:, :CHANNELS]),
        lambda x: silu_times(torch.cat([x, x], 1), x[:, CHANNELS:]),
        lambda x: silu_times(y := torch.cat([x, x], 1), y[:, CHANNELS : 2 * CHANNELS]),
        lambda x: silu_times(y := x[:, : CHANNELS + 1] + 1, y[:, CHANNELS:]),
    ],
    ids=["gelu", "exchanged", "gates twice", "of two", "of a part", "one for all"],
)
def test_other_activations_are_left_alone(activate: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, *weight: Tensor) -> Tensor:
        return linear(activate(x), *weight)

    assert "linear" in fuse(function, gate_up(torch.float32), *parameters())


def test_an_activation_that_is_read_twice_is_left_alone() -> None:
    def function(x: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
        activated = silu_and_mul(x)
        return linear(activated, *weight), activated

    assert "linear" in fuse(function, gate_up(torch.float32), *parameters())


@pytest.mark.parametrize("operator", ["rms_norm", "fused_add_rms_norm", "silu_and_mul"])
def test_operators_can_be_compiled(operator: str) -> None:
    x = torch.randn(5, CHANNELS, dtype=torch.bfloat16)
    inputs = {
        "rms_norm": (x, torch.ones(CHANNELS), EPSILON),
        "fused_add_rms_norm": (x, x, torch.ones(CHANNELS), EPSILON),
        "silu_and_mul": (torch.cat([x, x], 1),),
    }[operator]
    arguments = *inputs, *parameters(), None, 40, GROUP_SIZE, 0, 0.95, False, 4
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(getattr(ops, f"{operator}_linear"), arguments, test_utils=checks)
