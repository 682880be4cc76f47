"""The 4-bit KV cache in vLLM: method, backend, impl. The arithmetic is in kernels."""

import math
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_offq.attention_metadata import (
    Batch,
    OffQAttentionMetadata,
    OffQAttentionMetadataBuilder,
)
from vllm_offq.errors import UserError
from vllm_offq.format import KEY_ROTATION, KVCacheConfig
from vllm_offq.kernels import backend
from vllm_offq.kernels.reference import kv_page_bytes
from vllm_offq.workspace import attention_workspace


class OffQKVCacheMethod(BaseKVCacheMethod):
    """Gives an attention layer 4-bit pages and, if the checkpoint has them, key rotations."""

    # The key rotations are used as loaded.
    supports_pre_processed_weights = True

    def __init__(self, quant_config: QuantizationConfig, kv_cache: KVCacheConfig) -> None:
        super().__init__(quant_config)
        self.kv_cache = kv_cache

    def create_weights(self, layer: Attention) -> None:
        """Put OffQ's backend in place of the one vLLM has chosen for this layer.

        Raises: UserError naming what this layer needs and OffQ's attention does not do.
        """
        chosen, group_size = layer.impl, self.kv_cache.group_size
        if not isinstance(chosen, OffQAttentionImpl):  # it is when vLLM reloads weights
            refuse_unsupported_attention(layer, group_size)
            layer.attn_backend = backend_for(group_size)
            layer.backend = AttentionBackendEnum.CUSTOM
            layer.impl = OffQAttentionImpl(
                layer.num_heads,
                layer.head_size,
                chosen.scale,
                layer.num_kv_heads,
                sliding_window=layer.sliding_window,
                group_size=group_size,
                logits_soft_cap=chosen.logits_soft_cap,
            )
        if self.kv_cache.key_rotation:
            shape = (layer.num_kv_heads, layer.head_size, layer.head_size)
            # NaN until loaded: vLLM does not report a tensor that the checkpoint lacks.
            rotation = Parameter(
                torch.full(shape, math.nan, dtype=torch.float32), requires_grad=False
            )
            set_weight_attrs(rotation, {"weight_loader": load_key_rotation})
            layer.register_parameter(KEY_ROTATION, rotation)

    def process_weights_after_loading(self, layer: Attention) -> None:
        """Raises: UserError if the key rotations are missing, NaN or infinite."""
        if self.kv_cache.key_rotation and not layer.key_rotation.isfinite().all():
            raise UserError(
                f"{layer.layer_name}: {KEY_ROTATION} is missing from the checkpoint or not "
                "finite; quantize the model again"
            )


def refuse_unsupported_attention(layer: Attention, group_size: int) -> None:
    """Raises: UserError naming the first property of the layer that would be dropped."""
    chosen, features = layer.impl, backend().FEATURES
    multiple, most = features.kv_multiple, features.max_head_groups
    largest = features.max_head_size
    refused = {
        f"a head size that {group_size} does not divide": layer.head_size % group_size,
        f"a head size or group that {multiple}, the step of its kernels, does not divide": (
            layer.head_size % multiple or group_size % multiple
        ),
        f"more than {most} groups in a head": most and layer.head_size > most * group_size,
        f"heads of more than {largest} channels": largest and layer.head_size > largest,
        "a value head size other than the key head size": layer.head_size_v != layer.head_size,
        f"{layer.attn_type} attention": layer.attn_type != AttentionType.DECODER,
        "ALiBi": chosen.alibi_slopes is not None or layer.use_alibi_sqrt,
        "attention sinks": layer.has_sink,
        "a KV cache shared between layers": layer.kv_sharing_target_layer_name is not None,
    }
    for feature, is_used in refused.items():
        if is_used:
            raise UserError(
                f"{layer.layer_name} has {feature}, which is not supported by OffQ's 4-bit KV "
                "cache; quantize the model with --kv-bits 16"
            )
    if layer.kv_cache_dtype != "auto":
        raise UserError(
            f"--kv-cache-dtype {layer.kv_cache_dtype} cannot be used with this checkpoint, which "
            "decides itself that the KV cache has 4 bits; leave the option out"
        )
    if layer.use_mm_prefix:
        refuse_cut_images(get_current_vllm_config())


