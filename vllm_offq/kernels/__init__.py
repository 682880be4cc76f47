"""Arithmetic of OffQ. Knows tensors, not vLLM.

Every backend is a module with the functions of `reference`: prepare_weight, linear,
rotate_heads, kv_store, paged_attention. Callers take them from backend().
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from vllm_offq.errors import UserError

logger = logging.getLogger(__name__)

OVERRIDE = "VLLM_OFFQ_KERNELS"


class Backend(NamedTuple):
    """A module of kernels, and whether this machine can run it."""

    module: str
    is_usable: Callable[[], bool]


def _cpu_is_usable() -> bool:
    from vllm_offq.kernels.cpu.library import is_usable

    return not torch.cuda.is_available() and is_usable()


BACKENDS: dict[str, Backend] = {
    "cpu": Backend("vllm_offq.kernels.cpu", _cpu_is_usable),
    "reference": Backend("vllm_offq.kernels.reference", lambda: True),
}
"""By falling preference."""


@cache
def backend() -> ModuleType:
    """The kernels of this process: the first usable ones, or those that VLLM_OFFQ_KERNELS names.

    Raises: UserError if it names none that this machine can run.
    """
    available = [name for name, entry in BACKENDS.items() if entry.is_usable()]
    name = os.environ.get(OVERRIDE) or available[0]
    if name not in available:
        raise UserError(
            f"{OVERRIDE}={name} is not available here; unset it or choose from "
            + ", ".join(available)
        )
    logger.info("OffQ uses the %s kernels", name)
    return import_module(BACKENDS[name].module)
