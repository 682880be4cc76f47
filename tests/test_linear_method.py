"""Linear layers and output heads in vLLM without an engine: parameters, sharding, products."""

import pytest
import torch

pytest.importorskip("vllm")

from test_plugin import bare, offq_config
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import LinearBase

from vllm_offq import kernels
from vllm_offq.errors import UserError
from vllm_offq.format import HEAD_CODE_MAX, HeadConfig, pack_int4, pack_int8
from vllm_offq.kernels import ops
from vllm_offq.linear import OffQ8BitHeadMethod, OffQLinearMethod
from vllm_offq.quantizer import dequantize, fake_quantize


@pytest.fixture
def single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's parameters ask the process group, which only an engine sets up."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def linear_layer(partition: int, input_size: int) -> torch.nn.Module:
    layer = bare(torch.nn.Module)
    layer.prefix = "model.layers.0.mlp.down_proj"
    method = offq_config().get_quant_method(bare(LinearBase), layer.prefix)
    assert isinstance(method, OffQLinearMethod)
    method.create_weights(
        layer, partition, [64], input_size, 64, torch.bfloat16, weight_loader=lambda *_: None
    )
    layer.quant_method = method
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("single_rank")
def test_the_head_computes_its_eight_bit_product(dtype: torch.dtype) -> None:
    """Also of activations that float16 could not hold 16-fold."""
    torch.manual_seed(0)
    codes = torch.randint(-HEAD_CODE_MAX, HEAD_CODE_MAX + 1, (72, 64), dtype=torch.int8)
    x = (torch.randn(3, 64) * 2000).to(dtype)
    layer = torch.nn.Module()
    layer.prefix, method = "lm_head", OffQ8BitHeadMethod(HeadConfig(bits=8, group_size=32))
    method.create_weights(layer, 64, [72], 64, 72, dtype, weight_loader=None)
    layer.weight_packed.data, scale = pack_int8(codes), torch.rand(72, 1).half() / 100
    layer.weight_scale.data = scale
    method.process_weights_after_loading(layer)
    logits = method.apply(layer, x)
    seen = fake_quantize(x.float(), 32, bits=8)
    weight = (codes.float() * scale.float()).T
    assert logits.dtype == dtype
    # Each of the 64 additions on either side rounds a partial sum, none larger than this one.
    sums = torch.finfo(torch.float32).eps * 128 * (seen.abs() @ weight.abs())
    expected = (seen @ weight).to(dtype)
    bound = sums + torch.finfo(dtype).eps * expected.float().abs()
    assert ((logits.float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize("weight_group_size", [32, 96, 192])
@pytest.mark.usefixtures("single_rank")
def test_a_scale_of_several_groups(weight_group_size: int) -> None:
    torch.manual_seed(0)
    codes, x = torch.randint(-8, 8, (40, 192), dtype=torch.int8), torch.randn(3, 192)
    scale = torch.rand(40, 192 // weight_group_size).half() / 100
    site = HeadConfig(bits=8, group_size=32).site
    layer, method = torch.nn.Module(), OffQLinearMethod(site, weight_group_size)
    layer.prefix = "down_proj"
    method.create_weights(layer, 192, [40], 192, 40, torch.float32, weight_loader=None)
    layer.weight_packed.data, layer.weight_scale.data = pack_int4(codes), scale
    method.process_weights_after_loading(layer)
    expected = fake_quantize(x, 32, bits=8) @ dequantize(codes, scale.float()).T
    torch.testing.assert_close(method.apply(layer, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("single_rank")
def test_tensor_parallel_size_that_cuts_a_group_is_refused() -> None:
    linear_layer(partition=32, input_size=192)
    with pytest.raises(UserError, match=r"size 4 cuts .*down_proj; .* work for it: 1, 2, 3, 6"):
        linear_layer(partition=48, input_size=192)


@pytest.mark.usefixtures("single_rank")
def test_missing_weight_scale_is_refused() -> None:
    layer = linear_layer(partition=128, input_size=128)
    with pytest.raises(UserError, match=r"down_proj: weight_scale is missing"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.usefixtures("single_rank")
def test_weight_is_kept_once() -> None:
    layer = linear_layer(partition=128, input_size=128)
    layer.weight_scale.fill_(0.01)
    layer.weight_packed.random_(0, 256)
    layer.quant_method.process_weights_after_loading(layer)
    assert dict(layer.named_parameters()).keys() == {"weight_codes", "weight_sums", "weight_scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operator_can_be_compiled(dtype: torch.dtype) -> None:
    packed = torch.randint(0, 256, (40, 32), dtype=torch.uint8)  # backends may pad 40 channels
    scale = torch.rand(40, 1, dtype=torch.float16)
    weight = kernels.backend().prepare_weight(packed, scale, 32)
    arguments = (torch.randn(5, 64, dtype=dtype), *weight, None, 40, 32, 32, 0.95, False, 4)
    torch.library.opcheck(ops.linear, arguments, test_utils=("test_schema", "test_faketensor"))
