"""The plugin without an engine: registering, choosing methods, refusing options."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_checkpoint import quantization_config, write

import vllm_offq
from vllm_offq import seams
from vllm_offq.errors import UserError

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention, MLAAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
)

from vllm_offq.config import OffQConfig, refuse_unsupported_options
from vllm_offq.kv_cache import OffQKVCacheMethod
from vllm_offq.linear import OffQ8BitHeadMethod, OffQLinearMethod


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
