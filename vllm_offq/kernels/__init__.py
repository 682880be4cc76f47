"""Arithmetic of OffQ. Knows tensors, not vLLM.

Every backend is a module with these names of `reference`: FEATURES, prepare_weight, linear,
experts, kv_store, paged_attention; where FEATURES says so rms_norm_linear,
fused_add_rms_norm_linear and silu_and_mul_linear. Callers take them from backend().
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from vllm_offq.errors import UserError

logger = logging.getLogger(__name__)

OVERRIDE = "VLLM_OFFQ_KERNELS"


Gpu = tuple[int, int] | None
"""Compute capability of the GPU; None: a machine without one."""


class Backend(NamedTuple):
    """A module of kernels."""

    module: str
    for_gpu: bool | None
    """Whether for machines with a GPU, or without; None: for any."""
    why_not: Callable[[Gpu], str | None]
    """What keeps this machine from running it; None: nothing."""
    speed: str
    """Said in the log where a faster backend cannot be used; benchmarks/results/backends.txt."""


def _why_not_triton(gpu: Gpu) -> str | None:
    interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if gpu is None and not interprets:
        return "need a GPU, or TRITON_INTERPRET=1 to try them without one"
    if not find_spec("triton"):
        return "need triton; install it"
    from vllm_offq.kernels.triton.target import why_not_usable

    return None if gpu is None or interprets else why_not_usable(gpu)


def _why_not_cpu(gpu: Gpu) -> str | None:
    from vllm_offq.kernels.cpu.library import why_not_usable

    return _why_not_beside_gpu(gpu) or why_not_usable()


def _why_not_numba(gpu: Gpu) -> str | None:
    # Not imported to find out: it compiles its kernels then.
    return _why_not_beside_gpu(gpu) or (None if find_spec("numba") else "need numba; install it")


def _why_not_beside_gpu(gpu: Gpu) -> str | None:
    return None if gpu is None else "are for machines without a GPU"


BACKENDS: dict[str, Backend] = {
    "triton": Backend("vllm_offq.kernels.triton", True, _why_not_triton, "the fastest"),
    "cpu": Backend("vllm_offq.kernels.cpu", False, _why_not_cpu, "the fastest"),
    "numba": Backend("vllm_offq.kernels.numba", False, _why_not_numba, "1.2 to 3.7 times slower"),
    "reference": Backend(
        "vllm_offq.kernels.reference",
        None,
        lambda gpu: None,
        "plain PyTorch, on a CPU 5 to 280 times slower",
    ),
}
"""By falling preference."""


@cache
def backend() -> ModuleType:
    """The kernels of this process, those of `backend_name`.

    Says once in the log which, and what keeps faster ones from being used.
    Raises: UserError if VLLM_OFFQ_KERNELS names none that this machine can run.
    """
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    name, fastest = backend_name(gpu), _suited(gpu)[0]
    if name == fastest or os.environ.get(OVERRIDE):
        logger.info("OffQ uses the %s kernels", name)
    else:
        logger.warning(
            "OffQ uses the %s kernels (%s): the %s kernels %s",
            name,
            BACKENDS[name].speed,
            fastest,
            BACKENDS[fastest].why_not(gpu),
        )
    return import_module(BACKENDS[name].module)


def backend_name(gpu: Gpu) -> str:
    """The first usable kernels of those for this machine, or those that VLLM_OFFQ_KERNELS names.

    They are not imported, which would compile some. gpu: asked of the caller, because PyTorch would
    take memory of the GPU to say.
    Raises: UserError if VLLM_OFFQ_KERNELS names none that this machine can run.
    """
    obstacles = {name: entry.why_not(gpu) for name, entry in BACKENDS.items()}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    override = os.environ.get(OVERRIDE)
    name = override or next(name for name in _suited(gpu) if name in usable)
    if name not in usable:
        reason = f": they {obstacles[name]}" if name in obstacles else ""
        raise UserError(
            f"{OVERRIDE}={name} is not available here{reason}; unset it or choose from "
            + ", ".join(usable)
        )
    return name


def _suited(gpu: Gpu) -> list[str]:
    return [name for name, entry in BACKENDS.items() if entry.for_gpu in (None, gpu is not None)]
