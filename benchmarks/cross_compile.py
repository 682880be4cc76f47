"""What Triton's compiler makes of a kernel for GPUs that are not there: no driver, nothing runs.

    compiled = cross_compile(kernel, {"x_ptr": "*i8", "N": "i32"}, {"TILE": 64}, TARGETS["sm_90"])
    assert not compiled.spills and count(compiled.main_loop, "IGMMA")

Registers, spills, shared memory and the instructions of the main loop, from ptxas and LLVM as they
come with Triton. No figure here is a time. An instruction is a line of disassembly: predicate,
opcode, operands.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from vllm_offq.errors import UserError
from vllm_offq.kernels.triton.target import MULTIPLIES_IN_TENSOR_MEMORY

SASS = re.compile(r"^(?P<label>[.$\w]+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<code>.*?)\s*;", re.M)
AMDGCN = re.compile(r"^(?P<label>[.$\w]+):|^\t(?P<code>[a-z].*?)\s*(?:;|$)", re.M)
"""The lines of a listing that matter, as nvdisasm and LLVM write them."""

MNEMONIC = re.compile(r"(?:@\S+\s+)?(\w+).*")
"""After the predicate, up to the modifiers."""
BRANCH = re.compile(r"(?:@\S+\s+)?(?:BR[AX]|JM[PX]|CALL)|s_c?branch")
"""To the labels in its line. ptxas also calls what is no function, to leave a loop."""
NEVER_FALLS_THROUGH = re.compile(r"BRA[.\w]*\s+`|BRX|JM[PX]|EXIT|RET|s_branch|s_endpgm|s_setpc")
"""Without a predicate; BRA also without the condition that may stand before its label."""

# Of mnemonics: HFMA2.MMA, which sets a register to a constant, multiplies no matrices.
INTEGER_MMA = r"(?:UTC)?IG?MMA|v_mfma_i32_\w+"
MMA = r"\w*MMA|v_mfma_\w+|v_smfmac_\w+"
GLOBAL_LOAD = r"LD|LDG|LDGSTS|UTMALDG|UBLKCP|(?:global|buffer|flat)_load_\w+"
SM_100 = "UTCIMMA" if MULTIPLIES_IN_TENSOR_MEMORY else "IMMA"
SPILL = r"LDL|STL|scratch_(?:load|store)_\w+"


@dataclass(frozen=True)
class Target:
    """A GPU architecture."""

    name: str
    gpu: GPUTarget
    shared_memory: int
    """Bytes a block can have: Triton refuses to launch what takes more."""
    int8_mma: str
    """Pattern of what multiplies int8 tiles; those too small for sm_90 and sm_100 take IMMA."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, "IMMA"),
        Target("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024, "IMMA"),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, "IGMMA"),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, SM_100),
        Target("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024, "IMMA"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_i32_\w+"),
    )
}


class CompileError(RuntimeError):
    """A kernel does not compile; str() holds what the compiler says."""


@dataclass(frozen=True)
class Compilation:
    """What came out."""

    kernel: str
    target: Target
    registers: int
    """32-bit registers of a thread; on AMD those for vectors, accumulators included."""
    spills: int
    """Instructions that access local memory or scratch."""
    stack: int
    """Bytes of local memory or scratch of a thread."""
    shared_memory: int
    """Bytes of a block."""
    tensor_memory: int
    """Columns of a block, of the 512 there are on sm_100; 0 elsewhere."""
    remarks: tuple[str, ...]
    """What ptxas warns of, such as wgmma instructions that each wait for the one before."""
    instructions: tuple[str, ...] = field(repr=False)
    main_loop: tuple[str, ...] = field(repr=False)
    """Those of `find_main_loop`, in the order of their addresses."""
    listings: Mapping[str, str] = field(repr=False)
    """Text of every stage: ttir, ttgir, llir, then ptx and sass, or amdgcn."""


