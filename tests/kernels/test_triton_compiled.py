"""The Triton kernels compiled for GPUs that are not there: nothing spills, loops do not grow."""

import json
import os
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
import triton
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import vllm_offq.kernels.triton
from benchmarks.cross_compile import MMA, TARGETS, Target, count
from benchmarks.gpu_kernels import INSTRUCTIONS
from benchmarks.gpu_variants import Variant, variants
from vllm_offq.kernels.triton.paged_attention import paged_attention_kernel

VERSION = "3.7.1"
"""Whose instructions are kept; another Triton compiles to others."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="Triton interprets here"),
    pytest.mark.skipif(triton.__version__ != VERSION, reason=f"Triton is not {VERSION}"),
]

TOLERANCE = 0.1

GOALS = {
    ("sm_80", "gemm tile of 128 x 128"): 500,
    ("sm_89", "gemm tile of 128 x 128"): 500,
    ("sm_120", "gemm tile of 128 x 128"): 500,
    ("sm_90", "gemm tile of 128 x 128"): 280,
    ("sm_80", "gemm tile of 128 x 128, wide"): 330,
    ("sm_90", "gemm tile of 128 x 128, wide"): 260,
    ("sm_80", "paged_attention, decode, heads of 128"): 1500,
}
"""At most so many instructions of a warp, of a step of 128 channels or of a tile of the context."""


def test_every_kernel_is_compiled() -> None:
    compiled = {variant.kernel for variant in variants(TARGETS["sm_80"])}
    for module in iter_modules(vllm_offq.kernels.triton.__path__, "vllm_offq.kernels.triton."):
        for name, value in vars(import_module(module.name)).items():
            assert not name.endswith("_kernel") or value in compiled


def test_a_part_of_a_batch_is_served_by_the_same_kernel() -> None:
    """It begins anywhere in the step's tensors; Triton compiles anew for another alignment."""
    kernel = paged_attention_kernel
    backend = make_backend(TARGETS["sm_80"].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    whole = {name: torch.zeros(8) if name.endswith("_ptr") else 16 for name in kernel.arg_names}
    starts = {"block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"}
    part = {name: x[1:] if name in starts else x for name, x in whole.items()}
    unaligned = whole | {"query_ptr": torch.zeros(8)[1:]}
    compiled_for = [bind(**arguments)[1] for arguments in (whole, part, unaligned)]
    assert compiled_for[0] == compiled_for[1] != compiled_for[2]


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        pytest.param(target, variant, id=f"{target.name}: {variant.name}")
        for target in TARGETS.values()
        for variant in variants(target)
    ],
)
def test_compiled(target: Target, variant: Variant) -> None:
    compiled = variant.compile(target)
    assert compiled.spills == compiled.stack == 0
    assert compiled.remarks == ()
    assert compiled.shared_memory <= target.shared_memory
    if "gemm" in variant.name:
        assert count(compiled.main_loop, target.int8_mma)
    if any(word in variant.name for word in ("Hadamard", "rotated", "attention")):
        assert count(compiled.instructions, MMA)
    loop = len(compiled.main_loop or compiled.instructions)
    assert loop <= GOALS.get((target.name, variant.name), loop)
    baseline = json.loads(INSTRUCTIONS.read_text())[target.name][variant.name]
    if loop < (1 - TOLERANCE) * baseline:
        pytest.fail(f"{loop} instructions instead of {baseline}: keep them, gpu_kernels --write")
    assert loop <= (1 + TOLERANCE) * baseline
