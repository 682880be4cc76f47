"""What backends of kernels and their callers exchange."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """What a backend can do."""

    kv_multiple: int
    """What block size, head size and group size of a KV cache must be multiples of."""
    fused_inputs: bool
    """Whether it has the linears that compute their own input: rms_norm_linear and so on."""
    max_head_groups: int | None = None
    """Most groups of a head; None: any number."""
    max_head_size: int | None = None
    """None: any."""
    cuda_graphs: bool = False
    """Whether a step can be recorded and replayed: nothing waits for a GPU to read its tensors."""
    decodes_apart: bool = False
    """Whether paged_attention is faster where requests with few new tokens come in a batch of their
    own, not beside others with many."""
    attention_workspace: Callable[[torch.dtype, int, int, torch.device], int] | None = None
    """How many float32 paged_attention needs at most beside its tensors, for queries of a dtype,
    a head size, a group size, on a device; None: it takes no workspace."""


class Weight(NamedTuple):
    """What a layer keeps at run time, made once at load. Backends choose shapes and dtypes.

    Shapes here: those of `reference`.
    """

    codes: Tensor
    """[N, K] int8."""
    scale: Tensor
    """As stored: [N, 1] or [N, G] float16."""
    sums: Tensor
    """Of the codes over each group, for the offset term (not stored). [N, G] float32."""


class ExpertLinear(NamedTuple):
    """One linear of every expert of a layer, and the grid of its input."""

    weight: Weight
    """Those that prepare_weight makes of each expert, stacked: [E, ...]."""
    out_features: int
    group_size: int
    rotation_block_size: int
    clip_ratio: float
    symmetric: bool
    bits: int = 4

    def of(self, expert: int) -> tuple[Weight, None, int, int, int, float, bool, int]:
        """What `linear` takes after x."""
        return Weight(*(part[expert] for part in self.weight)), None, *self[1:]
