"""`offq` as a vLLM quantization method: which layer gets which OffQ method."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_offq.embedding import OffQEmbeddingMethod
from vllm_offq.errors import UserError
from vllm_offq.format import QUANT_METHOD, CheckpointConfig, parse_config
from vllm_offq.kv_cache import OffQKVCacheMethod
from vllm_offq.linear import OffQLinearMethod, head_method
from vllm_offq.moe import OffQMoEMethod


class OffQConfig(QuantizationConfig):
    """The quantization settings of an OffQ checkpoint.

    Raises: UserError without a checkpoint's settings, which is what vLLM does when
    `--quantization offq` is given for a model that is not quantized.
    """

    def __init__(self, checkpoint: CheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:
            raise UserError(
                "this model is not quantized by OffQ; run `offq quantize MODEL OUT` once and "
                "serve OUT"
            )
        self.checkpoint = checkpoint

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # The kernels choose what they can run on.

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OffQConfig":
        return cls(parse_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Validate a local checkpoint before anything of it is loaded.

        Raises: UserError naming the tensor that is wrong.
        """
        if Path(model_name).is_dir():
            from vllm_offq.checkpoint import validate_checkpoint

            validate_checkpoint(Path(model_name))

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises: UserError naming a layer or an option that OffQ does not support."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None:
            refuse_unsupported_options(vllm_config)
            if vllm_config.compilation_config.mode != CompilationMode.NONE:
                from vllm_offq.fusion import fuse_inputs  # not before: it loads the compiler

                fuse_inputs(vllm_config)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, ParallelLMHead) and self.checkpoint.head is not None:
            return head_method(self.checkpoint.head)
        if isinstance(layer, RoutedExperts):
            return self._moe_method(layer, prefix)
        if isinstance(layer, AttentionLayerBase):
            return self._kv_cache_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding) and self.checkpoint.embedding is not None:
            if isinstance(layer, ParallelLMHead):
                return None
            return OffQEmbeddingMethod(self.checkpoint.embedding)
        return None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        parent, _, last = prefix.rpartition(".")
        shards = [
            f"{parent}.{name}" if parent else name
            for name in self.packed_modules_mapping.get(last, [last])
        ]
        ignored = [self.checkpoint.is_ignored(shard) for shard in shards]
        if all(ignored):
            return UnquantizedLinearMethod()
        sites = [self.checkpoint.site_of(shard) for shard in shards]
        site = sites[0]
        if any(ignored) or any(other != site for other in sites):
            raise UserError(
                f"vLLM fuses {', '.join(shards)}, so they must share one site of the checkpoint; "
                "quantize the model again"
            )
        if site is None:
            raise UserError(
                f"the linear layer {prefix} is neither quantized nor ignored by the checkpoint; "
                "this model architecture is not supported by OffQ yet"
            )
        return OffQLinearMethod(site, self.checkpoint.weights.group_size)

    def _moe_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        gate_up_names = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
        names = [*gate_up_names, layer.ckpt_down_proj_name]
        ignored = [
            self.checkpoint.is_ignored(f"{prefix}.{expert}.{name}")
            for expert in range(layer.global_num_experts)
            for name in names
        ]
        if all(ignored):
            return None  # vLLM's own method
        gate, up, down = (self.checkpoint.site_of(f"{prefix}.0.{name}") for name in names)
        if any(ignored) or gate != up:
            raise UserError(
                f"vLLM computes the experts {prefix} together, {' and '.join(gate_up_names)} as "
                "one linear: they must share one site of the checkpoint, and none be ignored; "
                "quantize the model again"
            )
        if gate is None or down is None:
            raise UserError(
                f"the experts {prefix} are neither quantized nor ignored by the checkpoint; "
                "this model architecture is not supported by OffQ yet"
            )
        return OffQMoEMethod(layer, gate, down, self.checkpoint.weights.group_size)

    def _kv_cache_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        kv_cache = self.checkpoint.kv_cache
        if kv_cache is None:
            return None
        # Subclasses of Attention change what it computes.
        if type(layer) is not Attention:
            raise UserError(
                f"{type(layer).__name__} layers are not supported by OffQ's 4-bit KV cache: "
                f"{prefix}; quantize the model with --kv-bits 16"
            )
        return OffQKVCacheMethod(self, kv_cache)


def refuse_unsupported_options(vllm_config: VllmConfig) -> None:
    """Raises: UserError naming an option of vLLM that would be wrong or ignored with OffQ."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    offload = vllm_config.offload_config
    used = {
        "LoRA": vllm_config.lora_config is not None,
        "speculative decoding with a draft model": speculative is not None
        and not speculative.use_ngram(),
        "multi-head latent attention (MLA)": vllm_config.model_config is not None
        and vllm_config.model_config.use_mla,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "offloading weights": offload.uva.cpu_offload_gb > 0
        or offload.prefetch.offload_group_size > 0,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
    }
    for feature, is_used in used.items():
        if is_used:
            raise UserError(f"{feature} is not supported by OffQ yet; start vLLM without it")
