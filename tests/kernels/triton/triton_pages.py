"""The pages of vllm_offq.kernels.triton, for tests."""

import torch
from torch import Tensor


def as_reference(cache: Tensor, group_size: int) -> Tensor:
    """Triton's arrangement of each block and head, turned into the reference's."""
    block_size, content_bytes = cache.shape[2:]
    head_size = content_bytes * group_size // (group_size + 8)
    code_bytes = block_size * head_size // 2
    sizes = [code_bytes, code_bytes, block_size * (content_bytes - head_size)]
    key, value, words = cache.flatten(2).split(sizes, -1)
    codes = [part.unflatten(-1, (block_size, -1)) for part in (key, value)]
    # [..., key or value, group, token, scale or offset, byte] to scales before offsets of a token
    words = words.unflatten(-1, (2, head_size // group_size, block_size, 2, 2))
    return torch.cat([*codes, words.permute(0, 1, 4, 2, 5, 3, 6).flatten(3)], -1)