def cross_compile(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: Target,
    divisible_by_16: Collection[str] = (),
    over_2_gib: Collection[str] = (),
    **options: Any,
) -> Compilation:
    """Compiles as at a launch where all pointers are aligned to 16 bytes, if the kernel asks.

    signature: argument to "*bf16", "*u8", "i32", "fp32" or alike; constants: all other arguments,
    among them pointers that are None and integers that are 1; divisible_by_16: integers that are
    so; over_2_gib: pointers to tensors larger than that, which AMD's buffer instructions do not
    reach; options: Triton's for the target, such as num_warps and num_stages.
    Raises: UserError for names that do not fit the kernel or the target; CompileError.
    """
    # Triton's own functions, too, are made for the interpreter or for the compiler at its import.
    if knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise UserError("Triton compiles only in a process without TRITON_INTERPRET; unset it")
    backend = make_backend(target.gpu)
    _check_names(kernel, signature, constants, {*divisible_by_16, *over_2_gib})
    if unknown := sorted(options.keys() - vars(backend.parse_options({}))):
        raise UserError(f"{target.name} has no option {', '.join(unknown)}; leave it out")
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        # As Triton writes it: D, divisible by 16; S, within 2 GiB, of which NVIDIA makes nothing.
        if signature.get(name, "").startswith("*"):
            aligned = "" if kernel.params[i].do_not_specialize_on_alignment else "D"
            attributes[(i,)] = backend.parse_attr(aligned + ("" if name in over_2_gib else "S"))
        elif name in divisible_by_16:
            attributes[(i,)] = backend.parse_attr("D")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return _compile(ASTSource(kernel, types, dict(constants), attributes), target, options)


def _check_names(kernel: JITFunction, signature: Mapping, constants: Mapping, hints: set) -> None:
    """hints: arguments of the signature that more is said of. Raises: UserError."""
    given = signature.keys() | constants.keys()
    misplaced = signature.keys() & constants.keys() | hints - signature.keys()
    if wrong := given.symmetric_difference(kernel.arg_names) | misplaced:
        raise UserError(
            f"kernel {kernel.__name__} wants its arguments, and no others, each in the signature "
            f"or the constants: see to {', '.join(sorted(wrong))}"
        )


def _compile(source: ASTSource, target: Target, options: Mapping[str, Any]) -> Compilation:
    log, errors = io.StringIO(), io.StringIO()
    failed = f"kernel {source.name} does not compile for {target.name}"
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(tempfile, "tempdir", folder),  # Triton leaves files where ptxas fails
            knobs.cache.scope(),
            knobs.nvidia.scope(),
            redirect_stdout(log),
            _stderr_copied_to(errors),
        ):
            knobs.cache.dir = folder  # a kernel found in a cache comes without its errors
            knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=target.gpu, options=dict(options))
    except Exception as error:
        raise CompileError(f"{failed}: {error}\n{errors.getvalue()}".strip()) from error
    # LLVM may print an error, leave the instruction out and go on.
    if "error:" in errors.getvalue():
        raise CompileError(f"{failed}: {errors.getvalue().strip()}")
    return _describe(compiled, log.getvalue(), target)


