"""The Triton kernels on this GPU against the strongest others for it; whole servers, if asked.

    python -m benchmarks.gpu [--out FILE] [--rounds 5] [--serve MODEL OFFQ_CHECKPOINT]

Linear: quantization included, against cuBLAS and vLLM's 4-bit kernels. Fused linear: the norm or
activation before it included, too, by vLLM's kernel before those that have none. Attention: new
keys and values stored, then all attended to, rotations included, against vLLM's backends. Every
call is a CUDA graph, as vLLM serves them, and finds nothing in the cache; medians of rounds in
which the contenders take turns. What this GPU or this build has not got is listed with the reason.
First let `pytest tests/kernels/triton` say whether the kernels are right there.
"""

import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import serving
from benchmarks.gpu_contenders import (
    DEVICE,
    LAYERS,
    Attention,
    Call,
    FusedLinear,
    Linear,
    Problem,
)
from vllm_offq.kernels.triton.target import why_not_usable

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
STEPS = [(batch, context, 1) for batch in (1, 16, 64) for context in (512, 2048, 8192, 32768)]
STEPS.append((1, 2048, 2048))
"""Requests; context and new tokens of each."""
TIMINGS = 10  # of a contender in a round
FLUSHED_BYTES = 256 << 20  # more than caches hold


class Comparison(BaseModel):
    """One kernel in one case. medians: microseconds; unavailable: reasons."""

    kernel: str
    case: str
    medians: dict[str, float] = {}
    unavailable: dict[str, str] = {}

    def strongest_other(self) -> tuple[str, float]:
        """Its name, and how many times as long as OffQ it takes; "" or NaN: there is none."""
        others = self.medians.keys() - {"OffQ"}
        name = min(others, key=lambda name: self.medians[name], default="")
        return name, self.medians.get(name, math.nan) / self.medians.get("OffQ", math.nan)


class Report(BaseModel):
    """What --out is: written anew after every case."""

    device: str
    capability: tuple[int, int]
    driver: str
    versions: dict[str, str]
    date: str
    rounds: int
    comparisons: list[Comparison] = []

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")


def start_report(rounds: int) -> Report:
    """Of this machine, without a comparison."""
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    packages = ("vllm-offq", "vllm", "torch", "triton")
    installed = {x.name for x in metadata.distributions()}
    versions = {x: metadata.version(x) if x in installed else "none" for x in packages}
    return Report(
        device=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        driver=driver.partition("\n")[0],
        versions=versions | {"CUDA of torch": str(torch.version.cuda)},
        date=datetime.now(UTC).isoformat(timespec="minutes"),
        rounds=rounds,
    )


def compare(kernel: str, case: str, make: Callable[[], "Problem"], rounds: int) -> Comparison:
    """A contender that fails is listed and stops nobody; even if it takes the GPU down with it."""
    comparison = Comparison(kernel=kernel, case=case)
    replays: dict[str, Call] = {}
    try:
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
        for name, build in make().builds().items():
            try:
                replays[name] = record(build())
            except Exception as error:
                comparison.unavailable[name] = in_one_line(error)
        times: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(rounds):
            for name, replay in replays.items():
                times[name].append(microseconds(replay, flushed))
        comparison.medians = {name: statistics.median(values) for name, values in times.items()}
    except RuntimeError as error:
        comparison.unavailable["contender at all"] = in_one_line(error)
    return comparison


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def record(call: Call) -> Call:
    """A call as the replay of a graph, after it has been compiled and warmed up."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    graph.replay()
    torch.cuda.synchronize()

    def replay(_tensors: Call = call) -> None:  # which a graph does not keep for itself
        graph.replay()

    return replay


def microseconds(call: Call, flushed: Tensor) -> float:
    """Median of some calls, each after the caches were filled with something else."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMINGS)]
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)


def tabulate(comparisons: list[Comparison]) -> Table:
    """Of one kernel; under it who is missing, in how many cases, and why."""
    names = dict.fromkeys(name for x in comparisons for name in (*x.medians, *x.unavailable))
    headings = ("case", *(f"{name}, us" for name in names), "strongest other", "its time / OffQ's")
    missing = Counter(pair for x in comparisons for pair in x.unavailable.items())
    lines = [f"no {name} in {number} cases: {why}" for (name, why), number in missing.items()]
    table = Table(*headings, title=comparisons[0].kernel, caption=escape("\n".join(lines)))
    for x in comparisons:
        cells = (f"{x.medians[name]:.1f}" if name in x.medians else "-" for name in names)
        other, ratio = x.strongest_other()
        table.add_row(x.case, *cells, other or "-", "-" if math.isnan(ratio) else f"{ratio:.2f}")
    return table


def cases() -> Iterator[tuple[str, str, Callable[[], Problem]]]:
    """Kernel, case, and what makes the contenders."""
    for name in LAYERS:
        for tokens in TOKENS:
            case = f"{name}, {tokens} tokens"
            yield "linear", case, partial(Linear, name, tokens)
            yield "fused linear", case, partial(FusedLinear, name, tokens)
    for step in STEPS:
        yield "attention", "{} x {} tokens, {} new".format(*step), partial(Attention, *step)


def main(
    out: Annotated[Path | None, typer.Option(help="JSON; else in benchmarks/results.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    serve: Annotated[
        tuple[Path, Path] | None, typer.Option(help="A model and its OffQ checkpoint.")
    ] = None,
) -> None:
    """Measure the Triton kernels against the strongest others on this GPU."""
    if torch.cuda.is_available():
        obstacle = why_not_usable(torch.cuda.get_device_capability())
    else:
        obstacle = "need a GPU; torch sees none"
    if obstacle:
        sys.exit(f"Nothing to measure: the Triton kernels {obstacle}.")
    report = start_report(rounds)
    slug = re.sub(r"\W+", "-", report.device.lower())
    path = out or Path(__file__).parent / "results" / f"gpu-{slug}.json"
    console = Console(width=150, highlight=False)
    console.print(report.model_dump(exclude={"comparisons"}))
    for kernel, case, make in track(list(cases()), "measuring", console=Console(stderr=True)):
        report.comparisons.append(compare(kernel, case, make, rounds))
        report.write(path)
    for kernel in ("linear", "fused linear", "attention"):
        console.print(tabulate([x for x in report.comparisons if x.kernel == kernel]))
    console.print(f"Written to {path}")
    if serve:
        torch.cuda.empty_cache()
        serving.main(*serve, dtypes="bfloat16", json_path=path.with_suffix(".serving.json"))


if __name__ == "__main__":
    typer.run(main)
