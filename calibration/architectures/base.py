"""The shape of an architecture table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_offq.architectures import Layout

SiteName = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]
Role = Literal["query", "key", "value", "gate", "up"]


@dataclass(frozen=True)
class Site:
    """A place in a block where activations are quantized."""

    name: SiteName
    groups: tuple[tuple[str, ...], ...]
    """Paths below the block of linears that get the very same tokens; one group, but for
    experts."""
    reads_residual: bool
    """Whether the input is the residual stream; otherwise the output is added to it."""
    norm: str | None = None
    """Path of the RMSNorm whose gain is folded into them; None where the input has no norm."""
    router: str | None = None
    """Path of what reads the same input and is not quantized."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all linears."""
        return tuple(path for group in self.groups for path in group)

    @property
    def reader(self) -> str:
        """Path of a module that gets all tokens of the input as its first argument."""
        return self.groups[0][0] if self.router is None else self.router.rpartition(".")[0]


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
    num_experts: int = 0
    """Of this model, see `of`."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """What of a config the class has but OffQ or vLLM does not do, as the end of a sentence."""

    def of(self, config: Any) -> "Architecture":
        """The table for one model of this class. config: the Hugging Face config."""
        experts = self.layout.experts
        if experts is None:
            return self
        count = next(getattr(config, key) for key in experts.count if hasattr(config, key))
        return replace(self, num_experts=count)

    def intermediate_size(self, config: Any) -> int:
        """Width of an MLP, or of an expert. config: the Hugging Face config."""
        experts = self.layout.experts
        return getattr(config, "intermediate_size" if experts is None else experts.intermediate)

    @property
    def experts(self) -> str:
        """Path of the experts below a block, as transformers has it in memory."""
        return "mlp.experts"

    def stored(self, name: str) -> str:
        """A parameter's name on disk, by its name in memory."""
        experts = self.layout.experts
        return name if experts is None else name.replace(".mlp.", f".{experts.path}.", 1)

    def in_memory(self, name: str) -> str:
        """Inverse of stored."""
        experts = self.layout.experts
        return name if experts is None else name.replace(f".{experts.path}.", ".mlp.", 1)

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
        router = "mlp.gate" if self.num_experts else None
        return (
            Site("attention_input", (inputs,), True, self.attention_norm),
            Site("attention_output", ((self.output,),), False),
            Site("mlp_input", tuple(g for g, _ in self.mlps), True, self.mlp_norm, router),
            Site("mlp_output", tuple((down,) for _, down in self.mlps), False),
        )

    @property
    def rotates_stream(self) -> bool:
        """Whether a rotation of the residual stream can be fused, so that it has a basis."""
        return not self.output_norms

    @property
    def keeps_gains(self) -> bool:
        """Whether norms before linears may keep gains: no rotation has to pass them."""
        return not self.rotates_stream and self.attention_norm is not None

    @property
    def keeps_final_gains(self) -> bool:
        """Likewise the norm before the head."""
        return not self.rotates_stream and not self.layout.head_is_embedding

    @property
    def reading(self) -> tuple[Site, ...]:
        """Those that read the residual stream: attention's input and the MLP's."""
        return tuple(site for site in self.sites if site.reads_residual)

    @property
    def mlps(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Gate and up, and down, of the MLP or of every expert."""
        experts = self.layout.experts
        if experts is None:
            return ((tuple(dict.fromkeys((self.gate, self.up))), self.down),)
        gate, up, down = experts.linears
        paths = [f"{self.experts}.{number}." for number in range(self.num_experts)]
        return tuple(((path + gate, path + up), path + down) for path in paths)

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
