"""The model of the GEMM on a hand-made loop."""

import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="install triton to run this")

import typer
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu_model
from benchmarks.cross_compile import TARGETS
from benchmarks.gpu_model import (
    LAYERS,
    PARTS,
    TOKENS,
    Layer,
    Loop,
    Part,
    macs,
    offq,
    pipe_cycles,
    rank,
    roofline,
    shared_bytes,
    step_cycles,
)
from benchmarks.gpu_variants import variants
from vllm_offq.errors import UserError
from vllm_offq.kernels.triton.gemm import gemm_kernel

PART = Part("hand-made", "sm_89", 1, 1.0, 64.0, 2.048, 1.024, 128, 64, "this test")
"""One SM: 64 bytes from memory, 1024 multiply-adds in int8 and 512 in bf16 a cycle of 1 ns."""
LOOP = (
    *["IMMA.16832.S8.S8.SAT R4, R8.ROW, R10.COL, R4"] * 2,
    *["LOP3.LUT R1, R2, 0x80808080, R3, 0x6a, !PT"] * 8,
    *["I2FP.F32.S32 R4, R4"] * 2,
    *["FFMA R5, R4, R6, R5"] * 4,
    *["IMAD.SHL.U32 R2, R2, 0x10, RZ"] * 6,
    "@P0 LDGSTS.E.BYPASS.128 [R9], [R12.64], !P1",
    "LDS.64 R14, [R9]",
    "LDSM.16.M88.4 R16, [R9+0x100]",
    "@!PT LDS RZ, [RZ]",
    "@P1 BRA `(.L_x_1)",
)
TILE = Loop(16, 64, 32, wide=False, warps=4, instructions=LOOP)
CYCLES = {"issue": 27, "ALU": 20, "FMA": 12, "convert": 4, "tensor": 32, "shared": 40}
"""Of four warps: 27 instructions in 4 schedulers; 10 for 64 lanes; 6 integer ones for 64 lanes,
with the others 10 for 128; 2 conversions for 64; 2 x 4096 multiply-adds; 512 + 256 + 512 bytes."""


def test_cycles_of_the_pipes() -> None:
    assert pipe_cycles(LOOP, 4, PART) == pytest.approx(CYCLES)
    assert step_cycles(TILE, PART) == pytest.approx(CYCLES)
    # A pass that does twice the work is two steps.
    twice = TILE._replace(instructions=2 * LOOP)
    assert step_cycles(twice, PART) == pytest.approx(CYCLES)


def test_slow_conversions() -> None:
    slow = pipe_cycles(["I2F.S32 R4, R4"], 4, PART._replace(convert_lanes=16))
    assert (slow["convert"], slow["ALU"]) == (8, 0)


def test_products_of_a_group_of_warps() -> None:
    from_registers = "IGMMA.64x128x32.S8.S8 R24, R88, gdesc[UR8], RZ, !UPT"
    from_memory = "IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24, gsb0"
    assert macs(from_registers) == macs(from_memory) == 64 * 128 * 32 / 4
    assert shared_bytes(from_registers) == 128 * 32 / 4
    assert shared_bytes(from_memory) == (128 + 64) * 32 / 4


@pytest.mark.parametrize(
    ("change", "bound", "nanoseconds"),
    [
        ({}, "shared", 4 * 40),
        ({"gigabytes": 16.0}, "memory", 7552 / 16),  # codes, scales, sums, activations, outputs
        ({"int8_tera": 1.024}, "tensor", 4 * 64),
        ({"float_lanes": 16}, "FMA", 4 * 80),
        ({"convert_lanes": 4}, "convert", 4 * 64),
    ],
)
def test_bound(change: dict[str, float], bound: str, nanoseconds: float) -> None:
    """64 outputs of 128 channels for 16 tokens: four steps of one tile."""
    part = PART._replace(**change)
    estimate = offq(TILE, part, Layer(64, 128), tokens=16)
    quantize = (16 * 128 * 2 + 16 * 128 / 2 + 16 * 8) / part.gigabytes
    assert estimate.bound == bound
    assert estimate.seconds * 1e9 == pytest.approx(nanoseconds + quantize)


@pytest.mark.parametrize(("sms", "steps"), [(1, 12), (2, 8), (3, 4)])
def test_the_busiest_sm(sms: int, steps: int) -> None:
    """Three tiles of four steps."""
    part = PART._replace(sms=sms, int8_tera=2.048 * sms, gigabytes=1e9)
    estimate = offq(TILE, part, Layer(3 * 64, 128), tokens=16)
    assert estimate.seconds * 1e9 == pytest.approx(40 * steps, rel=1e-4)


def test_rooflines() -> None:
    layer = Layer(1024, 1024)
    decode = roofline(PART._replace(gigabytes=16), layer, 1, 4)
    assert decode.bound == "memory"
    assert decode.seconds * 1e9 == pytest.approx((1024 * 1024 * (0.5 + 2 / 128) + 4096) / 16)
    prefill = roofline(PART, layer, 64, 16)
    assert prefill.bound == "tensor"
    assert prefill.seconds * 1e9 == pytest.approx(64 * 1024 * 1024 / 512)
    # 7 instructions for eight weights, in 64 lanes.
    unpacking = roofline(PART, layer, 1, 4)
    assert unpacking.bound == "unpack"
    assert unpacking.seconds * 1e9 == pytest.approx(1024 * 1024 * 7 / 8 / 64)


@given(
    st.sampled_from(sorted(PARTS)),
    st.sampled_from(sorted(LAYERS)),
    st.sampled_from(TOKENS),
    st.sampled_from(("gigabytes", "int8_tera", "bf16_tera", "float_lanes", "convert_lanes")),
    st.floats(1, 10),
)
def test_more_is_never_slower(name: str, layer: str, tokens: int, what: str, factor: float) -> None:
    part = PARTS[name]
    better = part._replace(**{what: getattr(part, what) * factor})
    loops = [TILE, TILE._replace(wide=True), TILE._replace(instructions=LOOP[:-1])]
    before, after = (rank(loops, each, LAYERS[layer], tokens) for each in (part, better))
    seconds = [estimate.seconds for estimate in before]
    assert seconds == sorted(seconds)
    assert all(
        offq(x, better, LAYERS[layer], tokens).seconds
        <= offq(x, part, LAYERS[layer], tokens).seconds * (1 + 1e-9)
        for x in loops
    )
    assert after[0].seconds <= before[0].seconds * (1 + 1e-9)
    for bits in (4, 16):
        slower, faster = (roofline(each, LAYERS[layer], tokens, bits) for each in (part, better))
        assert faster.seconds <= slower.seconds * (1 + 1e-9)


def test_nothing_to_model() -> None:
    with pytest.raises(UserError, match="16x64 packed has no int8 products"):
        step_cycles(TILE._replace(instructions=LOOP[2:]), PART)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_loop() -> None:
    """A pass of it is whole steps, and all its products are known."""
    target = TARGETS["sm_90"]
    variant = next(x for x in variants(target) if x.kernel is gemm_kernel)
    compiled = variant.compile(target)
    done = variant.options["num_warps"] * sum(map(macs, compiled.main_loop))
    size = math.prod(variant.constants[f"BLOCK_{axis}"] for axis in "MNK")
    assert done
    assert done % size == 0


def test_unknown_part() -> None:
    with pytest.raises(typer.BadParameter, match="TPU: choose from A100, RTX_4090, H100, RTX_5090"):
        gpu_model.main(["TPU"])


def test_without_a_gpu() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "Nothing to measure: the Triton kernels need a GPU; torch sees none."
    )
    assert "Traceback" not in result.stderr
