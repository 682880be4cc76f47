"""Reading the original model: a Hugging Face folder, a hub id or a GGUF file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from calibration.architectures import Architecture, find_architecture
from vllm_offq.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


@dataclass
class Original:
    """A model in float32, and what its checkpoint carries over."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    dtype: torch.dtype
    """The dtype of the original's weights."""


def load_original(source: str) -> Original:
    """Load a model for calibration, in float32. Code from the checkpoint is never run.

    Raises: UserError if source is no model, of an unsupported architecture, quantized already
    (GGUF files excepted: they are dequantized), or damaged.
    """
    disable_progress_bar()
    folder, arguments = _locate(source)
    try:
        config = AutoConfig.from_pretrained(folder, **arguments)
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(f"{source} has no readable model configuration: {_first(error)}") from None
    gguf = "gguf_file" in arguments
    if getattr(config, "quantization_config", None) is not None and not gguf:
        raise UserError(f"{source} is quantized already; give the original 16-bit model")
    architecture = _architecture(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=None if gguf else True, **arguments
        )
    except Exception as error:
        raise UserError(
            f"{source} cannot be loaded, it may be incomplete: {_first(error)}"
        ) from None
    model.eval().requires_grad_(False)
    model.config.quantization_config = None
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{source}: tensor {name} has NaN or infinite values; it is damaged")
    dtype = getattr(config, "dtype", None)
    return Original(
        name=Path(source).name if Path(source).exists() else source,
        model=model,
        tokenizer=tokenizer,
        architecture=architecture,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
    )


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source} is a file but no .gguf; give a model folder, hub id or GGUF")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{source} is no model folder: it has no config.json")
        return str(path), {}
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{source} does not exist and is no hub id (owner/name)")
    try:
        return snapshot_download(source, allow_patterns=FILES), {}
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source} is no local folder and cannot be fetched from the hub: {_first(error)}"
        ) from None


def _architecture(config: Any) -> Architecture:
    names = config.architectures
    if not names:  # a GGUF names its model type only
        names = [f"{config.model_type.capitalize()}ForCausalLM"]
    return find_architecture(names)


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
