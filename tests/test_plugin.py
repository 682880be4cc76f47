"""The plugin without an engine: registering, choosing methods, refusing, sharding, page sizes."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_checkpoint import quantization_config, write
from torch.nn import Parameter

import vllm_offq
from vllm_offq import kernels, seams
from vllm_offq.errors import UserError

pytest.importorskip("vllm")

from vllm.model_executor import parameter
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention, MLAAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_offq import kv_cache
from vllm_offq.config import OffQConfig, refuse_unsupported_options
from vllm_offq.format import HEAD_CODE_MAX, HeadConfig, pack_int8
from vllm_offq.kernels import ops
from vllm_offq.kv_cache import OffQKVCacheMethod, backend_for
from vllm_offq.linear import OffQ8BitHeadMethod, OffQLinearMethod
from vllm_offq.quantizer import fake_quantize


def bare(layer: type[torch.nn.Module]) -> torch.nn.Module:
    """A vLLM layer of this class without its constructor, which would need an engine."""
    module = layer.__new__(layer)
    torch.nn.Module.__init__(module)
    return module


def offq_config(**changes: Any) -> OffQConfig:
    config = OffQConfig.from_config(quantization_config(**changes))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def test_import_is_light() -> None:
    code = "import sys, vllm_offq; print({'torch', 'vllm'} & set(sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "set()"


def test_register_twice() -> None:
    vllm_offq.register()
    vllm_offq.register()
    assert get_quantization_config("offq") is OffQConfig


@pytest.mark.parametrize(
    "changed",
    [
        {"vllm.no_such_module": {"anything": set()}},
        {"vllm.v1.attention.backend": {"NoSuchBackend": set()}},
        {"vllm.v1.attention.backend": {"AttentionBackend.customize_spec": {"no_such"}}},
    ],
)
def test_unknown_vllm_is_refused(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "SEAMS", changed)
    with pytest.raises(RuntimeError, match=r"needs vllm>=0\.32,<0\.34"):
        vllm_offq.register()


def test_unquantized_model_is_refused() -> None:
    with pytest.raises(UserError, match="offq quantize MODEL OUT"):
        OffQConfig()


def test_damaged_checkpoint_is_refused_before_loading(tmp_path: Path) -> None:
    write(tmp_path / "model")
    config = offq_config()
    config.maybe_update_config(str(tmp_path / "model"))
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or corrupt"):
        config.maybe_update_config(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("prefix", "group_size"),
    [("self_attn.qkv_proj", 32), ("self_attn.o_proj", 16), ("mlp.gate_up_proj", 32)],
)
def test_linear_layers_get_the_grid_of_their_site(prefix: str, group_size: int) -> None:
    method = offq_config().get_quant_method(bare(LinearBase), f"model.layers.0.{prefix}")
    assert isinstance(method, OffQLinearMethod)
    assert method.site.group_size == group_size


def test_ignored_linear_stays_unquantized() -> None:
    config = offq_config(ignore=["lm_head", "model.layers.0.mlp.router"])
    method = config.get_quant_method(bare(LinearBase), "model.layers.0.mlp.router")
    assert isinstance(method, UnquantizedLinearMethod)


def test_a_vision_tower_stays_unquantized_though_its_linears_have_the_names_of_others() -> None:
    config = offq_config(ignore=["vision_tower", "multi_modal_projector"])
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"
    for prefix in (tower, "multi_modal_projector.linear_2"):
        method = config.get_quant_method(bare(LinearBase), prefix)
        assert isinstance(method, UnquantizedLinearMethod)
    language = "language_model.model.layers.0.self_attn.qkv_proj"
    assert isinstance(config.get_quant_method(bare(LinearBase), language), OffQLinearMethod)


def test_the_head_is_quantized_where_the_checkpoint_says_so() -> None:
    head = bare(ParallelLMHead)
    method = offq_config().get_quant_method(head, "lm_head")
    assert isinstance(method, OffQ8BitHeadMethod)
    assert (method.site.bits, method.site.group_size) == (8, 32)
    assert offq_config(head=None, ignore=["lm_head"]).get_quant_method(head, "lm_head") is None
    method = offq_config(head={"bits": 4, "group_size": 32}).get_quant_method(head, "lm_head")
    assert (method.site.bits, method.site.group_size, method.weight_group_size) == (8, 32, 32)


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


@pytest.mark.parametrize(
    ("layer", "prefix", "message"),
    [
        (LinearBase, "model.layers.0.mlp.router", "mlp.router is neither quantized nor ignored"),
        (LinearBase, "model.layers.0.fused_proj", "fuses .*q_proj, .*up_proj.* share one site"),
        (LinearBase, "model.layers.0.half_proj", "fuses .*q_proj, .*router.* share one site"),
        (EncoderOnlyAttention, "model.layers.0.attn", "EncoderOnlyAttention"),
        (MLAAttention, "model.layers.0.attn", "MLAAttention"),
    ],
)
def test_unsupported_layer_is_refused_by_name(
    layer: type[torch.nn.Module], prefix: str, message: str
) -> None:
    config = offq_config(ignore=["model.layers.0.router"])
    config.packed_modules_mapping |= {
        "fused_proj": ["q_proj", "up_proj"],
        "half_proj": ["q_proj", "router"],
    }
    with pytest.raises(UserError, match=message):
        config.get_quant_method(bare(layer), prefix)


def offload_config(cpu_offload_gb: float = 0, offload_group_size: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=cpu_offload_gb),
        prefetch=SimpleNamespace(offload_group_size=offload_group_size),
    )


def test_kv_cache_in_16_bit_is_left_to_vllm() -> None:
    config = offq_config(kv_cache=None)
    assert config.get_quant_method(bare(Attention), "model.layers.0.self_attn.attn") is None
    method = offq_config().get_quant_method(bare(Attention), "model.layers.0.self_attn.attn")
    assert isinstance(method, OffQKVCacheMethod)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lora_config": object()}, "LoRA"),
        (
            {"speculative_config": SimpleNamespace(use_ngram=lambda: False)},
            "speculative decoding with a draft model",
        ),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"model_config": SimpleNamespace(use_mla=True)}, "multi-head latent attention (MLA)"),
        (
            {
                "parallel_config": SimpleNamespace(
                    decode_context_parallel_size=2, prefill_context_parallel_size=1
                )
            },
            "context parallelism",
        ),
        ({"offload_config": offload_config(cpu_offload_gb=1)}, "offloading weights"),
        ({"offload_config": offload_config(offload_group_size=2)}, "offloading weights"),
    ],
)
def test_unsupported_option_is_refused_by_name(option: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
        "model_config": SimpleNamespace(use_mla=False),
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        "offload_config": offload_config(),
    }
    refuse_unsupported_options(SimpleNamespace(**plain))
    sentence = rf"^{re.escape(message)} is not supported by OffQ yet; start vLLM without it$"
    with pytest.raises(UserError, match=sentence):
        refuse_unsupported_options(SimpleNamespace(**plain | option))


def attention_layer(**changes: Any) -> Any:
    chosen = {"alibi_slopes": None, "logits_soft_cap": 0, "scale": 0.25}
    chosen |= {key: changes.pop(key) for key in list(changes) if key in chosen}
    layer = bare(torch.nn.Module)
    attributes = {
        "impl": SimpleNamespace(**chosen),
        "layer_name": "model.layers.3.self_attn.attn",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "head_size_v": 16,
        "attn_type": "decoder",
        "use_alibi_sqrt": False,
        "has_sink": False,
        "use_mm_prefix": False,
        "kv_sharing_target_layer_name": None,
        "kv_cache_dtype": "auto",
        "sliding_window": None,
    }
    for name, value in (attributes | changes).items():
        setattr(layer, name, value)
    return layer


def kv_cache_method() -> OffQKVCacheMethod:
    method = offq_config().get_quant_method(bare(Attention), "attn")
    assert isinstance(method, OffQKVCacheMethod)
    return method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 24}, "head size that 16 does not divide"),
        ({"head_size_v": 32}, "value head size"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"has_sink": True}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "shared"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ],
)
def test_unsupported_attention_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kv_cache_method().create_weights(attention_layer(**change))


def test_images_that_a_step_may_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their tokens see each other in both directions."""

    def create(**scheduler: bool) -> None:
        config = SimpleNamespace(scheduler_config=SimpleNamespace(**scheduler))
        monkeypatch.setattr(kv_cache, "get_current_vllm_config", lambda: config)
        kv_cache_method().create_weights(attention_layer(use_mm_prefix=True))

    create(enable_chunked_prefill=True, disable_chunked_mm_input=True)
    create(enable_chunked_prefill=False, disable_chunked_mm_input=False)
    with pytest.raises(UserError, match="--disable-chunked-mm-input"):
        create(enable_chunked_prefill=True, disable_chunked_mm_input=False)


