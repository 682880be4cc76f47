"""What computes: one device for a block at a time, all of them for a whole model."""

import torch
from accelerate import dispatch_model
from torch import nn

from calibration.architectures import Architecture
from vllm_offq.errors import UserError

CPU = torch.device("cpu")
ALL = "auto"
"""Name of all GPUs together."""


def usable_devices(name: str) -> tuple[torch.device, ...]:
    """What --device names; the first computes wherever one is enough.

    Raises: UserError if it is no device, or not here.
    """
    count = torch.cuda.device_count()
    if name == ALL and count:
        return tuple(torch.device("cuda", index) for index in range(count))
    try:
        device = torch.device("cuda" if name == ALL else name)
    except RuntimeError:
        device = None
    if device is None or (device != CPU and device.type != "cuda"):
        raise UserError(
            f"--device {name} is not supported; choose cpu, cuda, cuda:N or {ALL} (all GPUs)"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} sees {count} GPUs here; install one of "
            "its builds for GPUs, or leave --device out"
        )
    return (device,)


def places(
    model: nn.Module, architecture: Architecture, devices: tuple[torch.device, ...]
) -> dict[str, torch.device]:
    """Of every part of a model, by its path: blocks in equal runs, what is after them at the end.

    Equal runs suit blocks that are all of one size; what is before them is with the first.
    """
    decoder = architecture.layers.rpartition(".")[0]
    found = {
        f"{decoder}.{name}": devices[0]
        for name, _ in model.get_submodule(decoder).named_children()
        if f"{decoder}.{name}" != architecture.layers
    }
    blocks = [name for name, _ in model.get_submodule(architecture.layers).named_children()]
    found |= {
        f"{architecture.layers}.{name}": devices[number * len(devices) // len(blocks)]
        for number, name in enumerate(blocks)
    }
    # A head that is the embedding is one tensor with it.
    last = devices[0 if architecture.layout.head_is_embedding else -1]
    return found | {architecture.final_norm: last, architecture.head: last}


def device_of(parameter: str, places: dict[str, torch.device]) -> torch.device:
    """Where a parameter's part is, by its name."""
    return next(device for place, device in places.items() if parameter.startswith(f"{place}."))


def dispatch(model: nn.Module, places: dict[str, torch.device]) -> None:
    """Move a model's parts to their places, where each computes on what the one before gives."""
    devices = list(places.values())
    if len(set(devices)) == 1:
        model.to(devices[0])
    else:
        dispatch_model(model, places, main_device=devices[0])
