"""Reports with plausible numbers, and none that came from a run."""

import random
from datetime import UTC, datetime
from typing import Any

from calibration.report import (
    BasisCandidate,
    Histogram,
    Histograms,
    Refinement,
    Report,
    Spectrum,
)

SITES = ("attention_input", "attention_output", "mlp_input", "mlp_output")
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def sample_report(layers: int = 2, seed: int = 0, experts: int = 0, **changes: Any) -> Report:
    """A report with all parts, those of experts only where there are some."""
    rng = random.Random(seed)
    paths = [*LINEARS, *(f"mlp.experts.{expert}.down_proj" for expert in range(experts))]
    values: dict[str, Any] = {
        "model": "example/tiny",
        "architecture": "LlamaForCausalLM",
        "produced_by": "vllm-offq 0.1",
        "settings": {"recipe": "offq", "kv_bits": "4", "group_size": None, "seed": seed},
        "started": datetime(2026, 3, 4, 5, 6, tzinfo=UTC),
        "seconds": 75.0,
        "seconds_by_stage": {"measuring activations": 30.0, "quantizing": 45.0},
        "original_bytes": 4_000_000,
        "checkpoint_bytes": 1_000_000,
        "sizes": {"embedding": 400_000, "quantized weights": 600_000},
        "signal_to_noise": {site: [rng.gauss(24, 1) for _ in range(layers)] for site in SITES},
        "output_error": {
            f"model.layers.{layer}.{path}": rng.uniform(0.005, 0.02)
            for layer in range(layers)
            for path in paths
        },
        "spectrum": Spectrum(basis="top-1", fractions=[0.5, 0.2, 0.1, 0.01]),
        "histograms": Histograms(
            layer="model.layers.1",
            site="attention_input",
            stages=[
                _histogram("original", 64.0, [3, 900, 1000, 2]),
                _histogram("rotated", 16.0, [0, 900, 1000, 5]),
                _histogram("offset removed", 8.0, [4, 900, 1000, 1]),
            ],
        ),
        "expert_counts": {
            f"model.layers.{layer}.mlp": [rng.randrange(2000) for _ in range(experts)]
            for layer in range(layers)
        }
        if experts
        else None,
        "basis_candidates": [
            BasisCandidate(
                name="top-1", mean_error=0.004, worst_error=0.006, divergence=0.031, chosen=True
            ),
            BasisCandidate(
                name="all", mean_error=0.005, worst_error=0.009, divergence=0.042, chosen=False
            ),
        ],
        "refinement": Refinement(steps=64, before=0.21, after=0.17, used=True),
        "clip_ratios": dict.fromkeys(SITES, 0.95),
    }
    return Report(**values | changes)


def _histogram(stage: Any, reach: float, counts: list[int]) -> Histogram:
    return Histogram(
        stage=stage,
        bin_edges=[-reach, -reach / 2, 0.0, reach / 2, reach],
        counts=counts,
        max_magnitude=0.9 * reach,
        rms=1.5,
        kurtosis=reach,
    )


NOTHING_OPTIONAL: dict[str, Any] = dict.fromkeys(
    ("spectrum", "histograms", "expert_counts", "basis_candidates", "refinement", "clip_ratios")
)
