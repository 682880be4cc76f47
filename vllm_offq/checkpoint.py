"""An OffQ checkpoint on disk: read it lazily, validate it; docs/format.md describes the files.

Nothing here unpickles; config.json, the index and the shards are untrusted input.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import CONFIG_FILE, INDEX_FILE, CheckpointConfig, parse_config
from vllm_offq.manifest import FLOATING, TensorSpec, check_values, expected_tensors
from vllm_offq.wrappers import REST, find_wrapper

__all__ = ["Checkpoint", "CheckpointWriter", "validate_checkpoint"]

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Checkpoint:
    """An OffQ checkpoint, of which only config, index and shard headers are read until load().

    config: the quantization_config. model_config: all of config.json. names: of all tensors.
    Raises: UserError, one sentence, when the folder, a JSON file or a shard cannot be read, or
    index and shards disagree. What the tensors should be is validate_checkpoint's question.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; give the folder `offq quantize` wrote")
        self.model_config = _read_json(self.path / CONFIG_FILE)
        if "quantization_config" not in self.model_config:
            raise UserError(
                f"{self.path / CONFIG_FILE} has no quantization_config: this is an unquantized "
                "model; quantize it with `offq quantize`"
            )
        self.config: CheckpointConfig = parse_config(self.model_config["quantization_config"])
        self._weight_map = _read_weight_map(self.path / INDEX_FILE)
        self._shards = {
            filename: _open_shard(self.path / filename)
            for filename in sorted(set(self._weight_map.values()))
        }
        for filename, shard in self._shards.items():
            held = set(shard.keys())
            listed = {name for name, file in self._weight_map.items() if file == filename}
            for name in sorted(held ^ listed):
                raise UserError(
                    f"{self.path}: tensor {name} "
                    + (
                        f"is in {filename}, but {INDEX_FILE} does not list it there"
                        if name in held
                        else f"should be in {filename} by {INDEX_FILE}, but is missing there"
                    )
                    + "; quantize or download the model again"
                )

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the order of the index."""
        return list(self._weight_map)

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape by the shard's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype by the shard's header."""
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise UserError(f"{self.path}: tensor {name} has dtype {code}, unknown to OffQ")
        return _DTYPES[code]

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._shards[self._weight_map[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._shards[self._weight_map[name]].get_slice(name)


def validate_checkpoint(path: Path) -> None:
    """Check a checkpoint in full: files, names, shapes, dtypes, and the values that must be sane.

    Raises: UserError, one sentence that names the file or tensor, what was found and expected.
    """
    checkpoint = Checkpoint(path)
    expected = expected_tensors(checkpoint.model_config, checkpoint.config)
    expected |= _rest(checkpoint)
    again = f"; quantize or download {path} again"
    found = set(checkpoint.names)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in checkpoint.names if name not in expected]
    if missing:
        renamed = f" (there is an unexpected {unexpected[0]})" if unexpected else ""
        raise UserError(f"{path}: tensor {missing[0]} is missing{renamed}{again}")
    if unexpected:
        raise UserError(f"{path}: tensor {unexpected[0]} does not belong there{again}")
    for name, spec in expected.items():
        if checkpoint.shape(name) != spec.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(checkpoint.shape(name))} instead of "
                f"{list(spec.shape)}{again}"
            )
        if checkpoint.dtype(name) not in spec.dtypes:
            raise UserError(
                f"{path}: tensor {name} has dtype {checkpoint.dtype(name)} instead of "
                f"{' or '.join(map(str, spec.dtypes))}{again}"
            )
    for name in expected:
        problem = check_values(name, checkpoint.load(name))
        if problem:
            raise UserError(f"{path}: tensor {name} {problem}{again}")


def _rest(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """What surrounds the language model: of any shape. Raises: UserError where there is none."""
    wrapper = find_wrapper(checkpoint.model_config)
    if wrapper is None:
        return {}
    rest = list(filter(wrapper.surrounds, checkpoint.names))
    for path in (*REST, *wrapper.needed):
        if not any(name == path or name.startswith(f"{path}.") for name in rest):
            raise UserError(
                f"{checkpoint.path}: tensors of {path} are missing; quantize or download it again"
            )
    return {name: TensorSpec(checkpoint.shape(name), FLOATING) for name in rest}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}; give the folder `offq quantize` wrote"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); quantize the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; quantize or download the model again")
    for name, filename in weight_map.items():
        # Untrusted: it must not lead out of the folder.
        if not isinstance(filename, str) or not filename.endswith(".safetensors"):
            raise UserError(f"{path}: file {filename!r} of tensor {name} is no safetensors file")
        if Path(filename).name != filename or "\\" in filename or "\0" in filename:
            raise UserError(
                f"{path}: file {filename!r} of tensor {name} is not a plain file name in this "
                "folder; do not use this checkpoint"
            )
    return weight_map


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}, which {INDEX_FILE} names; download the rest of "
            "the model or quantize it again"
        )
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}); quantize or download the model again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
