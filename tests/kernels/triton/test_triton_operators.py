"""torch.compile is told the truth about what Triton's kernels return."""

import pytest
import torch
from expert_layers import Experts, route
from layers import FLOATS, Layer
from torch import Tensor

from vllm_offq.kernels import ops, triton

K, GROUP_SIZE = 128, 64


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda: triton)


def check(operator: str, *arguments: object) -> None:
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(getattr(ops, operator), arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 19])
@pytest.mark.parametrize(
    "operator", ["linear", "rms_norm_linear", "fused_add_rms_norm_linear", "silu_and_mul_linear"]
)
def test_linears(operator: str, tokens: int, dtype: torch.dtype) -> None:
    layer = Layer.random(40, 2, GROUP_SIZE)
    x, ones = torch.randn(tokens, K, dtype=dtype), torch.ones(K, dtype=dtype)
    inputs: dict[str, tuple[Tensor | float, ...]] = {
        "linear": (x,),
        "rms_norm_linear": (x, ones, 1e-6),
        "fused_add_rms_norm_linear": (x, x, ones, 1e-6),
        "silu_and_mul_linear": (torch.cat([x, x], 1),),
    }
    check(operator, *inputs[operator], *layer.prepare(triton), None, 40, *layer.grid)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_experts(tokens: int, dtype: torch.dtype) -> None:
    experts = Experts.random(3, K // GROUP_SIZE, 1, GROUP_SIZE)
    linears = [p for layer in experts.prepare(triton) for p in (list(layer.weight), *layer[1:])]
    check("experts", torch.randn(tokens, K, dtype=dtype), *route("any", tokens, 2, 3), *linears)
