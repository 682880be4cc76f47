"""Where the original's tensors come from: shards on disk, read one by one, or a loaded model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_offq.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """Tensors by their names in the Hugging Face model."""

    def __contains__(self, name: object) -> bool: ...

    def load(self, name: str) -> Tensor:
        """A copy of one tensor in its own dtype, the caller's to change.

        Raises: UserError if it is missing or unreadable.
        """
        ...

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        ...

    def num_bytes(self, name: str) -> int:
        """Of one tensor, without reading it."""
        ...

    def fingerprint(self) -> str:
        """Changes when the weights do, without reading all of them."""
        ...


class LoadedWeights:
    """Of a model that is in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def load(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise _missing(name, "the model")
        return self._tensors[name].clone()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def num_bytes(self, name: str) -> int:
        """Of one tensor."""
        return self._tensors[name].nbytes

    def fingerprint(self) -> str:
        """Sum of all tensors: they are in memory anyway."""
        return repr(sum(float(tensor.double().sum()) for tensor in self._tensors.values()))


class ShardedWeights:
    """Of a folder with safetensors: headers are read at once, a tensor when it is asked for.

    rename: from a tensor's name on disk to the one that it is asked for by.
    Raises: UserError if there are no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, str]] = {}
        """File and name in it."""
        for path in _shards(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._places |= {rename(name): (path, name) for name in file.keys()}  # noqa: SIM118 - not a dict
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} cannot be loaded, it may be incomplete ({error}); download it again"
                ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def load(self, name: str) -> Tensor:
        return self._get(name).clone()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def num_bytes(self, name: str) -> int:
        """Of one tensor: it is mapped, not read."""
        return self._get(name).nbytes

    def _get(self, name: str) -> Tensor:
        if name not in self._places:
            raise _missing(name, str(self.folder))
        path, stored = self._places[name]
        # A file that stays open stays mapped, and all that was ever read of it resident.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)

    def fingerprint(self) -> str:
        """Names, sizes and times of the shards."""
        status = [(path.name, path.stat()) for path in _shards(self.folder)]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in status])


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [folder / SINGLE_FILE]
        raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX}; give a whole model")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is no readable index of shards; download it again") from None
    for name in sorted(map(str, names)):
        # Untrusted: it must not lead out of the folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index} names {name}, which is not in the folder; download it again")
    return [folder / name for name in sorted(names)]


def _missing(name: str, where: str) -> UserError:
    return UserError(f"tensor {name} is missing in {where}; it may be incomplete")


def checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in float32. Raises: UserError if it has another shape or is not finite."""
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name} has shape {list(tensor.shape)} where the model's configuration says "
            f"{list(shape)}"
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise UserError(f"tensor {name} has NaN or infinite values; the model is damaged")
    return tensor
