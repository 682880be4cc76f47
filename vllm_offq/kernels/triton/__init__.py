"""OffQ operations as Triton kernels, for GPUs: the functions of `reference`, with the same meaning.

With TRITON_INTERPRET=1, Triton runs them on the CPU, slowly: how they are tested without a GPU.
"""

from triton import knobs

from vllm_offq.kernels.interface import Features
from vllm_offq.kernels.triton.experts import experts
from vllm_offq.kernels.triton.kv_page import MAX_GROUPS
from vllm_offq.kernels.triton.kv_store import kv_store
from vllm_offq.kernels.triton.linear import (
    fused_add_rms_norm_linear,
    linear,
    prepare_weight,
    rms_norm_linear,
    silu_and_mul_linear,
)
from vllm_offq.kernels.triton.paged_attention import paged_attention
from vllm_offq.kernels.triton.paged_attention_config import attention_workspace

__all__ = [
    "FEATURES",
    "experts",
    "fused_add_rms_norm_linear",
    "kv_store",
    "linear",
    "paged_attention",
    "prepare_weight",
    "rms_norm_linear",
    "silu_and_mul_linear",
]

FEATURES = Features(
    kv_multiple=16,
    fused_inputs=True,
    max_head_groups=MAX_GROUPS,
    max_head_size=256,
    cuda_graphs=True,
    decodes_apart=True,
    attention_workspace=attention_workspace,
)
"""16: a tile of a product, and the bytes of an aligned load; 256: more spill registers."""

if knobs.runtime.interpret:
    # Not on a GPU: it builds on what Triton may change from one version to the next.
    from vllm_offq.kernels.triton import interpreter

    interpreter.install()
