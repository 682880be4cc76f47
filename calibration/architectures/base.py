"""The shape of an architecture table."""

from dataclasses import dataclass
from typing import Any, Literal

SiteName = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]


@dataclass(frozen=True)
class Site:
    """Linears of a block that share an input."""

    name: SiteName
    modules: tuple[str, ...]
    """Paths below the block."""
    norm: str | None = None
    """Path of the RMSNorm whose gain is folded into them; None where the input has no norm."""


@dataclass(frozen=True)
class Architecture:
    """Pre-norm decoder: every block reads the residual stream through a norm and adds to it."""

    name: str
    """Hugging Face class."""
    layers: str
    embedding: str
    final_norm: str
    head: str
    attention: str
    """Path of the attention module below a block."""
    query: str
    key: str
    value: str
    output: str
    gate: str
    up: str
    down: str
    input_norm: str
    post_attention_norm: str

    @property
    def sites(self) -> tuple[Site, ...]:
        """The four places of a block where activations are quantized."""
        return (
            Site("attention_input", (self.query, self.key, self.value), self.input_norm),
            Site("attention_output", (self.output,)),
            Site("mlp_input", (self.gate, self.up), self.post_attention_norm),
            Site("mlp_output", (self.down,)),
        )


def head_size(config: Any) -> int:
    """Channels of one attention head of a Hugging Face config."""
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads
