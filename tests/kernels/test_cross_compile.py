"""The cross compiler, on kernels so small that it is known what it must find."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="install triton to run this")

from triton_samples import (
    COPY_ADD_SIGNATURE,
    compile_assembly,
    compile_copy_add,
    compile_int8_dot,
    copy_add_kernel,
)

from benchmarks.cross_compile import (
    AMDGCN,
    GLOBAL_LOAD,
    MMA,
    SASS,
    TARGETS,
    CompileError,
    Target,
    count,
    cross_compile,
    find_main_loop,
    mnemonics,
    parse,
)
from vllm_offq.errors import UserError

PRODUCTS = {"IMMA": 32, "IGMMA": 4, "UTCIMMA": 2, r"v_mfma_i32_\w+": 8}
"""A tile of 128 x 64 x 64 in tiles of 16 x 8 x 32, in four warps; 64 x 64 x 32; 128 x 64 x 32;
32 x 32 x 16, in four warps.
"""
TILE_BYTES = (128 + 64) * 64
PATH = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
"""Of Python in a process of its own."""

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
def test_copying(target: Target) -> None:
    compiled = compile_copy_add(target)
    assert (compiled.kernel, compiled.target) == ("copy_add_kernel", target)
    assert (compiled.spills, compiled.stack, compiled.shared_memory) == (0, 0, 0)
    assert 4 <= compiled.registers <= 32
    # 512 elements, each with a mask of its own, for four warps.
    accesses = 512 // (4 * target.gpu.warp_size)
    assert count(compiled.main_loop, GLOBAL_LOAD) == accesses
    assert count(compiled.main_loop, r"STG|buffer_store_\w+") == accesses
    assert count(compiled.main_loop, MMA) == 0
    assert not compiled.instructions[-1].startswith("NOP")


@every_target
def test_int8_product(target: Target) -> None:
    compiled = compile_int8_dot(target)
    assert (compiled.spills, compiled.stack, compiled.remarks) == (0, 0, ())
    assert 64 < compiled.registers < 255
    assert TILE_BYTES <= compiled.shared_memory <= target.shared_memory
    assert compiled.tensor_memory == (64 if target.int8_mma == "UTCIMMA" else 0)
    assert count(compiled.main_loop, target.int8_mma) == PRODUCTS[target.int8_mma]
    assert count(compiled.main_loop, MMA) == PRODUCTS[target.int8_mma]
    # 16 bytes at a time, for four warps.
    loads = TILE_BYTES // 16 // (4 * target.gpu.warp_size)
    assert count(compiled.main_loop, GLOBAL_LOAD) == loads
    assert mnemonics(compiled.main_loop) < mnemonics(compiled.instructions)


@every_target
def test_too_few_registers(target: Target) -> None:
    is_amd = target.gpu.backend == "hip"
    options: dict[str, Any] = {"waves_per_eu": 8} if is_amd else {"maxnreg": 64}
    compiled = compile_int8_dot(target, **options)
    assert compiled.registers == 64
    assert compiled.spills >= 12
    assert compiled.stack >= 32
    if target.name == "sm_90":
        assert "wgmma.mma_async instructions are serialized" in compiled.remarks[0]


def test_too_much_shared_memory() -> None:
    """It compiles; only a launch would fail."""
    target = TARGETS["sm_89"]
    compiled = compile_int8_dot(target, num_stages=10)
    assert compiled.shared_memory == 9 * TILE_BYTES > target.shared_memory


def test_a_pointer_may_be_none() -> None:
    target = TARGETS["sm_80"]
    without, biased = (compile_int8_dot(target, bias=bias) for bias in (None, "*fp32"))
    assert count(biased.instructions, "LDG") > count(without.instructions, "LDG") == 0


def test_buffer_instructions() -> None:
    """AMD's reach 2 GiB."""
    near, far = (
        compile_copy_add(TARGETS["gfx942"], over_2_gib=names) for names in ((), ("x_ptr", "y_ptr"))
    )
    assert count(near.instructions, r"buffer_\w+") == count(far.instructions, r"global_\w+") == 4
    assert count(near.instructions, r"global_\w+") == count(far.instructions, r"buffer_\w+") == 0


OF_LLVM = """
import sys
from triton_samples import *
from benchmarks.cross_compile import TARGETS

for _ in range(2):  # not found in a cache, either
    compile_assembly(TARGETS[sys.argv[1]], "mov.b32 $0, $1;", "=x,x")
    print("compiled")
"""


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
def test_nothing_is_compiled_without_an_instruction_that_llvm_refuses(
    name: str, tmp_path: Path
) -> None:
    """LLVM only prints that, from Triton 3.8 on; before, it ends the process, without a word."""
    environment = os.environ | {"PYTHONPATH": PATH, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", OF_LLVM, name]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode and not ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "constraints", "said"),
    [
        ("sm_80", "=r,r", "error   : Not a name of any known instruction: 'nonsense'"),
        ("gfx942", "=v,v", "error: invalid instruction"),
    ],
)
def test_an_error_of_an_assembler(
    name: str, constraints: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CompileError, match=said):
        compile_assembly(TARGETS[name], "nonsense $0, $1;", constraints)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"divisible_by_16": ["sizes"]}, "kernel copy_add_kernel wants .*: see to sizes$"),
        ({"over_2_gib": ["block"]}, "kernel copy_add_kernel wants .*: see to block$"),
        ({"num_wraps": 8, "num_ctas": 2}, "^sm_80 has no option num_wraps; leave it out$"),
    ],
)
def test_unknown_names(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compile_copy_add(TARGETS["sm_80"], **arguments)


@pytest.mark.parametrize(
    ("signature", "constants", "wrong"),
    [
        ({}, {"block": 128}, "addend, size, x_ptr, y_ptr"),
        (COPY_ADD_SIGNATURE, {"block": 128, "size": 1}, "size"),
        (COPY_ADD_SIGNATURE, {"block": 128, "BLOCK": 128}, "BLOCK"),
    ],
)
def test_arguments_that_do_not_fit(
    signature: dict[str, str], constants: dict[str, int], wrong: str
) -> None:
    with pytest.raises(UserError, match=f"see to {wrong}$"):
        cross_compile(copy_add_kernel, signature, constants, TARGETS["sm_80"])


IN_THE_INTERPRETER = """
import os
from triton_samples import *
from benchmarks.cross_compile import TARGETS

for value in ("1", "0"):  # for what Triton has decorated meanwhile, 0 comes too late
    os.environ["TRITON_INTERPRET"] = value
    try:
        compile_copy_add(TARGETS["sm_80"])
    except ValueError as error:
        print(error)
"""


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": PATH}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    refusal = "Triton compiles only in a process without TRITON_INTERPRET; unset it\n"
    assert printed.stdout == 2 * refusal


LOOPS = {
    "a loop in another that has more products": """
        L1:
            IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4
            IMMA.16832.S8.S8 R4, R9.ROW, R12.COL, R4
        L2:
          * @!P1 IMMA.16832.S8.S8 R4, R10.ROW, R12.COL, R4
          * @P1 BRA `(.L2)
            @P0 BRA `(.L1)
    """,
    "of several loops the one with most products of integers": """
        L1:
            HMMA.1688.F32.TF32 R4, R8, R12, R4
            HMMA.1688.F32.TF32 R4, R8, R13, R4
            HMMA.1688.F32.TF32 R4, R8, R14, R4
            @P0 BRA `(.L1)
        L2:
          * IMMA.16832.S8.S8 R4, R10.ROW, R12.COL, R4
          * IMMA.16832.S8.S8 R4, R11.ROW, R12.COL, R4
          * @P1 BRA `(.L2)
        L3:
            IMMA.16832.S8.S8 R4, R10.ROW, R12.COL, R4
            @P1 BRA `(.L3)
    """,
    "a wait that stands behind the end": """
            UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR17], tmem[UR10], idesc[UR11], !UPT
        L1:
          * BRA.U UP0, `(.L2)
          * UTCIMMA gdesc[UR8], gdesc[UR10], tmem[UR17], tmem[UR14], idesc[UR15], UPT
        L2:
          * SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR20], R22
          * @!P4 BRA `(.L4)
        L3:
          * @!P3 BRA `(.L1)
            UTCIMMA gdesc[UR8], gdesc[UR10], tmem[UR17], tmem[UR14], idesc[UR15], UPT
            EXIT
        L4:
          * SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR20], R22
          * @!P4 BRA `(.L4)
          * BRA `(.L3)
    """,
    "a last block that stands before the first": """
            BRA `(.L2)
        L1:
          * IADD3 R8, R8, 0x40, RZ
        L2:
          * IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4
          * @P0 BRA `(.L1)
    """,
    "a call that is a branch": """
        L1:
          * IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4
          * @!P0 CALL.REL.NOINC `(.L2)
            EXIT
        L2:
          * @P1 BRA `(.L1)
    """,
    "loads where a register is set by HFMA2.MMA": """
        L1:
            HFMA2.MMA R8, -RZ, RZ, 0, 0
            LDGDEPBAR
            @P0 BRA `(.L1)
        L2:
          * @!P0 LDG.E R12, desc[UR4][R10.64+0x4]
          * @P1 BRA `(.L2)
    """,
    "nothing of that": """
        L1:
            STG.E desc[UR4][R6.64], R21
            @P0 BRA `(.L1)
    """,
}


@pytest.mark.parametrize("sketch", LOOPS.values(), ids=LOOPS)
def test_main_loop(sketch: str) -> None:
    """Its instructions are marked with a star."""
    lines = [line.strip() for line in sketch.strip().splitlines()]
    listing = [
        f".{line}" if line.endswith(":") else f"        /*{i:04x}*/  {line.removeprefix('* ')} ;"
        for i, line in enumerate(lines)
    ]
    expected = tuple(line.removeprefix("* ") for line in lines if line.startswith("*"))
    assert find_main_loop(*parse("\n".join(listing), SASS)) == expected


AMD_LISTING = """
kernel:                                 ; @kernel
	.loc	1 3 0 prologue_end              ; k.py:3:0
	s_cmp_ge_i32 s14, s6                    ; a comment
	s_cbranch_scc1 .LBB0_19
.LBB0_3:                                ; %.lr.ph
                                        ; =>This Inner Loop Header: Depth=1
	v_mfma_i32_32x32x16_i8 v[16:31], v[72:73], v[48:49], v[16:31]
	s_cbranch_scc0 .LBB0_3
	s_branch .LBB0_19
.LBB0_19:
	s_endpgm
"""


def test_listing_of_amd() -> None:
    instructions, labels = parse(AMD_LISTING, AMDGCN)
    assert instructions[0] == "s_cmp_ge_i32 s14, s6"
    assert labels == {"kernel": 0, ".LBB0_3": 2, ".LBB0_19": 5}
    assert find_main_loop(instructions, labels) == instructions[2:4]
    assert mnemonics(instructions[2:4]) == {"v_mfma_i32_32x32x16_i8": 1, "s_cbranch_scc0": 1}
