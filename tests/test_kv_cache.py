"""The 4-bit KV cache in vLLM without an engine: what it refuses, rotations, sizes of pages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("vllm")

from test_plugin import bare, offq_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_offq import kernels, kv_cache
from vllm_offq.errors import UserError
from vllm_offq.kv_cache import OffQKVCacheMethod, backend_for


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

    def create(half_batches: bool = False, **scheduler: bool) -> None:
        parallel = SimpleNamespace(use_ubatching=half_batches)
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(**scheduler), parallel_config=parallel
        )
        monkeypatch.setattr(kv_cache, "get_current_vllm_config", lambda: config)
        kv_cache_method().create_weights(attention_layer(use_mm_prefix=True))

    create(enable_chunked_prefill=True, disable_chunked_mm_input=True)
    create(enable_chunked_prefill=False, disable_chunked_mm_input=False)
    with pytest.raises(UserError, match="--disable-chunked-mm-input"):
        create(enable_chunked_prefill=True, disable_chunked_mm_input=False)
    with pytest.raises(UserError, match="without --enable-dbo"):
        create(True, enable_chunked_prefill=True, disable_chunked_mm_input=True)


def test_sizes_between_the_steps_of_the_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = kernels.backend().FEATURES._replace(kv_multiple=32)
    monkeypatch.setattr(kernels.backend(), "FEATURES", features)
    with pytest.raises(UserError, match=r"head size or group that 32, .* --kv-bits 16"):
        kv_cache_method().create_weights(attention_layer(head_size=16))
    assert [size for size in (32, 48, 64) if backend_for(16).supports_block_size(size)] == [32, 64]


def test_heads_larger_than_any_that_was_compiled_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = kernels.backend().FEATURES._replace(max_head_size=256)
    monkeypatch.setattr(kernels.backend(), "FEATURES", features)
    kv_cache_method().create_weights(attention_layer(head_size=256, head_size_v=256))
    with pytest.raises(UserError, match=r"heads of more than 256 channels, .* --kv-bits 16"):
        kv_cache_method().create_weights(attention_layer(head_size=512, head_size_v=512))


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
