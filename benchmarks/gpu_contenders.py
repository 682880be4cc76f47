"""The Triton kernels and the strongest others for a GPU, each as vLLM calls it, on one problem.

What this GPU or this build has not got raises when it is built, and says why.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from vllm_offq.kernels.reference import kv_page_bytes
from vllm_offq.kernels.triton.kv_store import kv_store
from vllm_offq.kernels.triton.linear import (
    fused_add_rms_norm_linear,
    linear,
    prepare_weight,
    silu_and_mul_linear,
)
from vllm_offq.kernels.triton.paged_attention import paged_attention

LAYERS = {"qkv": (6144, 4096, 0), "gate_up": (28672, 4096, 0), "down": (4096, 14336, 128)}
"""Of Llama-3-8B: outputs, inputs, block of the rotation that is applied online."""
GROUP = 128
DEVICE = "cuda"
FILLED_TOKENS = 1 << 15  # at a time: quantizing them takes memory, too

VLLM_LINEARS = {
    "Marlin W4A16": ("marlin", "MarlinLinearKernel", torch.bfloat16),
    "Marlin W4A8": ("marlin", "MarlinLinearKernel", torch.int8),
    "Machete W4A16": ("machete", "MacheteLinearKernel", torch.bfloat16),
}
"""Module, class, activations."""
VLLM_ATTENTIONS = {
    "FlashAttention bf16": ("flash_attn", "FlashAttention", "auto", torch.bfloat16, 256),
    "FlashAttention fp8": ("flash_attn", "FlashAttention", "fp8", torch.uint8, 256),
    "vLLM Triton fp8": ("triton_attn", "TritonAttention", "fp8", torch.uint8, 256),
    "vLLM Triton int4": ("triton_attn", "TritonAttention", "int4_per_token_head", torch.uint8, 136),
}
"""Module, class, type of the cache by name and as a tensor, elements of a token and head."""

Call = Callable[[], object]
Builds = dict[str, Callable[[], Call]]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=DEVICE, dtype=dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, device=DEVICE, dtype=dtype)


class Linear:
    """One layer, and the activations of some tokens."""

    def __init__(self, name: str, tokens: int) -> None:
        self.outputs, self.inputs, self.hadamard = LAYERS[name]
        self.x = random(tokens, self.inputs)

    def builds(self) -> Builds:
        others = {name: partial(self.vllm, *entry) for name, entry in VLLM_LINEARS.items()}
        return {"OffQ": self.offq, "cuBLAS bf16": self.cublas, **others}

    def offq_inputs(self) -> tuple[Any, ...]:
        """What OffQ's linears take after x."""
        packed = random(self.outputs, self.inputs // 2, dtype=torch.uint8)
        scale = torch.full((self.outputs, 1), 0.01, dtype=torch.float16, device=DEVICE)
        weight = prepare_weight(packed, scale, GROUP)
        return weight, None, self.outputs, GROUP, self.hadamard, 0.95, False

    def offq(self) -> Call:
        inputs = self.offq_inputs()
        return lambda: linear(self.x, *inputs)

    def cublas(self) -> Call:
        weight = random(self.outputs, self.inputs)
        return lambda: functional.linear(self.x, weight)

    def vllm(self, module: str, name: str, activations: torch.dtype) -> Call:
        """As a served layer does it, from its loading on."""
        from vllm.model_executor import parameter
        from vllm.scalar_type import scalar_types
        from vllm.v1.worker import workspace

        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(torch.device(DEVICE))  # or each call clears its locks
        package = "vllm.model_executor.kernels.linear.mixed_precision"
        shape = (self.inputs, self.outputs)
        config = import_module(f"{package}.MPLinearKernel").MPLinearLayerConfig(
            shape, shape, scalar_types.uint4b8, activations, GROUP, zero_points=False
        )
        kernel_class = getattr(import_module(f"{package}.{module}"), name)
        can, why_not = kernel_class.can_implement(config)
        if not can:
            raise NotImplementedError(why_not)
        layer = torch.nn.Module()
        common: dict[str, Any] = {"input_dim": 0, "output_dim": 1, "weight_loader": None}
        packing = {"packed_factor": 8, "packed_dim": 0}
        codes = random(self.inputs // 8, self.outputs, dtype=torch.int32)
        scale = random(self.inputs // GROUP, self.outputs).abs()
        alone: dict[str, Any] = {"get_tensor_model_parallel_rank": lambda: 0}
        alone["get_tensor_model_parallel_world_size"] = lambda: 1
        with patch.multiple(parameter, **alone):
            layer.codes = parameter.PackedvLLMParameter(data=codes, **packing, **common)
            layer.scale = parameter.GroupQuantScaleParameter(data=scale, **common)
        kernel = kernel_class(config, "codes", "scale")
        kernel.process_weights_after_loading(layer)
        return lambda: kernel.apply_weights(layer, self.x)


class FusedLinear(Linear):
    """The layer, and what a model computes before it: an activation, or a sum and its norm."""

    epsilon = 1e-6

    def __init__(self, name: str, tokens: int) -> None:
        super().__init__(name, tokens)
        self.is_activated = name == "down"
        self.gate_up = random(tokens, 2 * self.inputs)
        self.residual = random(tokens, self.inputs)
        self.norm_weight = random(self.inputs)

    def builds(self) -> Builds:
        others = super().builds()
        others["OffQ, not fused"] = others.pop("OffQ")
        after = {name: partial(self.after_vllms, build) for name, build in others.items()}
        return {"OffQ": self.offq_fused, **after}

    def offq_fused(self) -> Call:
        inputs = self.offq_inputs()
        if self.is_activated:
            return lambda: silu_and_mul_linear(self.gate_up, *inputs)
        norm = self.residual, self.norm_weight, self.epsilon
        return lambda: fused_add_rms_norm_linear(self.x, *norm, *inputs)

    def after_vllms(self, build: Callable[[], Call]) -> Call:
        """A linear that reads what vLLM's own kernel has written."""
        from vllm import _custom_ops as ops

        call = build()
        if self.is_activated:
            return lambda: (torch.ops._C.silu_and_mul(self.x, self.gate_up), call())
        norm = self.residual, self.norm_weight, self.epsilon
        return lambda: (ops.fused_add_rms_norm(self.x, *norm), call())


class Attention:
    """New tokens of requests of one length: 32 heads of 128 over 8 KV heads, as in Llama-3-8B."""

    heads, kv_heads, head_size, block_size = 32, 8, 128, 16

    def __init__(self, batch: int, context: int, new_tokens: int) -> None:
        self.batch, self.context, self.new_tokens = batch, context, new_tokens
        self.blocks = batch * math.ceil(context / self.block_size)
        self.table = torch.randperm(self.blocks, device=DEVICE).int().view(batch, -1)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * new_tokens
        positions = torch.arange(context - new_tokens, context, device=DEVICE)
        blocks = self.table[:, positions // self.block_size].long()
        self.slots = (blocks * self.block_size + positions % self.block_size).flatten()
        self.query = random(batch * new_tokens, self.heads, self.head_size)
        self.key = random(batch * new_tokens, self.kv_heads, self.head_size)
        self.output = torch.empty_like(self.query)

    def builds(self) -> Builds:
        others = {name: partial(self.vllm, *entry) for name, entry in VLLM_ATTENTIONS.items()}
        return {"OffQ": self.offq, **others}

    def step(self, store: Callable[[Tensor, Tensor], object], attend: Call) -> Call:
        """store: what is key and value, to slots; the whole cache is filled with it."""
        key = random(FILLED_TOKENS, self.kv_heads, self.head_size)
        for slots in torch.arange(self.blocks * self.block_size, device=DEVICE).split(len(key)):
            store(key[: len(slots)], slots)
        return lambda: (store(self.key, self.slots), attend())

    def offq(self) -> Call:
        shape = (self.blocks, self.kv_heads, self.block_size, kv_page_bytes(self.head_size, GROUP))
        cache = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        square = torch.randn(self.kv_heads, self.head_size, self.head_size, device=DEVICE)
        rotation = torch.linalg.qr(square).Q.contiguous()
        arguments = (self.query, cache, self.table, self.seq_lens, self.starts, self.output)
        settings = (self.head_size**-0.5, GROUP, None, rotation)
        return self.step(
            lambda key, slots: kv_store(key, key, cache, slots, GROUP, rotation),
            lambda: paged_attention(*arguments, *settings, max_query_len=self.new_tokens),
        )

    def vllm(self, module: str, name: str, dtype: str, storage: torch.dtype, content: int) -> Call:
        """As a served layer does it, after its step's metadata have been made."""
        backend = import_module(f"vllm.v1.attention.backends.{module}")
        sizes = (self.heads, self.head_size, self.head_size**-0.5, self.kv_heads)
        impl = getattr(backend, f"{name}Impl")(*sizes, None, None, dtype)
        shape = (self.blocks, self.block_size, self.kv_heads, content)
        cache = torch.zeros(shape, dtype=storage, device=DEVICE).transpose(1, 2)
        one = torch.ones((), device=DEVICE)
        layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
        query = self.query.to(torch.float8_e4m3fn) if dtype == "fp8" else self.query
        step = getattr(backend, f"{name}Metadata")(
            num_actual_tokens=len(query),
            max_query_len=self.new_tokens,
            query_start_loc=self.starts,
            max_seq_len=self.context,
            seq_lens=self.seq_lens,
            block_table=self.table,
            slot_mapping=self.slots,
            causal=True,
            **self.plan(backend, getattr(impl, "vllm_flash_attn_version", None), query.dtype),
        )
        return self.step(
            lambda key, slots: impl.do_kv_cache_update(layer, key, key, cache, slots),
            lambda: impl.forward(layer, query, self.key, self.key, cache, step, self.output),
        )

    def plan(self, backend: Any, flash_version: int | None, dtype: torch.dtype) -> dict[str, Any]:
        """What the backend's builder of metadata decides once for all layers."""
        if flash_version == 3:
            sizes = (self.heads, self.kv_heads, self.head_size, self.seq_lens, dtype)
            return {
                "scheduler_metadata": backend.get_scheduler_metadata(
                    *(self.batch, self.new_tokens, self.context, *sizes),
                    cu_seqlens_q=self.starts,
                    page_size=self.block_size,
                    causal=True,
                )
            }
        if not backend.__name__.endswith("triton_attn"):
            return {}
        most, segments = backend.MIN_LAUNCH_GRID_SIZE_2D // self.kv_heads, 16
        if torch.cuda.get_device_capability() == (12, 0):
            cores = torch.cuda.get_device_properties(0).multi_processor_count
            segments = 64 if self.batch * segments * self.kv_heads < cores else segments
        parts = (most, self.heads, segments)
        return {
            "seq_threshold_3D": most,
            "num_par_softmax_segments": segments,
            "softmax_segm_output": torch.empty(*parts, self.head_size, device=DEVICE),
            "softmax_segm_max": torch.empty(parts, device=DEVICE),
            "softmax_segm_expsum": torch.empty(parts, device=DEVICE),
        }


Problem = Linear | FusedLinear | Attention
