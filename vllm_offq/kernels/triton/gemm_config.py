"""Which tiles gemm uses: a table by architecture and number of tokens; no tuning run is needed.

Chosen by what compiling for each GPU shows and benchmarks.gpu_model makes of it, without spilled
registers; not by timings.
"""

from dataclasses import dataclass, replace

MIN_BLOCK_K = 64
"""Two products of 32 channels: the least that integer tensor cores multiply."""
MAX_BLOCK_K = 128
"""Keeps a product of 16-fold codes within the 23 bits of a float that gemm counts in."""
MAX_BLOCK_M = 128
MAX_EXPERT_TOKENS = 64
"""That an expert's tile is chosen for: larger ones leave more rows unused at the end of each."""
EXPERT_WARPS = 8
"""Of tiles beyond the smallest: with fewer, a tile and where its weights are spill registers."""
MAX_SPLIT_K = 8
MIN_STEPS = 4
"""Of a split: with fewer, filling the pipeline is all that a program does."""


@dataclass(frozen=True)
class GemmConfig:
    """Of one launch."""

    block_m: int
    """Tokens of a tile."""
    block_n: int
    """Outputs of a tile."""
    num_warps: int
    num_stages: int
    wide: bool = False
    """Activations have a byte for each code: more to read, less to unpack."""
    block_k: int = MAX_BLOCK_K
    """Channels of a step, all of one group."""
    split_k: int = 1
    """Programs that share the channels of a tile."""
    swizzle: int = 8
    """Rows of tiles that are computed together, so that they find weights in the cache."""


_DECODE = GemmConfig(16, 64, num_warps=4, num_stages=5, wide=True)
_SMALL = GemmConfig(64, 128, num_warps=4, num_stages=4, wide=True)
_LARGE = GemmConfig(128, 128, num_warps=8, num_stages=3)

CONFIGS: dict[str, dict[int | None, GemmConfig]] = {
    # Tensor cores of a warp: two programs at a time hide each other's waiting.
    "mma": {16: _DECODE, None: _SMALL},
    # Of four warps; their second operand comes from shared memory, where unpacked codes must go.
    "wgmma": {16: _DECODE, 64: _SMALL, None: replace(_LARGE, wide=True)},
    # AMD: no pipeline of asynchronous copies beyond one step ahead.
    "mfma": {
        16: replace(_DECODE, num_stages=2),
        64: replace(_SMALL, num_stages=2),
        None: replace(_LARGE, num_stages=2),
    },
}
"""Kind of tensor core, most tokens (None: any number)."""


def block_k(group_size: int) -> int:
    """The largest step that divides the group; or one that it leaves in part unused."""
    for size in (MAX_BLOCK_K, MIN_BLOCK_K):
        if group_size % size == 0:
            return size
    return MAX_BLOCK_K if group_size > MIN_BLOCK_K else MIN_BLOCK_K


def _tile(tensor_core: str, tokens: int, group_size: int, bits: int) -> GemmConfig:
    table = CONFIGS[tensor_core]
    most = min((n for n in table if n is not None and tokens <= n), default=None)
    return replace(table[most], block_k=block_k(group_size), wide=table[most].wide or bits == 8)


def expert_gemm_config(
    tensor_core: str, slots: int, num_experts: int, group_size: int, bits: int
) -> GemmConfig:
    """The launch for these tokens of all experts: by what one has on average, and never split,
    because experts are many programs."""
    tokens = -(-slots // num_experts)
    config = _tile(tensor_core, min(tokens, MAX_EXPERT_TOKENS), group_size, bits)
    return config if config.block_m <= 16 else replace(config, num_warps=EXPERT_WARPS)


def gemm_config(
    tensor_core: str,
    num_cores: int,
    tokens: int,
    out_features: int,
    num_groups: int,
    group_size: int,
    bits: int,
) -> GemmConfig:
    """The launch for these tokens. num_cores: multiprocessors, which it should fill."""
    config = _tile(tensor_core, tokens, group_size, bits)
    tiles = -(-tokens // config.block_m) * -(-out_features // config.block_n)
    steps = num_groups * -(-group_size // config.block_k)
    split_k = min(2 * num_cores // tiles, steps // MIN_STEPS, MAX_SPLIT_K)
    return replace(config, split_k=max(1, split_k))
