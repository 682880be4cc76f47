"""A linear of the reference kernels, to be fused with what is before it."""

import torch
from torch import Tensor

from vllm_offq import kernels
from vllm_offq.kernels import ops

CHANNELS, GROUP_SIZE = 64, 32


def parameters(channels: int = CHANNELS, outputs: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    packed = torch.randint(0, 256, (outputs, channels // 2), dtype=torch.uint8)
    scale = torch.rand(outputs, 1).half()
    return kernels.backend().prepare_weight(packed, scale, GROUP_SIZE)


def linear(x: Tensor, *weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, *weight, bias, len(weight[0]), GROUP_SIZE, 0, 1.0, False, 4)
