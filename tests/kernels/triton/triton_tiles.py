"""One way to compute layers of any size, for tests of Triton's products."""

from collections.abc import Callable
from dataclasses import replace

from vllm_offq.kernels.triton import gemm_config
from vllm_offq.kernels.triton.gemm_config import GemmConfig

SMALL = GemmConfig(16, 32, num_warps=4, num_stages=1)
"""Several tiles where a real configuration has one."""


def always(config: GemmConfig) -> Callable[..., GemmConfig]:
    """In the place of gemm_config and expert_gemm_config."""

    def choose(*arguments: int) -> GemmConfig:
        *_, group_size, bits = arguments
        step = gemm_config.block_k(group_size)
        return replace(config, block_k=step, wide=config.wide or bits == 8)

    return choose
