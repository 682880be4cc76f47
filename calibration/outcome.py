"""What a run did."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """What a run did."""

    signal_to_noise: dict[str, list[float]] = field(default_factory=dict)
    """Of each site's quantized input, in dB, a value a layer."""
    output_error: dict[str, float] = field(default_factory=dict)
    """Of each linear: squared error of its output from rounding weights, relative."""
    original_bytes: int = 0
    checkpoint_bytes: int = 0
    seconds: float = 0.0
