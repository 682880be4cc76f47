"""OffQ operations on CPUs, compiled by numba where no C++ compiler was at hand.

The functions of `reference`, with the same meaning; weights and pages are arranged like those of
the C++ kernels, whose arithmetic this follows.
"""

from vllm_offq.kernels.cpu import FEATURES, prepare_weight
from vllm_offq.kernels.numba.attention import paged_attention
from vllm_offq.kernels.numba.experts import experts
from vllm_offq.kernels.numba.kv_store import kv_store
from vllm_offq.kernels.numba.linear import linear

__all__ = [
    "FEATURES",
    "experts",
    "kv_store",
    "linear",
    "paged_attention",
    "prepare_weight",
]