@contextmanager
def _stderr_copied_to(copy: io.StringIO) -> Iterator[None]:
    """What also C++ writes to file descriptor 2; it arrives there as well, at the end."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            copy.write(file.read().decode(errors="replace"))
            os.write(2, copy.getvalue().encode())


def _describe(compiled: Any, log: str, target: Target) -> Compilation:
    """compiled: Triton's kernel; log: of ptxas."""
    listings = {stage: text for stage, text in compiled.asm.items() if isinstance(text, str)}
    if target.gpu.backend == "cuda":
        listings["sass"] = _disassemble(compiled.asm["cubin"])
        (instructions, labels), resources = parse(listings["sass"], SASS), log
        registers, stack = r"Used (\d+) registers", r"(\d+) bytes stack frame"
    else:
        resources = listings["amdgcn"]
        instructions, labels = parse(resources, AMDGCN)
        registers, stack = r"\.vgpr_count: +(\d+)", r"\.private_segment_fixed_size: +(\d+)"
    return Compilation(
        kernel=compiled.metadata.name,
        target=target,
        registers=max(map(int, re.findall(registers, resources))),
        spills=count(instructions, SPILL),
        stack=max(map(int, re.findall(stack, resources))),
        shared_memory=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        remarks=tuple(re.findall(r"^ptxas.*?(?:warning *: *|: (?=\(C))(.*)", log, re.M)),
        instructions=instructions,
        main_loop=find_main_loop(instructions, labels),
        listings=listings,
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(listing: str, line: re.Pattern) -> tuple[tuple[str, ...], dict[str, int]]:
    """line: SASS or AMDGCN. Returns: instructions, less the NOPs that fill the end; labels."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for match in line.finditer(listing):
        if match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions.append(match["code"])
    while instructions[-1:] == ["NOP"]:
        instructions.pop()
    return tuple(instructions), labels


def mnemonics(instructions: Iterable[str]) -> Counter[str]:
    """How often each occurs; NVIDIA's without modifiers: IMMA stands for IMMA.16832.S8.S8, too."""
    return Counter(MNEMONIC.sub(r"\1", instruction) for instruction in instructions)


def count(instructions: Iterable[str], pattern: str) -> int:
    """How many have a mnemonic that the regular expression matches as a whole."""
    found = mnemonics(instructions).items()
    return sum(number for mnemonic, number in found if re.fullmatch(pattern, mnemonic))


def find_main_loop(instructions: Sequence[str], labels: Mapping[str, int]) -> tuple[str, ...]:
    """The innermost loop with most matrix products of integers; without any, of all matrix
    products; without any, of loads from global memory. Empty if no loop has any.

    Integers come first because products of floats, for all that the offset terms take after the
    main loop, are smaller and therefore more. A loop around another that has some is not innermost.
    """
    found = _find_loops(instructions, labels)
    loops = {loop: tuple(instructions[i] for i in sorted(loop)) for loop in found}
    for pattern in (INTEGER_MMA, MMA, GLOBAL_LOAD):
        hot = {loop: n for loop, body in loops.items() if (n := count(body, pattern))}
        innermost = [loop for loop in hot if not any(other < loop for other in hot)]
        if innermost:
            return loops[max(innermost, key=lambda loop: (hot[loop], -len(loop)))]
    return ()


def _find_loops(instructions: Sequence[str], labels: Mapping[str, int]) -> list[frozenset[int]]:
    """The natural loops, each as indices of its instructions.

    A loop is not what lies between a label and a branch back to it: a wait stands behind the end of
    the kernel and branches back into the loop, the last block of a loop may stand before its head.
    """
    successors: list[set[int]] = [set() for _ in instructions]
    predecessors: list[set[int]] = [set() for _ in instructions]
    heads = set()
    for i, instruction in enumerate(instructions):
        if BRANCH.match(instruction):
            successors[i] = {labels[label] for label in re.findall(r"\.L\w+", instruction)}
            heads |= successors[i]
        if not NEVER_FALLS_THROUGH.match(instruction) and i + 1 < len(instructions):
            successors[i] = successors[i] | {i + 1}
        for j in successors[i]:
            predecessors[j].add(i)
    # Functions that the kernel calls begin where no instruction leads.
    entries = {0} | {i for i, before in enumerate(predecessors) if not before}
    # Back edges come from where nothing gets but through the head.
    tails = {head: predecessors[head] - _reach(entries, successors, head) for head in heads}
    return [frozenset(_reach(t, predecessors, head) | {head}) for head, t in tails.items() if t]


def _reach(starts: set[int], edges: list[set[int]], without: int) -> set[int]:
    """What paths from `starts` lead to that never enter `without`."""
    reached = starts - {without}
    ahead = list(reached)
    while ahead:
        new = edges[ahead.pop()] - reached - {without}
        reached |= new
        ahead.extend(new)
    return reached
