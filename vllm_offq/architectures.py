"""Names and shapes of the tensors of every supported model class.

Calibration builds its tables upon these, the plugin validates checkpoints by them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vllm_offq.errors import UserError
from vllm_offq.wrappers import PREFIX, WRAPPERS, class_name, find_wrapper, language_config

HEAD = "lm_head"


@dataclass(frozen=True)
class Sizes:
    """The widths that the shapes of a transformer are made of."""

    hidden: int
    query: int
    """num_attention_heads * head_dim."""
    key: int
    """num_key_value_heads * head_dim."""
    intermediate: int
    num_key_heads: int
    head_dim: int
    num_layers: int
    vocabulary: int

    @property
    def query_key_value(self) -> int:
        """Of the three in one linear."""
        return self.query + 2 * self.key

    @property
    def gate_up(self) -> int:
        """Of the two in one linear."""
        return 2 * self.intermediate


ATTENTION_LINEARS = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
}
SEPARATE_LINEARS = ATTENTION_LINEARS | {
    "mlp.gate_proj": ("intermediate", "hidden"),
    "mlp.up_proj": ("intermediate", "hidden"),
    "mlp.down_proj": ("hidden", "intermediate"),
}
FUSED_LINEARS = {
    "self_attn.qkv_proj": ("query_key_value", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_up_proj": ("gate_up", "hidden"),
    "mlp.down_proj": ("hidden", "intermediate"),
}
PRE_NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}
POST_NORMS = {"post_attention_layernorm": "hidden", "post_feedforward_layernorm": "hidden"}
SANDWICH_NORMS = PRE_NORMS | POST_NORMS | {"pre_feedforward_layernorm": "hidden"}
HEAD_NORMS = {"self_attn.q_norm": "head_dim", "self_attn.k_norm": "head_dim"}
WIDE_NORMS = {"self_attn.q_norm": "query", "self_attn.k_norm": "key"}


def _no_bias(model_config: Mapping[str, Any], linear: str) -> bool:
    return False


def _attention_bias(model_config: Mapping[str, Any], linear: str) -> bool:
    return linear.startswith("self_attn.") and bool(model_config.get("attention_bias", False))


def _llama_bias(model_config: Mapping[str, Any], linear: str) -> bool:
    in_mlp = linear.startswith("mlp.") and bool(model_config.get("mlp_bias", False))
    return in_mlp or _attention_bias(model_config, linear)


def _qwen2_bias(model_config: Mapping[str, Any], linear: str) -> bool:
    return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in the place of a block's MLP; experts are numbered from 0."""

    path: str
    """Of the mixture, whose router is `gate` and whose experts are `experts.E`."""
    linears: tuple[str, str, str]
    """Names of an expert's gate, up and down."""
    count: tuple[str, ...]
    """Keys of config.json, the first that there is: how many experts."""
    intermediate: str
    """Key of config.json: width of an expert."""

    @property
    def router(self) -> str:
        """Its path."""
        return f"{self.path}.gate"

    def is_in(self, model_config: Mapping[str, Any], layer: int) -> bool:
        """Whether this block has experts; else it has an MLP. Raises: UserError naming a key."""
        without = model_config.get("mlp_only_layers") or []
        if not isinstance(without, list):
            raise UserError(f"config.json: mlp_only_layers must be a list, not {without!r}")
        step = _size(model_config, "decoder_sparse_step", 1)
        return layer not in without and (layer + 1) % step == 0

    def shapes(self, model_config: Mapping[str, Any], sizes: Sizes) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of every linear. Raises: UserError naming a key that is no size."""
        key = next((key for key in self.count if key in model_config), self.count[0])
        count, width = _size(model_config, key), _size(model_config, self.intermediate)
        gate, up, down = self.linears
        shapes = {self.router: (count, sizes.hidden)}
        for expert in range(count):
            prefix = f"{self.path}.experts.{expert}."
            shapes |= dict.fromkeys((prefix + gate, prefix + up), (width, sizes.hidden))
            shapes[prefix + down] = sizes.hidden, width
        return shapes


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of one model class holds; paths of a block are below it."""

    name: str
    """Hugging Face class."""
    linears: Mapping[str, tuple[str, str]] = field(default_factory=lambda: SEPARATE_LINEARS)
    """Output and input width of each, as attributes of Sizes."""
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    """Width of each RMSNorm, as an attribute of Sizes."""
    has_bias: Callable[[Mapping[str, Any], str], bool] = _no_bias
    """Whether a linear has a bias, by config.json and the linear's path."""
    head_is_embedding: bool = False
    """vLLM's class computes logits with the embedding: there is no head of its own."""
    quantizes_embedding: bool = True
    """vLLM's class asks a quantization method for its embedding."""
    attention: str = "self_attn"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = HEAD
    experts: Experts | None = None
    """Of the blocks that have some; `linears` are then those of a block without."""

    def under(self, prefix: str) -> "Layout":
        """The same, for names that begin with a prefix."""
        paths = ("layers", "embedding", "final_norm", "head")
        return replace(self, **{path: prefix + getattr(self, path) for path in paths})

    def linear_shapes(
        self, model_config: Mapping[str, Any], sizes: Sizes, layer: int
    ) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear of a block.

        Raises: UserError naming a size that config.json lacks.
        """
        experts = self.experts
        has_experts = experts is not None and experts.is_in(model_config, layer)
        linears = ATTENTION_LINEARS if has_experts else self.linears
        shapes = {name: (getattr(sizes, n), getattr(sizes, k)) for name, (n, k) in linears.items()}
        if experts is not None and has_experts:
            shapes |= experts.shapes(model_config, sizes)
        return shapes


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("LlamaForCausalLM", has_bias=_llama_bias),
        Layout("MistralForCausalLM"),
        Layout("Qwen2ForCausalLM", has_bias=_qwen2_bias),
        Layout("Qwen3ForCausalLM", norms=PRE_NORMS | HEAD_NORMS),
        Layout("Phi3ForCausalLM", linears=FUSED_LINEARS),
        Layout(
            "Gemma2ForCausalLM",
            norms=SANDWICH_NORMS,
            has_bias=_attention_bias,
            head_is_embedding=True,
            quantizes_embedding=False,
        ),
        Layout("Gemma3ForCausalLM", norms=SANDWICH_NORMS | HEAD_NORMS, has_bias=_attention_bias),
        Layout("Olmo2ForCausalLM", norms=POST_NORMS | WIDE_NORMS, has_bias=_attention_bias),
        Layout(
            "MixtralForCausalLM",
            quantizes_embedding=False,
            experts=Experts(
                "block_sparse_moe",
                linears=("w1", "w3", "w2"),
                count=("num_local_experts",),
                intermediate="intermediate_size",
            ),
        ),
        Layout(
            "Qwen3MoeForCausalLM",
            norms=PRE_NORMS | HEAD_NORMS,
            experts=Experts(
                "mlp",
                linears=("gate_proj", "up_proj", "down_proj"),
                count=("num_experts", "num_local_experts"),
                intermediate="moe_intermediate_size",
            ),
        ),
    )
}


def supported_classes() -> str:
    """Their names, for a refusal."""
    return ", ".join(sorted(LAYOUTS.keys() | WRAPPERS.keys()))


def find_layout(model_config: Mapping[str, Any]) -> Layout:
    """The layout for a config.json. Raises: UserError listing the supported classes."""
    name = class_name(language_config(model_config))
    if name not in LAYOUTS:
        raise UserError(
            f"config.json: architecture {name} is not supported; supported are "
            f"{supported_classes()}"
        )
    layout = LAYOUTS[name]
    return layout if find_wrapper(model_config) is None else layout.under(PREFIX)


def _size(model_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = model_config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} must be a positive number, not {value!r}")
    return value


def read_sizes(model_config: Mapping[str, Any]) -> Sizes:
    """The widths that a config.json gives. Raises: UserError naming one that is no size."""
    size = partial(_size, model_config)
    heads = size("num_attention_heads")
    key_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", size("hidden_size") // heads)
    return Sizes(
        hidden=size("hidden_size"),
        query=heads * head_dim,
        key=key_heads * head_dim,
        intermediate=size("intermediate_size"),
        num_key_heads=key_heads,
        head_dim=head_dim,
        num_layers=size("num_hidden_layers"),
        vocabulary=size("vocab_size"),
    )
