"""Which tiles of the Triton GEMM should be fast on which GPU, by what the compiler makes of them.

    python -m benchmarks.gpu_model [A100] [RTX_4090] [H100] [RTX_5090]

A model and no timing: nothing runs. The main loop is compiled for the GPU. Its instructions, by the
pipe that executes them, and the bytes that come from memory each take cycles of a multiprocessor
(SM); the most cycles are the estimate. It is a lower bound, as if everything overlapped: latencies,
launches, the epilogue, bank conflicts and what the caches can deliver are not in it. It ranks
variants; how long they take, benchmarks.gpu measures.
"""

import re
from collections.abc import Iterable, Sequence
from math import ceil, prod
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cross_compile import TARGETS, count
from benchmarks.gpu_variants import gpu_of, variants
from vllm_offq.errors import UserError
from vllm_offq.kernels.triton.gemm import gemm_kernel
from vllm_offq.kernels.triton.gemm_config import MAX_SPLIT_K, MIN_STEPS, GemmConfig, gemm_config

NOT_A_TIMING = "A model and not a timing: counted instructions, data-sheet figures, nothing run."
GROUP = 128
"""Channels of a group, each with a scale of its own, of weights as well."""


class Part(NamedTuple):
    """A GPU as its vendor publishes it: rates of dense products at the boost clock.

    target: of cross_compile.TARGETS; gigabytes: from memory, a second; tera: operations a second,
    two for each multiply-add, bf16 summed in float32; lanes: float32 multiply-adds, and integers
    made floats, a cycle and SM.
    """

    name: str
    target: str
    sms: int
    gigahertz: float
    gigabytes: float
    int8_tera: float
    bf16_tera: float
    float_lanes: int
    convert_lanes: int
    source: str


GUIDE = "lanes: CUDA C++ Programming Guide, table of arithmetic throughput"
PARTS = {
    "A100": Part("A100", "sm_80", 108, 1.41, 2039, 624, 312, 64, 16, "A100 80GB SXM data sheet"),
    "RTX_4090": Part("RTX 4090", "sm_89", 128, 2.52, 1008, 660.6, 165.2, 128, 64, "Ada whitepaper"),
    # The clock at which 2048 multiply-adds in bf16 a cycle and SM are these TFLOPS.
    "H100": Part("H100", "sm_90", 132, 1.83, 3350, 1979, 989.4, 128, 64, "H100 SXM data sheet"),
    "RTX_5090": Part(
        "RTX 5090", "sm_120", 170, 2.407, 1792, 838, 209.5, 128, 64, "RTX Blackwell whitepaper"
    ),
}

SCHEDULERS = 4
"""Of an SM; each issues an instruction of a warp in a cycle."""
INTEGER_LANES = 64
"""Logic, integer additions, shifts a cycle and SM. The RTX 5090 is said to have more for some."""
SHARED_BYTES = 128
"""A cycle and SM: 32 banks of 32 bits; the first-level cache is the same memory."""
WARP = 32

# Of mnemonics; conversions that have one of their own are fast, and the ALU's.
ALU = r"LOP3|SHF|PRMT|V?IADD3?|LEA|V?I?MNMX\w*|SEL|FSEL|[IF]SETP|PLOP3|P2R|R2P|MOV|SGXT|I2FP|F2FP"
FMA = r"FFMA2?|FMUL2?|FADD2?|IMAD|HADD2|HMUL2|HFMA2"
CONVERT = r"I2FP?|F2I|F2F|I2I"
MEMORY = r"(?:LD|ST)(?:G|S|L|SM|GSTS|TM)?"
IMMA = re.compile(r"\bIMMA\.(16|8)(8)(32|16)\b")
PREDICATE = re.compile(r"^@\S+\s+")
IGMMA = re.compile(r"IGMMA\.64x(\d+)x32\S* R\d+, (R\d+)?")
"""Columns; the register of the first operand, unless it comes from shared memory."""

UNPACK_ALU, UNPACK_FMA = 7 / 8, 8 / 8
"""Instructions for each weight that Marlin makes a bfloat16 (dequant.h: for eight of them 4 LOP3,
3 shifts, 4 subtractions and 4 scalings of pairs)."""
MARLIN_ROWS = 64  # tokens that share an unpacked weight


class Layer(NamedTuple):
    out_features: int
    in_features: int


# Of Llama-3-8B.
LAYERS = {"qkv": Layer(6144, 4096), "gate_up": Layer(28672, 4096), "down": Layer(4096, 14336)}
TOKENS = (1, 16, 64, 256, 2048)


class Loop(NamedTuple):
    """The main loop of a GEMM kernel; blocks: how many an SM holds, whose work can overlap."""

    block_m: int
    block_n: int
    block_k: int
    wide: bool
    warps: int
    instructions: tuple[str, ...]
    blocks: int = 1
    spills: int = 0


class Estimate(NamedTuple):
    """Of one call; bound: what takes the seconds."""

    name: str
    seconds: float
    bound: str


