"""What of the GPU benchmark needs no GPU."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

pytest.importorskip("triton", reason="install triton to run this")

import torch

from benchmarks import gpu, gpu_contenders


def report() -> gpu.Report:
    comparison = gpu.Comparison(
        kernel="linear",
        case="qkv, 1 tokens",
        medians={"OffQ": 10.0, "cuBLAS bf16": 40.0, "Marlin W4A16": 12.5},
        unavailable={"Machete W4A16": "NotImplementedError: Machete requires [9.0]"},
    )
    return gpu.Report(
        device="a GPU",
        capability=(8, 9),
        driver="1.2.3",
        versions={"torch": torch.__version__},
        date="2026-01-01T00:00+00:00",
        rounds=5,
        comparisons=[comparison],
    )


def test_report_survives_being_written(tmp_path: Path) -> None:
    report().write(tmp_path / "gpu.json")
    text = (tmp_path / "gpu.json").read_text()
    assert gpu.Report.model_validate_json(text) == report()


def test_strongest_other() -> None:
    (comparison,) = report().comparisons
    assert comparison.strongest_other() == ("Marlin W4A16", 1.25)
    comparison.medians = {"OffQ": 10.0}
    name, ratio = comparison.strongest_other()
    assert name == ""
    assert math.isnan(ratio)


def test_table_names_who_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    console = gpu.Console(width=150, highlight=False)
    console.print(gpu.tabulate(report().comparisons))
    printed = capsys.readouterr().out
    for expected in ("1.25", "no Machete W4A16 in 1 cases", "Machete requires [9.0]"):
        assert expected in printed


@dataclass
class Contenders:
    """Of `compare`: one that fails when it is built, two others."""

    turns: list[str] = field(default_factory=list)

    def builds(self) -> gpu_contenders.Builds:
        return {"OffQ": self.build("OffQ"), "broken": self.broken, "other": self.build("other")}

    def build(self, name: str) -> Callable[[], gpu.Call]:
        return lambda: lambda: self.turns.append(name)

    def broken(self) -> gpu.Call:
        raise ImportError("no such kernel\nin this build")


def test_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    def microseconds(call: gpu.Call, _: torch.Tensor) -> float:
        call()
        return float(len(contenders.turns))

    contenders = Contenders()
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "record", lambda call: call)
    monkeypatch.setattr(gpu, "microseconds", microseconds)
    comparison = gpu.compare("linear", "case", lambda: contenders, rounds=3)
    assert contenders.turns == ["OffQ", "other"] * 3
    assert comparison.medians == {"OffQ": 3.0, "other": 4.0}
    assert comparison.unavailable == {"broken": "ImportError: no such kernel"}


def test_comparing_on_a_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def microseconds(*_: object) -> float:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with ...")

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "record", lambda call: call)
    monkeypatch.setattr(gpu, "microseconds", microseconds)
    comparison = gpu.compare("linear", "case", Contenders, rounds=3)
    assert not comparison.medians
    assert comparison.unavailable["contender at all"] == (
        "RuntimeError: CUDA error: an illegal memory access"
    )


@pytest.fixture
def small_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = pytest.importorskip("vllm.v1.worker.workspace", reason="install vLLM to run this")
    monkeypatch.setattr(workspace, "_manager", None)
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_contenders, "FILLED_TOKENS", 64)
    monkeypatch.setitem(gpu_contenders.LAYERS, "small", (128, 256, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    cores = SimpleNamespace(multi_processor_count=170)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: cores)


@pytest.mark.parametrize("name", gpu_contenders.VLLM_LINEARS)
@pytest.mark.usefixtures("small_on_cpu")
def test_call_of_vllm_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the functions in C++, whose signatures are checked."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.mixed_precision import machete, marlin

    layer = gpu_contenders.Linear("small", tokens=3)
    for kernel in (machete.MacheteLinearKernel, marlin.MarlinLinearKernel):
        monkeypatch.setattr(kernel, "can_implement", classmethod(lambda *_: (True, None)))
    weight, outputs = torch.zeros(16, 256, dtype=torch.int32), torch.zeros(3, 128)
    for owner, function, result in (
        (ops, "gptq_marlin_repack", weight),
        (ops, "machete_prepack_B", weight),
        (ops, "machete_mm", outputs),
        (marlin, "apply_gptq_marlin_linear", outputs),
    ):
        fake = create_autospec(getattr(owner, function), return_value=result)
        monkeypatch.setattr(owner, function, fake)
    assert layer.builds()[name]()() is not None


@pytest.mark.parametrize("name", ["down", "qkv"])
@pytest.mark.usefixtures("small_on_cpu")
def test_others_read_what_vllms_kernel_has_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import _custom_ops as ops

    def norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        x.fill_(1)

    def activation(out: torch.Tensor, gate_up: torch.Tensor) -> None:
        assert gate_up.shape == (3, 2 * out.shape[1])
        out.fill_(1)

    monkeypatch.setitem(gpu_contenders.LAYERS, name, (128, 256, 0))
    fake = create_autospec(ops.fused_add_rms_norm, side_effect=norm)
    monkeypatch.setattr(ops, "fused_add_rms_norm", fake)
    monkeypatch.setattr(torch.ops._C, "silu_and_mul", activation, raising=False)
    layer = gpu_contenders.FusedLinear(name, tokens=3)
    assert layer.builds().keys() > {"OffQ", "OffQ, not fused", "cuBLAS bf16"}
    layer.builds()["cuBLAS bf16"]()()
    assert (layer.x == 1).all()


@pytest.mark.parametrize("name", gpu_contenders.VLLM_ATTENTIONS)
@pytest.mark.parametrize(("batch", "context", "new"), [(2, 48, 1), (1, 32, 32)])
@pytest.mark.usefixtures("small_on_cpu")
def test_call_of_vllm_attention(
    name: str, batch: int, context: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise; of a Triton backend up to what launches kernels."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import flash_attn, triton_attn

    # Its package cannot be imported without its kernels; the file can.
    path = Path(flash_attn.__file__).parents[3] / "vllm_flash_attn" / "flash_attn_interface.py"
    specification = spec_from_file_location("flash_attn_interface", path)
    flash_attn_interface = module_from_spec(specification)
    specification.loader.exec_module(flash_attn_interface)
    calls = []
    for owner, module, function in (
        (ops, flash_attn, "reshape_and_cache_flash"),
        (flash_attn_interface, flash_attn, "flash_attn_varlen_func"),
        (flash_attn_interface, flash_attn, "get_scheduler_metadata"),
        (triton_attn, triton_attn, "unified_attention"),
        (triton_attn, triton_attn, "triton_reshape_and_cache_flash"),
        (triton_attn, triton_attn, "triton_reshape_and_cache_flash_per_token_head_quant"),
    ):
        effect = partial(lambda name, *_, **__: calls.append(name), function)
        fake = create_autospec(getattr(owner, function), side_effect=effect)
        monkeypatch.setattr(module, function, fake, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    gpu_contenders.Attention(batch, context, new).builds()[name]()()
    assert len(calls) >= 3  # the cache is filled, then tokens are stored and attended to
    assert calls[-1] in ("flash_attn_varlen_func", "unified_attention")


@pytest.mark.usefixtures("small_on_cpu")
def test_reasons_of_vllm() -> None:
    """Without a GPU nothing of it is available, and it says why."""
    for name in gpu_contenders.VLLM_LINEARS:
        with pytest.raises(NotImplementedError, match="only supported on CUDA"):
            gpu_contenders.Linear("small", tokens=3).builds()[name]()
    with pytest.raises(NotImplementedError, match="does not support fp8"):
        gpu_contenders.Attention(2, 48, 1).builds()["FlashAttention fp8"]()


@pytest.mark.slow
def test_calls_of_offq() -> None:
    """Interpreted, in a process of its own."""
    program = """
import torch
from benchmarks import gpu_contenders
gpu_contenders.DEVICE, gpu_contenders.FILLED_TOKENS = "cpu", 64
gpu_contenders.LAYERS["small"] = 128, 256, 128
assert gpu_contenders.Linear("small", 3).offq()().isfinite().all()
gpu_contenders.LAYERS["unrotated"] = 128, 256, 0
y, total = gpu_contenders.FusedLinear("unrotated", 3).offq_fused()()
assert y.isfinite().all() and total.isfinite().all()
gpu_contenders.LAYERS["down"] = 128, 256, 128
assert gpu_contenders.FusedLinear("down", 3).offq_fused()().isfinite().all()
for sizes in (2, 48, 1), (1, 32, 32):
    attention = gpu_contenders.Attention(*sizes)
    attention.offq()()
    assert attention.output.isfinite().all()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
