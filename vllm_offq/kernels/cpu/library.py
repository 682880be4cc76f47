"""The compiled kernels: the shared library, and its argument structures as in src/kernels.h."""

import ctypes
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from vllm_offq.errors import UserError

LIBRARY = Path(__file__).with_name("libvllm_offq_cpu.so")
SOURCES = Path(__file__).with_name("src")
"""In a checkout; an installed wheel has none."""
ISA_OVERRIDE = "VLLM_OFFQ_CPU_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class InputGrid(ctypes.Structure):
    _fields_ = (
        ("group_size", c_int32),
        ("symmetric", c_int32),
        ("bits", c_int32),
        ("range_to_scale", c_float),
        ("hadamard_block", c_int32),
        ("hadamard_core", c_int32),
        ("hadamard_norm", c_float),
        ("hadamard_matrix", c_void_p),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        ("bias", c_void_p),
        ("tokens", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("x_stride", c_int64),
        ("weight_codes", c_void_p),
        ("weight_sums", c_void_p),
        ("weight_scale", c_void_p),
        ("segment_size", c_int32),
        ("scale_per_group", c_int32),
        ("dtype", c_int32),
        ("grid", InputGrid),
    )


class PageLayout(ctypes.Structure):
    _fields_ = (
        ("num_kv_heads", c_int64),
        ("head_size", c_int64),
        ("block_size", c_int64),
        ("group_size", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
    )


class KVStore(ctypes.Structure):
    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("tokens", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("dtype", c_int32),
        ("key_rotation", c_void_p),
        ("slot_mapping", c_void_p),
        ("kv_cache", c_void_p),
        ("page", PageLayout),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("query", c_void_p),
        ("output", c_void_p),
        ("query_stride", c_int64),
        ("output_stride", c_int64),
        ("num_heads", c_int64),
        ("dtype", c_int32),
        ("scale", c_float),
        ("query_rotation", c_void_p),
        ("requests", c_int64),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("sliding_window", c_int64),
        ("soft_cap", c_float),
        ("kv_cache", c_void_p),
        ("page", PageLayout),
    )


def why_not_usable() -> str | None:
    """What keeps these kernels from running here, as the rest of a sentence; None: nothing."""
    if not LIBRARY.exists():
        return (
            "were not built when vllm-offq was installed; install GCC 11 or newer, then vllm-offq "
            "again"
        )
    try:
        if is_outdated():
            return "were built from other sources than these; install vllm-offq again"
        usable = usable_isas()
    except OSError as error:
        return f"cannot be loaded ({error})"
    return None if usable else "need a processor with AVX2, or with NEON dot products"


@cache
def load() -> ctypes.CDLL:
    # torch comes first: its OpenMP runtime is then the one that the library's calls resolve to.
    library = ctypes.CDLL(str(LIBRARY))
    library.offq_isa_name.restype = ctypes.c_char_p
    for function in ("offq_linear", "offq_kv_store", "offq_paged_attention"):
        getattr(library, function).argtypes = (ctypes.c_int, c_void_p)
        getattr(library, function).restype = ctypes.c_int
    return library


@cache
def is_outdated() -> bool:
    """Whether the library was built before its sources changed: its structures may be others."""
    if not SOURCES.exists():
        return False
    text = b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))
    try:
        built_from = load().offq_sources
    except AttributeError:  # before it said so
        return True
    built_from.restype = ctypes.c_char_p
    return built_from().decode() != sha256(text).hexdigest()


@cache
def usable_isas() -> dict[str, int]:
    """Instruction sets of this processor that the library has kernels for, best first."""
    library = load()
    return {
        library.offq_isa_name(isa).decode(): isa
        for isa in range(library.offq_isa_count())
        if library.offq_isa_usable(isa)
    }


@cache
def isa() -> int:
    """The instruction set to use: the best, or the one that VLLM_OFFQ_CPU_ISA names.

    Raises: UserError if it names none that this processor has.
    """
    usable = usable_isas()
    name = os.environ.get(ISA_OVERRIDE) or next(iter(usable))
    if name not in usable:
        raise UserError(
            f"{ISA_OVERRIDE}={name} is not available here; unset it or choose from "
            + ", ".join(usable)
        )
    return usable[name]
