"""The kernels for CPUs against each other: what a machine loses that cannot run the fastest.

    python -m benchmarks.backends [--rounds 7]

The log of a server quotes the ratios where it uses slower ones.
"""

from functools import partial
from importlib import import_module

import torch
import typer
from rich.table import Table

from benchmarks.kernels import LAYERS, AttentionStep, Call, console, median_times, selected_isa
from benchmarks.machine import describe_machine
from vllm_offq.kernels import BACKENDS


def main(rounds: int = 7) -> None:
    """Measure the kernels for CPUs against each other, on one thread."""
    torch.set_num_threads(1)
    backends = {
        name: import_module(BACKENDS[name].module) for name in ("cpu", "numba", "reference")
    }
    table = Table("backends", "tokens", *(f"{name} us" for name in backends), "numba", "reference")

    def add(what: str, tokens: int, contenders: dict[str, Call]) -> None:
        times = median_times(contenders, rounds, 2)
        microseconds = [f"{seconds * 1e6:.0f}" for seconds in times.values()]
        slower = [f"{times[name] / times['cpu']:.1f} x" for name in ("numba", "reference")]
        table.add_row(what, str(tokens), *microseconds, *slower)

    for layer in ("SmolLM2-135M gate_up", "Llama-3-8B qkv"):
        n, k, group_size = LAYERS[layer]
        weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, 1).half()
        for tokens in (1, 256):
            x, settings = torch.randn(tokens, k), (None, n, group_size, 0, 0.95, False)
            prepared = {
                b: kernels.prepare_weight(*weight, group_size) for b, kernels in backends.items()
            }
            add(
                layer,
                tokens,
                {b: partial(backends[b].linear, x, prepared[b], *settings) for b in backends},
            )
    for context in (128, 4096):
        step = AttentionStep(context)
        calls = {b: step.offq(torch.bfloat16, kernels) for b, kernels in backends.items()}
        add("attention, decode", context, calls)
    console.print(f"{describe_machine()}; C++ kernels for {selected_isa()}", soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
