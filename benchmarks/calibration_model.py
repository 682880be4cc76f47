"""What `offq quantize` of a Llama-like model would cost elsewhere: a model by counts, no timing.

Operations of one decoder block are counted from its shape (tests/test_calibration_model.py holds
the counts against what PyTorch really does), and divided by what a machine does in a second. For
this machine that is measured, for a GPU assumed: half of the peaks that its maker states.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from benchmarks.machine import median_seconds
from calibration.basis import TRIAL_LENGTH, TRIAL_SEQUENCES
from calibration.gptq import ROWS_AT_ONCE
from calibration.moments import COLUMNS_AT_ONCE
from calibration.scales import CLIP_RATIOS

CANDIDATES = 4
"""Bases that are tried, see calibration.basis.residual_candidates."""
STEP_OPERATIONS = 19
"""Of gptq and descend together for one channel, over all rows."""
SEARCH_OPERATIONS = 8
"""Of search_scales for one ratio."""


@dataclass(frozen=True)
class Work:
    """Of one block, with the share of each pass that it takes part in."""

    flops: float
    """Of products in float32."""
    double_flops: float
    """Of products and factorisations in float64."""
    elements: float
    """Elementwise operations times their elements, of the rounding."""
    launches: float
    """Elementwise operations of the rounding."""
    file_bytes: float
    """Read as often as the original's block is opened."""


@dataclass(frozen=True)
class Machine:
    """What is done in a second, but for `launch`: seconds that any operation takes at least."""

    name: str
    flops: float
    double_flops: float
    elements: float
    launch: float
    file_bytes: float = 2e9

    def seconds(self, work: Work) -> float:
        """For one block."""
        return (
            work.flops / self.flops
            + work.double_flops / self.double_flops
            + max(work.elements / self.elements, work.launches * self.launch)
            + work.file_bytes / self.file_bytes
        )


H100 = Machine("one H100 (assumed)", 33e12, 33e12, 0.5 * 3.35e12 / 12, 5e-6)
"""Peaks: 67 TFLOP/s in float32 and, by tensor cores, in float64; 3.35 TB/s, 12 bytes an element."""


def linears(config: LlamaConfig) -> list[tuple[int, int]]:
    """Input and output channels of what is rounded as one matrix: qkv, o, gate and up, down."""
    n, m = config.hidden_size, config.intermediate_size
    kv = (
        n // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
    )
    return [(n, n + 2 * kv), (n, n), (n, 2 * m), (m, n)]


def block_work(config: LlamaConfig, samples: int, sequence_length: int) -> Work:
    """With the default settings, on samples of sequence_length tokens."""
    n, tokens = config.hidden_size, samples * sequence_length
    trial_length = min(TRIAL_LENGTH, sequence_length)
    trial = min(TRIAL_SEQUENCES, samples) * trial_length
    parameters = sum(k * rows for k, rows in linears(config))

    def forward(tokens: int, length: int) -> float:
        return 2 * parameters * tokens + 4 * tokens * length * n  # linears, scores and values

    # The survey and the collection of Hessians; the trial of the bases and its reference.
    flops = 2 * forward(tokens, sequence_length) + (CANDIDATES + 1) * forward(trial, trial_length)
    flops += CANDIDATES * 2 * 2 * (2 * trial * n**2)  # to each basis and back, twice a block
    flops += 2 * (2 * tokens * n**2)  # moments of what attention and MLP read
    double_flops = float(2 * parameters * n)  # rotations folded into the weights
    launches = elements = 0.0
    for k, rows in linears(config):
        flops += tokens * k * (k + COLUMNS_AT_ONCE)  # the upper half of the Hessian
        double_flops += (1 / 3 + 1) * k**3  # Cholesky, and the inverse of its factor
        # Errors spread: 1, descend: 4, fit_scales: 4, output_error: 4.
        flops += 13 * rows * k**2
        parts = -(-rows // ROWS_AT_ONCE)
        searches = SEARCH_OPERATIONS * len(CLIP_RATIOS)
        launches += parts * (STEP_OPERATIONS * k + searches)
        elements += rows * k * (STEP_OPERATIONS + searches)
    return Work(flops, double_flops, elements, launches, 3 * 2 * parameters)


def matrix_bytes(config: LlamaConfig) -> int:
    """What a block holds at most: its weights, and what the widest linear's Hessian needs.

    That is itself, its mirror image and three matrices of double precision (gptq.factor).
    """
    parameters = sum(k * rows for k, rows in linears(config))
    return 4 * parameters + (4 + 3 * 8) * max(k for k, _ in linears(config)) ** 2


def this_machine() -> Machine:
    """Rates of PyTorch here and now, of products of 1,024 channels."""
    x = torch.randn(1024, 1024)
    y, small = x.double(), torch.randn(2**17)
    out = torch.empty_like(small)
    flops, double_flops = (
        2 * 1024**3 / median_seconds(lambda: x @ x),
        2 * 1024**3 / median_seconds(lambda: y @ y),
    )
    elements = len(small) / median_seconds(lambda: torch.div(small, 3.0, out=out))
    return Machine("this CPU", flops, double_flops, elements, 1e-6)
