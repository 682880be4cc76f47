"""Where a model is, and what its files say of it before it is loaded."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calibration.architectures import find_architecture
from vllm_offq.errors import UserError, reason
from vllm_offq.format import CONFIG_FILE
from vllm_offq.wrappers import WRAPPERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
GENERATION_FILE = "generation_config.json"


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """The folder of a model, and how transformers is asked for what is in it.

    source: Hugging Face folder, hub id or GGUF file.
    Raises: UserError if it is none of them.
    """
    arguments: dict[str, Any] = {"trust_remote_code": False}  # or transformers asks on the terminal
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source} is a file but no .gguf; give a model folder, hub id or GGUF")
        return str(path.parent), arguments | {"gguf_file": path.name}
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"{source} is no model folder: it has no {CONFIG_FILE}")
        return str(path), arguments
    nowhere = UserError(f"{source} does not exist and is no hub id (owner/name)")
    if not HUB_ID.fullmatch(source):
        raise nowhere
    try:
        return snapshot_download(source, allow_patterns=FILES), arguments
    except HFValidationError:
        raise nowhere from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source} is no local folder and cannot be fetched from the hub ({reason(error)})"
        ) from None


def read_config(source: str, folder: str, arguments: dict[str, Any]) -> PreTrainedConfig:
    """The Hugging Face config. folder, arguments: see `locate`.

    Raises: UserError if it cannot be read or is of a class that is not supported.
    """
    try:
        if "gguf_file" not in arguments:
            # First, as transformers refuses models that it does not know in words of its own.
            content = json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise UserError(f"{source} is no model: its {CONFIG_FILE} holds no JSON object")
            names = class_names(content.get("architectures"), content.get("model_type"))
            if not WRAPPERS.keys() & set(names):
                find_architecture(names)
        return AutoConfig.from_pretrained(folder, **arguments)
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(f"{source} has no readable model configuration ({reason(error)})") from None


def class_names(architectures: object, model_type: Any) -> list[str]:
    """The classes that a config names, or that of its model type: a GGUF names only that.

    Raises: UserError if they are no list of names.
    """
    if not architectures:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, model_type)
        return [] if name is None else [str(name)]
    if not isinstance(architectures, list) or not all(isinstance(n, str) for n in architectures):
        raise UserError(
            f"{CONFIG_FILE}: architectures must be a list of class names, not {architectures!r}"
        )
    return architectures


def generation_config(folder: str) -> GenerationConfig | None:
    """What a model's folder says of sampling; None: nothing.

    Raises: UserError if it cannot be read.
    """
    path = Path(folder, GENERATION_FILE)
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever its content leads to
        raise UserError(f"{path} cannot be read ({reason(error)}); mend or remove it") from None
