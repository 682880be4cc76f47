"""What surrounds the language model of a multimodal class: copied, but for where it is joined.

Calibration sees the language model alone. Its residual stream is rotated, so what writes images to
it must rotate them likewise.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from calibration.weights import Weights
from vllm_offq.errors import UserError
from vllm_offq.format import CONFIG_FILE
from vllm_offq.wrappers import PREFIX, WRAPPERS, Wrapper

SAVED_BY_TRANSFORMERS = {
    "model.language_model.": f"{PREFIX}model.",
    "lm_head.": f"{PREFIX}lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
"""Names that some of its versions give, and those of the hub, which vLLM has."""
CLIP_LIKE = re.compile(r"vision_tower\.(?=(embeddings|pre_layrnorm|encoder|post_layernorm|head)\.)")
"""Where others leave a `vision_model` out that vLLM needs."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def stored_name(name: str) -> str:
    """A tensor's name in a checkpoint, by that in any folder of its class."""
    for prefix, stored in SAVED_BY_TRANSFORMERS.items():
        if name.startswith(prefix):
            name = stored + name.removeprefix(prefix)
            break
    return CLIP_LIKE.sub("vision_tower.vision_model.", name)


def plain_name(name: str) -> str:
    """Likewise, but a language model's tensor by its name in that alone."""
    return stored_name(name).removeprefix(PREFIX)


@dataclass
class Surroundings:
    """All of a model that is not its language model."""

    wrapper: Wrapper
    config: PreTrainedConfig
    """Of the whole model."""
    folder: Path

    @property
    def language_config(self) -> PreTrainedConfig:
        """Of the language model alone, its class included. Raises: UserError if unsupported."""
        config = deepcopy(self.config.get_text_config())
        config.architectures = [self.wrapper.language(config.model_type)]
        return config

    def num_bytes(self, weights: Weights) -> int:
        """Of its tensors."""
        return sum(map(weights.num_bytes, filter(self.wrapper.surrounds, weights.names)))

    def check(self, weights: Weights) -> None:
        """Raises: UserError as `tensors` would, which comes after all other work."""
        for _ in self.tensors(weights, lambda _: None):
            pass

    def tensors(
        self, weights: Weights, fuse: Callable[[Tensor], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Its tensors one by one, the same but for those that write to the residual stream.

        fuse: called with each of these as [..., n], n channels of the stream, to change in place.
        Raises: UserError naming one that is missing or cannot be used.
        """
        width = self.config.get_text_config().hidden_size
        names = list(filter(self.wrapper.surrounds, weights.names))
        for name in self.wrapper.needed:
            if name not in names:
                raise UserError(f"tensor {name} is missing in {self.folder}; it may be incomplete")
        for name in names:
            tensor = weights.load(name)
            if not (tensor.is_floating_point() and tensor.isfinite().all()):
                raise UserError(f"tensor {name} is not of finite floating-point numbers")
            axis = self.wrapper.into_stream.get(name)
            if axis is not None:
                if tensor.shape[axis] != width:
                    raise UserError(
                        f"tensor {name} has shape {list(tensor.shape)}, but the language model is "
                        f"{width} wide"
                    )
                fuse(torch.atleast_2d(tensor.movedim(axis, -1)))
            yield name, tensor

    def save(self, language: PreTrainedConfig, folder: Path) -> None:
        """Write the whole model's configuration, and copy what prepares images and chats.

        language: of the language model, with all that the checkpoint's configuration adds.
        """
        config = deepcopy(self.config)
        config.text_config = language
        config.architectures = [self.wrapper.name]
        for key in ("tie_word_embeddings", "dtype", "quantization_config"):
            setattr(config, key, getattr(language, key))
        # In full: readers know no defaults of what is nested.
        config.to_json_file(folder / CONFIG_FILE, use_diff=False)
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def join(self, language: PreTrainedModel, rest: Mapping[str, Tensor]) -> PreTrainedModel:
        """The whole model in float32, around a language model that is in memory.

        rest: all other tensors by their names in a checkpoint.
        """
        config = deepcopy(self.config)
        config.quantization_config = None
        model: PreTrainedModel = getattr(transformers, self.wrapper.name).from_pretrained(
            None, config=config, state_dict=dict(rest), dtype=torch.float32
        )
        model.eval().requires_grad_(False)
        model.set_submodule("model.language_model", language.get_decoder())
        model.set_submodule("lm_head", language.get_submodule("lm_head"))
        model.config.text_config = language.config  # by it, masks are made
        return model


def surroundings(config: PreTrainedConfig, folder: Path) -> Surroundings | None:
    """Of a model by its Hugging Face config; None: it is a language model itself."""
    for name in config.architectures or []:
        if name in WRAPPERS:
            return Surroundings(WRAPPERS[name], config, folder)
    return None
