"""The Triton kernels as each GPU would run them: registers, shared memory, main loop.

    python -m benchmarks.gpu_kernels [--write]

Compiled without a GPU; no figure is a time. --write keeps the instructions of every main loop in
benchmarks/results/gpu_instructions.json, which a test compares with.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cross_compile import MMA, TARGETS, count
from benchmarks.gpu_variants import variants

INSTRUCTIONS = Path(__file__).parent / "results" / "gpu_instructions.json"


def main(
    write: Annotated[bool, typer.Option("--write", help="Keep the instructions.")] = False,
) -> None:
    console = Console(width=130, highlight=False)
    table = Table("GPU", "kernel", "registers", "spills", "shared, KiB", "products", "main loop")
    kept: dict[str, dict[str, int]] = {}
    for target in track(TARGETS.values(), "compiling", console=Console(stderr=True)):
        kept[target.name] = {}
        for variant in variants(target):
            compiled = variant.compile(target)
            loop = compiled.main_loop or compiled.instructions
            kept[target.name][variant.name] = len(loop)
            table.add_row(
                target.name,
                variant.name,
                str(compiled.registers),
                str(compiled.spills),
                f"{compiled.shared_memory / 1024:.0f}",
                str(count(loop, MMA)),
                str(len(loop)),
            )
        table.add_section()
    console.print(table)
    if write:
        INSTRUCTIONS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