def test_sizes_between_the_steps_of_the_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = kernels.backend().FEATURES._replace(kv_multiple=32)
    monkeypatch.setattr(kernels.backend(), "FEATURES", features)
    with pytest.raises(UserError, match=r"head size or group that 32, .* --kv-bits 16"):
        kv_cache_method().create_weights(attention_layer(head_size=16))
    assert [size for size in (32, 48, 64) if backend_for(16).supports_block_size(size)] == [32, 64]


def test_missing_key_rotation_is_refused() -> None:
    layer = attention_layer()
    kv_cache_method().create_weights(layer)
    with pytest.raises(UserError, match=r"layers\.3.*key_rotation is missing"):
        kv_cache_method().process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("ranks", "heads_of_each_rank"),
    [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (8, [[0], [0], [1], [1], [2], [2], [3], [3]])],
)
def test_each_rank_takes_the_rotations_of_its_heads(
    ranks: int, heads_of_each_rank: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = torch.arange(4 * 2 * 2).view(4, 2, 2).half()
    monkeypatch.setattr(kv_cache, "get_tensor_model_parallel_world_size", lambda: ranks)
    for rank, heads in enumerate(heads_of_each_rank):
        monkeypatch.setattr(kv_cache, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        rotation = Parameter(torch.empty(len(heads), 2, 2).half(), requires_grad=False)
        kv_cache.load_key_rotation(rotation, stored)
        assert torch.equal(rotation, stored[heads])
    with pytest.raises(UserError, match="key_rotation has shape"):
        kv_cache.load_key_rotation(Parameter(torch.empty(3, 2, 2).half()), stored)


def test_weights_are_created_again_for_a_reload() -> None:
    """vLLM asks twice, and the second time the layer has OffQ's backend already."""
    layer, method = attention_layer(), kv_cache_method()
    method.create_weights(layer)
    backend, rotation = layer.impl, layer.key_rotation
    method.create_weights(layer)
    assert layer.impl is backend
    assert layer.key_rotation is not rotation


def specs(head_size: int, dtype: torch.dtype) -> list[AttentionSpec]:
    common: dict[str, Any] = {
        "block_size": 128,
        "num_kv_heads": 3,
        "head_size": head_size,
        "dtype": dtype,
    }
    return [FullAttentionSpec(**common), SlidingWindowSpec(**common, sliding_window=256)]


@pytest.mark.parametrize(("head_size", "ratio"), [(64, 3.5), (128, 3.7)])
def test_pages_are_a_fraction_of_bfloat16(head_size: int, ratio: float) -> None:
    backend = backend_for(head_size)
    for spec in specs(head_size, torch.bfloat16):
        packed = backend.customize_spec(spec)
        assert spec.page_size_bytes > ratio * packed.page_size_bytes
        assert type(packed) is type(spec)
        assert backend.customize_spec(packed) == packed


def test_pages_do_not_depend_on_the_model_dtype() -> None:
    sizes = {
        backend_for(64).customize_spec(spec).page_size_bytes
        for dtype in (torch.bfloat16, torch.float32)
        for spec in specs(64, dtype)
    }
    assert len(sizes) == 1


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
