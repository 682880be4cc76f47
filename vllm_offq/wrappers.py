"""Model classes around a language model: only that is quantized.

They put the embeddings of images among those of tokens. So the linear that ends the projector
writes to the residual stream, as does what ends a row of an image in LLaVA-NeXT, and carries
whatever rotation that has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_offq.errors import UserError

PREFIX = "language_model."
"""Of the language model's tensors in a checkpoint, behind which they have their own names."""
REST = ("vision_tower", "multi_modal_projector")
"""Paths of all else, but for single tensors of `Wrapper.into_stream`."""


@dataclass(frozen=True)
class Wrapper:
    """One such class."""

    name: str
    """Hugging Face class."""
    languages: Mapping[str, str]
    """Classes of the language model, by the model_type in text_config."""
    into_stream: Mapping[str, int]
    """Tensors that write to the residual stream, and which axis of each is its channels."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Of into_stream, those that no model does without."""
        return tuple(name for name in self.into_stream if not name.endswith(".bias"))

    def surrounds(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is one of those around the language model."""
        return name in self.into_stream or name.startswith(tuple(f"{path}." for path in REST))

    def language(self, model_type: object) -> str:
        """The language model's class. Raises: UserError listing what there can be."""
        if model_type not in self.languages:
            raise UserError(
                f"{self.name} with a language model of type {model_type} is not supported; "
                f"supported: {', '.join(sorted(self.languages))}"
            )
        return self.languages[str(model_type)]


_LINEAR_2 = {"multi_modal_projector.linear_2.weight": 0, "multi_modal_projector.linear_2.bias": 0}
_MISTRAL = {"mistral": "MistralForCausalLM"}
_LLAVA = _MISTRAL | {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

WRAPPERS = {
    wrapper.name: wrapper
    for wrapper in (
        Wrapper(
            "Gemma3ForConditionalGeneration",
            {"gemma3_text": "Gemma3ForCausalLM"},
            {"multi_modal_projector.mm_input_projection_weight": 1},
        ),
        Wrapper("LlavaForConditionalGeneration", _LLAVA, _LINEAR_2),
        Wrapper("LlavaNextForConditionalGeneration", _LLAVA, _LINEAR_2 | {"image_newline": 0}),
        Wrapper("Mistral3ForConditionalGeneration", _MISTRAL, _LINEAR_2),
    )
}


def is_rest(name: str) -> bool:
    """Whether a tensor of a checkpoint is around a language model, in one of the classes."""
    return any(wrapper.surrounds(name) for wrapper in WRAPPERS.values())


def class_name(model_config: Mapping[str, Any]) -> str | None:
    """The first of a config.json's `architectures`."""
    names = model_config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def find_wrapper(model_config: Mapping[str, Any]) -> Wrapper | None:
    """What is around the language model of a config.json; None: the model is one itself."""
    return WRAPPERS.get(class_name(model_config) or "")


def language_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model, its class included.

    Raises: UserError if there is none, or one that its class is not supported with.
    """
    wrapper = find_wrapper(model_config)
    if wrapper is None:
        return model_config
    config = model_config.get("text_config")
    if not isinstance(config, dict):
        raise UserError(f"config.json: {wrapper.name} needs a text_config")
    return config | {"architectures": [wrapper.language(config.get("model_type"))]}
