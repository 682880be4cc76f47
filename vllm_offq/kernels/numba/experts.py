"""A mixture of experts, of the linear layers compiled by numba."""

from torch import Tensor

from vllm_offq.kernels.cpu.experts import experts_by
from vllm_offq.kernels.interface import ExpertLinear
from vllm_offq.kernels.numba.linear import linear


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: ExpertLinear, down: ExpertLinear
) -> Tensor:
    """See reference.experts."""
    return experts_by(linear, x, topk_ids, topk_weights, gate_up, down)
