"""The original model, without its weights until they are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from calibration.architectures import Architecture, find_architecture
from calibration.devices import CPU, device_of, dispatch, places
from calibration.experts import separate_experts
from calibration.memory import give_back, refuse_small_memory
from calibration.multimodal import Surroundings, plain_name, surroundings
from calibration.source import class_names, generation_config, locate, read_config
from calibration.weights import LoadedWeights, ShardedWeights, Weights, checked
from vllm_offq.errors import UserError, reason

COMPUTED = ".rotary_emb.inv_freq"
"""Ends names of tables that old checkpoints hold and nobody reads."""
NAMED = 4
"""Tensors that a refusal lists."""


@dataclass
class Original:
    """A model whose parameters are on the meta device, but for those that `loaded` holds."""

    name: str
    model: PreTrainedModel
    """The language model."""
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    dtype: torch.dtype
    """The dtype of the original's weights."""
    devices: tuple[torch.device, ...] = (CPU,)
    """Where what is loaded goes, and therefore computes: the first, or all for the whole model."""
    surroundings: Surroundings | None = None
    """What is around the language model, in a multimodal class."""

    @property
    def class_name(self) -> str:
        """Hugging Face class of the whole."""
        return (self.surroundings.wrapper if self.surroundings else self.architecture).name

    @property
    def device(self) -> torch.device:
        """Where a block computes."""
        return self.devices[0]

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(list(self.model.get_submodule(self.architecture.layers).children()))

    @property
    def num_bytes(self) -> int:
        """Of the original's weights as it stores them, tied tensors once."""
        tied = self.architecture.head if self.model.config.tie_word_embeddings else "none"
        language = self.dtype.itemsize * sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{tied}.")
        )
        return language + self.rest_bytes

    @property
    def rest_bytes(self) -> int:
        """Of all that is not the language model."""
        return self.surroundings.num_bytes(self.weights) if self.surroundings else 0

    def rest(self, fuse: Callable[[Tensor], None]) -> Iterator[tuple[str, Tensor]]:
        """All that is not the language model, if there is any; see Surroundings.tensors."""
        if self.surroundings is not None:
            yield from self.surroundings.tensors(self.weights, fuse)

    def save_config(self, folder: Path) -> None:
        """Write the language model's configuration as it is now, within the whole model's."""
        if self.surroundings is None:
            self.model.config.save_pretrained(folder)
        else:
            self.surroundings.save(self.model.config, folder)

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[list[nn.Module]]:
        """The submodules at these paths ("" is the whole model) with their weights, in float32.

        After the block they are gone again, and with them whatever was changed in place.
        Raises: UserError naming a tensor that is missing, of another shape or not finite.
        """
        modules = [self.model.get_submodule(path) for path in paths]
        devices = self.devices if "" in paths else self.devices[:1]
        where = places(self.model, self.architecture, devices)
        try:
            for path, module in zip(paths, modules, strict=True):
                # Tied parameters are listed twice: each place gets its own.
                for name, parameter in module.named_parameters(remove_duplicate=False):
                    full = f"{path}.{name}".lstrip(".")
                    stored = self._stored_name(full)
                    value = checked(stored, self.weights.load(stored), parameter.shape)
                    device = device_of(full, where)
                    set_module_tensor_to_device(module, name, device, value, torch.float32)
            if len(devices) > 1:
                dispatch(self.model, where)
            yield modules
        finally:
            if len(devices) > 1:
                remove_hook_from_submodules(self.model)
            for module in modules:
                for name, _ in list(module.named_parameters(remove_duplicate=False)):
                    set_module_tensor_to_device(module, name, "meta")
            give_back()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One decoder block, as `loaded` does it."""
        with self.loaded(f"{self.architecture.layers}.{index}") as (layer,):
            yield layer

    def _stored_name(self, name: str) -> str:
        head = f"{self.architecture.head}.weight"
        if name == head and head not in self.weights:
            return f"{self.architecture.embedding}.weight"
        return self.architecture.stored(name)


def load_original(source: str, devices: tuple[torch.device, ...] = (CPU,)) -> Original:
    """Open a model for calibration on devices. Code from the checkpoint is never run.

    Raises: UserError if source is no model, of an unsupported architecture, quantized already
    (GGUF files excepted: they are dequantized, in memory as a whole), damaged, or has tensors in
    its blocks that its configuration does not name.
    """
    disable_progress_bar()
    folder, arguments = locate(source)
    config = read_config(source, folder, arguments)
    gguf = "gguf_file" in arguments
    if getattr(config, "quantization_config", None) is not None and not gguf:
        raise UserError(f"{source} is quantized already; give the original 16-bit model")
    around = surroundings(config, Path(folder))
    if around is not None:
        config = around.language_config
    names = class_names(config.architectures, config.model_type)
    architecture = find_architecture(names).of(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    except Exception as error:
        raise UserError(f"{source} has no tokenizer that loads ({reason(error)})") from None
    weights: Weights
    try:
        if gguf and architecture.num_experts:
            raise UserError(f"{source} is a mixture of experts in GGUF; give its original folder")
        if gguf:
            reader = GGUFReader(Path(folder, arguments["gguf_file"]))
            refuse_small_memory(
                4 * sum(int(tensor.n_elements) for tensor in reader.tensors),
                f"{source}, as GGUF files are read as a whole,",
                "give the original folder, which is read block by block",
            )
            put_bos(tokenizer, reader)
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, **arguments
            )
            config = model.config
            weights = LoadedWeights(model.state_dict())
        else:
            weights = ShardedWeights(Path(folder), plain_name if around else str)
        skeleton = _skeleton(config, architecture, devices[0])
        _refuse_unnamed(source, weights, skeleton, architecture)
        tied = config.tie_word_embeddings or (around and around.config.tie_word_embeddings)
        if not tied and f"{architecture.head}.weight" not in weights:
            raise UserError(
                f"{source} has no {architecture.head}.weight, and its configuration does not tie "
                "it to the embedding; it may be incomplete"
            )
        if around is not None:
            around.check(weights)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source} cannot be loaded, its files may be incomplete or its configuration wrong "
            f"({reason(error)})"
        ) from None
    skeleton.config.quantization_config = None
    skeleton.generation_config = generation_config(folder) or skeleton.generation_config
    return Original(
        name=_name(source),
        model=skeleton,
        weights=weights,
        tokenizer=tokenizer,
        architecture=architecture,
        dtype=torch.float32 if gguf else weights.load(f"{architecture.embedding}.weight").dtype,
        devices=devices,
        surroundings=around,
    )


def _name(source: str) -> str:
    path = Path(source)
    if not path.exists():
        return source
    # A link's own name says more than that of what it leads to, in the hub's cache above all.
    return path.name if path.name not in ("", "..") else path.resolve().name


def refuse_overlap(source: str, out: Path) -> None:
    """Raises: UserError if `out` holds what `load_original` reads, which would go when it does."""
    path, out = Path(source), out.resolve()
    for file in (path, *(path.iterdir() if path.is_dir() else ())):
        if file.exists() and file.resolve().is_relative_to(out):
            raise UserError(
                f"writing {out} would delete {file}, from which the original is read; choose "
                "another folder"
            )


def _skeleton(config: Any, architecture: Architecture, device: torch.device) -> PreTrainedModel:
    # Buffers are real: tables of rotary embeddings are in no checkpoint.
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        separate_experts(model, architecture)
    for name, buffer in list(model.named_buffers()):
        set_module_tensor_to_device(model, name, device, buffer)
    return model.eval().requires_grad_(False)


def _refuse_unnamed(
    source: str, weights: Weights, skeleton: PreTrainedModel, architecture: Architecture
) -> None:
    """Raises: UserError for tensors of decoder blocks that would be lost without a word."""
    named = {architecture.stored(name) for name, _ in skeleton.named_parameters()}
    unnamed = [
        name
        for name in weights.names
        if name.startswith(f"{architecture.layers}.")
        and not name.endswith(COMPUTED)
        and name not in named
    ]
    if unnamed:
        more = f" and {len(unnamed) - NAMED} more" if len(unnamed) > NAMED else ""
        raise UserError(
            f"{source} has tensors that its configuration, of {skeleton.config.num_hidden_layers} "
            f"layers, does not name: {', '.join(unnamed[:NAMED])}{more}; correct config.json, or "
            "where the model does without (layers of multi-token prediction) quantize a copy that "
            "has them removed"
        )


def put_bos(tokenizer: PreTrainedTokenizerBase, gguf: GGUFReader) -> None:
    """Make it begin prompts with BOS if the file says so: transformers overlooks it, and a model
    that was trained with BOS (Gemma) is unusable without."""
    says = gguf.get_field("tokenizer.ggml.add_bos_token")
    if says is not None:
        tokenizer.add_bos_token = bool(says.contents())
