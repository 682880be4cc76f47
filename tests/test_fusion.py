"""Norms and activations that become one operator with the OffQ linear that reads them."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from test_plugin import bare, offq_config
from torch._inductor.pattern_matcher import fwd_only
from vllm import ir
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.inductor_pass import CallableInductorPass
from vllm.config import CompilationMode, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase

from vllm_offq import fusion, kernels
from vllm_offq.kernels import ops

KEY = "post_grad_custom_post_pass"
EPSILON = 1e-6
CHANNELS, GROUP_SIZE = 64, 32

silu_and_mul = SiluAndMul.forward_native


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    kernels.backend.cache_clear()
    yield
    kernels.backend.cache_clear()


def parameters(channels: int = CHANNELS, outputs: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    packed = torch.randint(0, 256, (outputs, channels // 2), dtype=torch.uint8)
    scale = torch.rand(outputs, 1).half()
    return kernels.backend().prepare_weight(packed, scale, GROUP_SIZE)


def linear(x: Tensor, *weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, *weight, bias, len(weight[0]), GROUP_SIZE, 0, 1.0, False, 4)


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


def some_config(**passes: Any) -> Any:
    return SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=passes))


def test_the_pass_is_set_once() -> None:
    config = some_config()
    options = config.compilation_config.inductor_compile_config
    fusion.fuse_inputs(config)
    first = options[KEY]
    fusion.fuse_inputs(config)
    assert isinstance(first, fusion.FuseInputsPass)
    assert options == {KEY: first}


def test_a_pass_of_the_user_stays(caplog: pytest.LogCaptureFixture) -> None:
    mine = CallableInductorPass(lambda graph: None, uuid="mine")
    config = some_config(**{KEY: mine})
    with caplog.at_level(logging.WARNING, logger="vllm_offq"):
        fusion.fuse_inputs(config)
    assert config.compilation_config.inductor_compile_config == {KEY: mine}
    assert f"OffQ fuses no norms and activations with linears: {KEY} is already" in caplog.text


def test_kernels_without_fused_linears_have_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    features = kernels.backend().FEATURES._replace(fused_inputs=False)
    monkeypatch.setattr(kernels.backend(), "FEATURES", features)
    config = some_config()
    fusion.fuse_inputs(config)
    assert config.compilation_config.inductor_compile_config == {}


@pytest.mark.parametrize("compiles", [False, True])
def test_linears_set_the_pass_where_vllm_compiles(compiles: bool) -> None:
    config = vllm_config(CompilationMode.VLLM_COMPILE if compiles else CompilationMode.NONE)
    with set_current_vllm_config(config):
        offq_config().get_quant_method(bare(LinearBase), "model.layers.0.mlp.down_proj")
    assert (KEY in config.compilation_config.inductor_compile_config) == compiles


def vllm_config(mode: CompilationMode) -> VllmConfig:
    """As for a GPU, which vLLM would change for this machine."""
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    compilation = config.compilation_config
    compilation.mode, compilation.backend = mode, "inductor"
    compilation.ir_enable_torch_wrap = True
    compilation.compile_sizes = []
    return config


class Block(nn.Module):
    """The linears of a decoder block, without its attention."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(CHANNELS) for _ in range(3))
        sizes = (CHANNELS, CHANNELS), (CHANNELS, 2 * CHANNELS), (CHANNELS, CHANNELS)
        self.weights = nn.ModuleList(
            nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parameters(*size))
            for size in sizes
        )
        self.activation = SiluAndMul()
        fusion.fuse_inputs(vllm_config)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        attention, gate_up, down = self.weights
        x = linear(self.norms[0](x), *attention)
        x, residual = self.norms[1](x, residual)
        x = linear(self.activation(linear(x, *gate_up)), *down)
        return self.norms[2](x, residual)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_vllm_runs_the_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A model that vLLM's own backend compiles, as it does for a GPU."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    config = vllm_config(CompilationMode.VLLM_COMPILE)
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, CHANNELS)
    compiled = support_torch_compile(dynamic_arg_dims={"x": 0, "residual": 0})(Block)
    with (
        torch.no_grad(),
        set_current_vllm_config(config),
        set_forward_context(None, config),
        caplog.at_level(logging.DEBUG, logger="vllm_offq"),
    ):
        block = compiled(vllm_config=config)
        expected = block.forward(x.clone(), residual.clone())
        actual = block(x.clone(), residual.clone())
    assert "OffQ fused the inputs of 3 linears" in caplog.text
    torch.testing.assert_close(actual, expected)