def tile_name(tile: Loop | GemmConfig) -> str:
    return f"{tile.block_m}x{tile.block_n} {'wide' if tile.wide else 'packed'}"


def macs(instruction: str) -> int:
    """Multiply-adds that one warp's instruction is, or has its share in."""
    if match := IGMMA.search(instruction):
        return 64 * int(match[1]) * 32 // 4  # four warps issue it together
    match = IMMA.search(instruction)
    return prod(map(int, match.groups())) if match else 0


def shared_bytes(instruction: str) -> int:
    """Bytes that one warp's instruction moves through shared memory or the first-level cache."""
    if match := IGMMA.search(instruction):
        return (int(match[1]) + (0 if match[2] else 64)) * 32 // 4
    opcode, *modifiers = instruction.split()[0].split(".")
    if not re.fullmatch(MEMORY, opcode):
        return 0
    if opcode == "LDSM":
        return 4 * WARP * (int(modifiers[-1]) if modifiers[-1].isdigit() else 1)
    # Tiles are copied to shared memory: what is left to plain loads are scales, which lanes share.
    bits = [int(width) for width in modifiers if width in ("64", "128") and opcode != "LDG"]
    return WARP * (bits[0] // 8 if bits else 4)


def pipe_cycles(instructions: Sequence[str], warps: int, part: Part) -> dict[str, float]:
    """SM cycles of one pass of a block through its loop, by pipe."""
    # What is never to be executed still takes a slot to issue.
    executed = [PREDICATE.sub("", line) for line in instructions if not line.startswith("@!PT ")]
    threads = warps * WARP
    multiply_adds, integers = count(executed, FMA), count(executed, "IMAD")
    tensor_macs = part.int8_tera * 1e3 / (2 * part.gigahertz * part.sms)
    return {
        "issue": warps * len(instructions) / SCHEDULERS,
        "ALU": threads * count(executed, ALU) / INTEGER_LANES,
        # Some of the lanes do not multiply integers.
        "FMA": threads * max(multiply_adds / part.float_lanes, integers / INTEGER_LANES),
        "convert": threads * count(executed, CONVERT) / part.convert_lanes,
        "tensor": warps * sum(map(macs, executed)) / tensor_macs,
        "shared": warps * sum(map(shared_bytes, executed)) / SHARED_BYTES,
    }


def step_cycles(loop: Loop, part: Part) -> dict[str, float]:
    """SM cycles, by pipe, of block_k channels of one tile: a pass may be several of these steps."""
    done = loop.warps * sum(map(macs, loop.instructions))
    if not done:
        raise UserError(f"the main loop of {tile_name(loop)} has no int8 products to model")
    steps = done / (loop.block_m * loop.block_n * loop.block_k)
    cycles = pipe_cycles(loop.instructions, loop.warps, part).items()
    return {pipe: number / steps for pipe, number in cycles}


def weight_bytes(layer: Layer, bits: int) -> float:
    """Codes, with a float16 scale for each group; or plain numbers of 16 bits."""
    return layer.out_features * layer.in_features * (bits / 8 + (2 / GROUP if bits < 16 else 0))


def offq(loop: Loop, part: Part, layer: Layer, tokens: int) -> Estimate:
    """Activations quantized (bounded by their bytes alone), then the GEMM."""
    out_features, channels = layer
    tiles = ceil(tokens / loop.block_m) * ceil(out_features / loop.block_n)
    steps = channels // loop.block_k
    split_k = max(1, min(2 * part.sms // tiles, steps // MIN_STEPS, MAX_SPLIT_K))  # gemm_config
    steps_of_sm = ceil(tiles * split_k / part.sms) * ceil(steps / split_k)

    code_bytes = tokens * channels * (1.0 if loop.wide else 0.5) + tokens * channels / GROUP * 8
    sums_and_output = out_features * (channels / GROUP + tokens) * 2
    moved = weight_bytes(layer, 4) + sums_and_output + code_bytes
    # Every byte once: tiles that follow each other find the same weights in the cache.
    memory = moved * part.gigahertz / part.gigabytes / steps_of_sm
    cycles = step_cycles(loop, part) | {"memory": memory}
    bound = max(cycles, key=lambda pipe: cycles[pipe])
    gemm = cycles[bound] * steps_of_sm / part.gigahertz / 1e9
    quantize = (tokens * channels * 2 + code_bytes) / part.gigabytes / 1e9
    return Estimate(tile_name(loop), gemm + quantize, bound)


def roofline(part: Part, layer: Layer, tokens: int, weight_bits: int) -> Estimate:
    """A GEMM in bfloat16 with no loss at all; with weights of 4 bits, unpacked as Marlin does."""
    work = layer.out_features * layer.in_features
    activations = 2 * tokens * (layer.out_features + layer.in_features)
    seconds = {
        "memory": (weight_bytes(layer, weight_bits) + activations) / part.gigabytes / 1e9,
        "tensor": 2 * work * tokens / part.bf16_tera / 1e12,
    }
    if weight_bits < 16:
        cycles = max(UNPACK_ALU / INTEGER_LANES, UNPACK_FMA / part.float_lanes)
        unpacked = work * ceil(tokens / MARLIN_ROWS)
        seconds["unpack"] = unpacked * cycles / part.sms / part.gigahertz / 1e9
    bound = max(seconds, key=lambda limit: seconds[limit])
    return Estimate("roofline", seconds[bound], bound)


def rank(loops: Iterable[Loop], part: Part, layer: Layer, tokens: int) -> list[Estimate]:
    """The fastest first."""
    return sorted((offq(x, part, layer, tokens) for x in loops), key=lambda x: x.seconds)


def compile_loops(target_name: str) -> list[Loop]:
    """Of gemm_config's tiles, with activations of a byte each and of half a byte."""
    target = TARGETS[target_name]
    wanted = {"SCALE_PER_GROUP": True, "GROUP_SIZE": GROUP}
    loops: dict[str, Loop] = {}
    for variant in track(tuple(variants(target)), target_name, console=Console(stderr=True)):
        if variant.kernel is not gemm_kernel or not wanted.items() <= variant.constants.items():
            continue
        for wide in (True, False):
            constants, warps = variant.constants | {"WIDE": wide}, variant.options["num_warps"]
            signature = variant.signature | {"codes_ptr": "*i8" if wide else "*u8"}
            compiled = variant._replace(signature=signature, constants=constants).compile(target)
            sizes = (constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"])
            # Of 65536 registers, given out in eights; a KiB of shared memory goes with each block.
            blocks = 65536 // (ceil(compiled.registers / 8) * 8 * WARP * warps)
            blocks = min(blocks, (target.shared_memory + 1024) // (compiled.shared_memory + 1024))
            loop = Loop(*sizes, wide, warps, compiled.main_loop, blocks, compiled.spills)
            # Configurations that differ in their stages alone are one here.
            loops.setdefault(tile_name(loop), loop)
    return list(loops.values())


def steps_table(part: Part, loops: Sequence[Loop]) -> Table:
    figures = (
        f"{part.sms} SMs at {part.gigahertz} GHz, {part.gigabytes} GB/s, {part.int8_tera} TOPS in "
        f"int8, {part.bf16_tera} TFLOPS in bf16 ({part.source}; {GUIDE})"
    )
    pipes = ("issue", "ALU", "FMA", "convert", "tensor", "shared")
    table = Table(
        *("tile", "warps", "blocks", "spills", *pipes, "bound", "tensor / bound"),
        title=f"{part.name}: SM cycles of a step of {loops[0].block_k} channels",
        caption=f"tile: tokens x outputs; blocks: that an SM holds at once; {figures}",
    )
    for loop in loops:
        cycles = step_cycles(loop, part)
        bound = max(cycles, key=lambda pipe: cycles[pipe])
        numbers = (loop.warps, loop.blocks, loop.spills, *(round(cycles[pipe]) for pipe in pipes))
        share = f"{cycles['tensor'] / cycles[bound]:.0%}"
        table.add_row(tile_name(loop), *map(str, numbers), bound, share)
    return table


def layers_table(part: Part, loops: Sequence[Loop]) -> Table:
    headings = ("first", "second", "third", "chosen by gemm_config", "W4A16", "bf16")
    table = Table(
        *("layer", "tokens", *headings, "W4A16 / chosen"),
        title=f"{part.name}: modelled microseconds, not timed, and what bounds them",
        caption="OffQ: with its quantization; W4A16, bf16: rooflines, free of all loss",
    )
    core = gpu_of(TARGETS[part.target]).tensor_core
    for name, layer in LAYERS.items():
        groups = layer.in_features // GROUP
        for tokens in TOKENS:
            config = gemm_config(core, part.sms, tokens, layer.out_features, groups, GROUP, bits=4)
            ranked = rank(loops, part, layer, tokens)
            chosen = next(estimate for estimate in ranked if estimate.name == tile_name(config))
            others = [roofline(part, layer, tokens, bits) for bits in (4, 16)]
            shown = (*ranked[:3], chosen, *others)
            cells = (f"{x.name} {x.seconds * 1e6:.1f} {x.bound}" for x in shown)
            ratio = f"{others[0].seconds / chosen.seconds:.2f}"
            table.add_row(name, str(tokens), *cells, ratio)
        table.add_section()
    return table


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}.")] = None,
) -> None:
    """Rank the tiles of the Triton GEMM by a static model. Nothing is timed."""
    if unknown := set(names or ()) - PARTS.keys():
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}")
    console = Console(width=150, highlight=False)
    console.print(NOT_A_TIMING, style="bold")
    for name in names or PARTS:
        loops = compile_loops(PARTS[name].target)
        console.print(steps_table(PARTS[name], loops), layers_table(PARTS[name], loops))
    console.print(NOT_A_TIMING, style="bold")


if __name__ == "__main__":
    typer.run(main)
