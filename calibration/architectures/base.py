"""The shape of an architecture table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vllm_offq.architectures import Layout

SiteName = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]
Role = Literal["query", "key", "value", "gate", "up"]


@dataclass(frozen=True)
class Site:
    """Linears of a block that share an input."""

    name: SiteName
    modules: tuple[str, ...]
    """Paths below the block."""
    reads_residual: bool
    """Whether the input is the residual stream; otherwise the output is added to it."""
    norm: str | None = None
    """Path of the RMSNorm whose gain is folded into them; None where the input has no norm."""


@dataclass(frozen=True)
class Architecture:
    """A decoder whose blocks hold attention and a gated MLP, each added to the residual stream."""

    layout: Layout
    query: str = "self_attn.q_proj"
    """This and the next are paths below a block. Roles that share a linear have its rows in the
    order query, key, value, or gate, up."""
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str | None = "input_layernorm"
    """Of the input of attention; None where it reads the residual stream as it is."""
    mlp_norm: str | None = "post_attention_layernorm"
    output_norms: tuple[str, ...] = ()
    """Of what attention and MLP add to the residual stream. Their gains act on its channels one
    by one, so no rotation can be fused through them, but a permutation can."""
    gain_offset: float = 0.0
    """Norms multiply by their weight plus this."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """What of a config the class has but OffQ or vLLM does not do, as the end of a sentence."""

    @property
    def name(self) -> str:
        """Hugging Face class."""
        return self.layout.name

    @property
    def layers(self) -> str:
        """Path of the decoder blocks."""
        return self.layout.layers

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        return self.layout.embedding

    @property
    def final_norm(self) -> str:
        """Path of the norm before the head."""
        return self.layout.final_norm

    @property
    def head(self) -> str:
        """Path of the output head."""
        return self.layout.head

    @property
    def attention(self) -> str:
        """Path of the attention module below a block."""
        return self.layout.attention

    @property
    def sites(self) -> tuple[Site, ...]:
        """The four places of a block where activations are quantized."""
        inputs = tuple(dict.fromkeys((self.query, self.key, self.value)))
        gate_up = tuple(dict.fromkeys((self.gate, self.up)))
        return (
            Site("attention_input", inputs, True, self.attention_norm),
            Site("attention_output", (self.output,), False),
            Site("mlp_input", gate_up, True, self.mlp_norm),
            Site("mlp_output", (self.down,), False),
        )

    def rows(self, role: Role, config: Any) -> slice:
        """Which rows of its linear a role has. config: the Hugging Face config."""
        dim = head_size(config)
        sizes: dict[Role, int] = {
            "query": config.num_attention_heads * dim,
            "key": config.num_key_value_heads * dim,
            "value": config.num_key_value_heads * dim,
            "gate": config.intermediate_size,
            "up": config.intermediate_size,
        }
        start = 0
        for other, size in sizes.items():
            if other == role:
                return slice(start, start + size)
            if getattr(self, other) == getattr(self, role):
                start += size
        raise KeyError(role)


def layer_windows(config: Any) -> str | None:
    """A refusal, for classes where transformers and vLLM read `layer_types` differently."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return "sliding windows in some layers"
    return None


def head_size(config: Any) -> int:
    """Channels of one attention head of a Hugging Face config."""
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads
