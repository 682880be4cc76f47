"""Memory that attention writes between its kernels: vLLM's, which all layers share."""

import torch
from torch import Tensor
from vllm.v1.worker.workspace import (
    current_workspace_manager,
    is_workspace_manager_initialized,
)

from vllm_offq.kernels import backend


def attention_workspace(
    dtype: torch.dtype, head_size: int, group_size: int, device: torch.device
) -> Tensor | None:
    """What paged_attention takes as workspace, for queries of this dtype.

    Always of the same size: before the first request vLLM locks what it has given by then, and
    graphs keep its address. Returns: float32; None: the backend needs none, or vLLM's worker has
    no manager, as on CPUs.
    """
    size = backend().FEATURES.attention_workspace
    if size is None or not is_workspace_manager_initialized():
        return None
    shape = (size(dtype, head_size, group_size, device),)
    return current_workspace_manager().get_simultaneous((shape, torch.float32))[0]
