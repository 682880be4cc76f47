"""A checkpoint computed by plain transformers, quantizing and dequantizing in torch.

The reference for what a server must answer, and the quick way to measure a recipe: the same
grid and rotations as vllm_offq.kernels.reference, in the Hugging Face classes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from calibration.architectures import find_architecture
from calibration.devices import CPU, dispatch, places
from calibration.experts import separate_experts
from calibration.fuse import fuse_block, fuse_embedding, fuse_head
from calibration.instrument import OffQLinear, attention_state, instrument, layers_of, to_device
from calibration.loader import Original
from calibration.multimodal import plain_name, surroundings
from calibration.rotations import Rotations
from vllm_offq.checkpoint import Checkpoint
from vllm_offq.format import (
    KEY_ROTATION,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    unpack_int4,
    unpack_int8,
)
from vllm_offq.quantizer import dequantize


@contextmanager
def fused_model(original: Original, rotations: Rotations) -> Iterator[PreTrainedModel]:
    """The whole original in memory, instrumented, gains and rotations folded in, grids off."""
    model, architecture = original.model, original.architecture
    instrument(model, architecture)
    with torch.no_grad(), original.loaded(""):
        embedding, final_norm = map(
            model.get_submodule, (architecture.embedding, architecture.final_norm)
        )
        head: nn.Linear = model.get_submodule(architecture.head)  # type: ignore[assignment]
        fuse_embedding(embedding, rotations)
        for index, layer in enumerate(layers_of(model, architecture)):
            fuse_block(layer, index, model.config, architecture, rotations)
        if architecture.layout.head_is_embedding:
            head.weight.copy_(embedding.weight)  # type: ignore[arg-type]
            fuse_head(None, final_norm, architecture, rotations)
        else:
            fuse_head(head, final_norm, architecture, rotations)
        yield model


def load_simulated(path: str | Path) -> tuple[PreTrainedModel, Tokenizer]:
    """The whole model of an OffQ checkpoint in float32 with its grids on, and its tokenizer.

    Raises: UserError if path is no OffQ checkpoint.
    """
    checkpoint = Checkpoint(Path(path))
    hf_config = AutoConfig.from_pretrained(path)
    around = surroundings(hf_config, Path(path))
    names = filter(around.wrapper.surrounds, checkpoint.names) if around else ()
    rest = {name: checkpoint.load(name) for name in names}
    tensors = {
        plain_name(name) if around else name: checkpoint.load(name)
        for name in checkpoint.names
        if name not in rest
    }
    if around is None:
        model = simulated_model(hf_config, checkpoint.config, tensors)
    else:
        language = simulated_model(around.language_config, checkpoint.config, tensors)
        model = around.join(language, rest)
    return model, AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def simulated_model(
    hf_config: PreTrainedConfig,
    config: CheckpointConfig,
    tensors: Mapping[str, Tensor],
    devices: tuple[torch.device, ...] = (CPU,),
) -> PreTrainedModel:
    """The model of a checkpoint's tensors, by name, in float32 with its grids on."""
    hf_config = deepcopy(hf_config)
    hf_config.quantization_config = None
    architecture = find_architecture(hf_config.architectures).of(hf_config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    separate_experts(model, architecture)
    model.requires_grad_(False)
    instrument(model, architecture)
    unpacks: dict[str, Callable[[Tensor], Tensor]] = {}
    if config.head is not None and config.head.bits == 8:
        unpacks[architecture.head] = unpack_int8
    if config.embedding is not None and config.embedding.bits == 8:
        unpacks[architecture.embedding] = lambda codes: codes
    state = model.state_dict()  # filled one by one: all in float32 would be a second model
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == WEIGHT_PACKED:
            unpack = unpacks.get(module, unpack_int4)
            weight = dequantize(unpack(tensor), tensors[f"{module}.{WEIGHT_SCALE}"])
            state.pop(f"{architecture.in_memory(module)}.weight").copy_(weight)
        elif kind not in (WEIGHT_SCALE, KEY_ROTATION):
            state.pop(architecture.in_memory(name)).copy_(tensor)
    if architecture.layout.head_is_embedding:
        embedding = model.get_parameter(f"{architecture.embedding}.weight")
        state.pop(f"{architecture.head}.weight").copy_(embedding)
    if state:
        raise ValueError(f"no tensor of the checkpoint is {', '.join(state)}")
    if config.head is not None:
        head = OffQLinear(model.get_submodule(architecture.head))
        head.grid = config.head.site
        model.set_submodule(architecture.head, head)
    dispatch(model, places(model, architecture, devices))
    for index, layer in enumerate(layers_of(model, architecture)):
        for site in architecture.sites:
            for module_path in site.modules:
                linear: OffQLinear = layer.get_submodule(module_path)  # type: ignore[assignment]
                linear.grid = config.sites[site.name]
                linear.online_hadamard = linear.grid.online_hadamard
        if config.kv_cache is not None:
            state = attention_state(layer, architecture)
            state.kv_group_size = config.kv_cache.group_size
            if config.kv_cache.key_rotation:
                path = f"{architecture.layers}.{index}.{architecture.attention}"
                rotation = tensors[f"{path}.attn.{KEY_ROTATION}"].float()
                state.key_rotation = to_device(rotation, layer)
    return model