def refuse_cut_images(vllm_config: VllmConfig) -> None:
    """Raises: UserError if an image whose tokens see those after them may be cut, or not be seen.

    vLLM's V1 model runner does not tell half batches where images are.
    """
    if vllm_config.parallel_config.use_ubatching:
        raise UserError(
            "the tokens of this model's images see each other in both directions, which is not "
            "supported in half batches; start vLLM without --enable-dbo and --ubatch-size"
        )
    scheduler = vllm_config.scheduler_config
    if scheduler.enable_chunked_prefill and not scheduler.disable_chunked_mm_input:
        raise UserError(
            "the tokens of this model's images see each other in both directions, so no image may "
            "be cut: start vLLM with --disable-chunked-mm-input, or for text alone with "
            "--limit-mm-per-prompt '{\"image\": 0}'"
        )


def load_key_rotation(param: Parameter, loaded: Tensor) -> None:
    """Take the rotations of this rank's KV heads.

    param: [H, D, D], by this name because vLLM puts it in again when it reloads weights; loaded:
    [all KV heads, D, D]. With more ranks than KV heads, several ranks hold the same head.
    Raises: UserError on other shapes.
    """
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    heads, total = param.shape[0], loaded.shape[0]
    if loaded.shape[1:] != param.shape[1:] or max(1, total // ranks) != heads:
        raise UserError(
            f"{KEY_ROTATION} has shape {tuple(loaded.shape)}, but this model has {heads} KV heads "
            f"of {param.shape[-1]} on each of {ranks} ranks; quantize the model again"
        )
    first = rank * heads if total >= ranks else rank * total // ranks
    param.data.copy_(loaded[first : first + heads])


class OffQAttentionImpl(AttentionImpl[OffQAttentionMetadata]):
    """Calls the kernels."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        sliding_window: int | None,
        group_size: int,
        logits_soft_cap: float | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.group_size = group_size
        self.logits_soft_cap = logits_soft_cap
        self.kv_cache_dtype = "auto"

    def do_kv_cache_update(
        self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the new tokens. key, value: [T or more, H_kv, D]; slot_mapping: [T]."""
        tokens = slot_mapping.shape[0]
        backend().kv_store(
            key[:tokens],
            value[:tokens],
            kv_cache,
            slot_mapping,
            self.group_size,
            getattr(layer, KEY_ROTATION, None),
        )

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: OffQAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [T or more, H, D]; output: like query, written in place."""
        workspace = attention_workspace(query.dtype, self.head_size, self.group_size, query.device)
        if attn_metadata is None:  # vLLM measures memory with a run without a cache.
            return output.zero_()

        def attend(query: Tensor, batch: Batch, output: Tensor, sliding_window: int | None) -> None:
            backend().paged_attention(
                query,
                kv_cache,
                batch.block_table,
                batch.seq_lens,
                batch.query_start_loc,
                output,
                self.scale,
                self.group_size,
                sliding_window,
                getattr(layer, KEY_ROTATION, None),
                max_query_len=batch.max_query_len,
                logits_soft_cap=self.logits_soft_cap,
                workspace=workspace,
            )

        first = 0
        for part in attn_metadata.parts:
            rows = slice(first, first + part.num_tokens)
            attend(query[rows], part, output[rows], self.sliding_window)
            first = rows.stop
        if attn_metadata.image_tokens is not None:
            parts = attn_metadata.image_tokens.batches(self.sliding_window)
            for places, batch, window in parts:
                attended = torch.empty_like(output[places])
                attend(query[places], batch, attended, window)
                output[places] = attended
        return output


class OffQAttentionBackend(AttentionBackend):
    """Tells vLLM the size of a page; backend_for makes the one for a group size."""

    group_size: ClassVar[int]
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[OffQAttentionImpl]:
        return OffQAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[OffQAttentionMetadataBuilder]:
        return OffQAttentionMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # [blocks, heads, tokens, bytes], as the kernels index it.

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(backend().FEATURES.kv_multiple)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages of packed bytes. Applied to its own result it changes nothing."""
        return replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=kv_page_bytes(spec.head_size, cls.group_size),
        )


@cache
def backend_for(group_size: int) -> type[OffQAttentionBackend]:
    """The backend whose pages have groups of group_size: vLLM asks the class, not an object."""
    name = f"OffQAttentionBackend{group_size}"
    return type(name, (OffQAttentionBackend,), {"group_size": group_size})
