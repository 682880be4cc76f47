"""The pass that fuses inputs into OffQ linears, where vLLM compiles a model."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from fused_linears import CHANNELS, linear, parameters
from test_plugin import bare, offq_config
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.inductor_pass import CallableInductorPass
from vllm.config import CompilationMode, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase

from vllm_offq import fusion, kernels

pytestmark = pytest.mark.usefixtures("reference_kernels")
KEY = "post_grad_custom_post_pass"


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
