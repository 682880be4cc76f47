"""Serve a model and its OffQ checkpoint, load both with `vllm bench serve`, set them side by side.

Every server has the same options (torch.compile included) and the same cores, gets the same
prompts, and is started anew in every round: what disturbs the machine then meets all of them.
"""

import json
import re
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from serving.load import Load, drive
from serving.server import Server, serve
from vllm_offq.kernels import OVERRIDE

WORK = Path("build/benchmarks")
NAME = "benchmarked"  # under which every model is served
COLUMNS = ("out\ntok/s", "TTFT\nmean", "TTFT\nmedian", "TPOT\nmedian", "peak\nRSS", "check-\npoint")
FORMS = (".1f", ".0f", ".0f", ".1f", ".0f", ".0f")

# Options of the benchmarks that serve.
Original = Annotated[Path, typer.Argument(help="Hugging Face folder: weights and tokenizer.")]
OffQ = Annotated[
    Path | None, typer.Argument(help="OffQ checkpoint of it; without, only the original.")
]
DTypes = Annotated[str, typer.Option(help="In which vLLM serves.")]
InputLen = Annotated[int, typer.Option(help="Tokens of a prompt.")]
OutputLen = Annotated[int, typer.Option(help="Tokens of a reply.", min=2)]
Cores = Annotated[
    str, typer.Option(help="VLLM_CPU_OMP_THREADS_BIND; `auto` leaves one to the API server.")
]
Kernels = Annotated[str | None, typer.Option(help=OVERRIDE)]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write every round's numbers here.")]

console = Console(highlight=False)


@dataclass(frozen=True)
class Configuration:
    """What is served."""

    model: Path
    is_offq: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"{'OffQ' if self.is_offq else 'original'} {self.dtype}"


@dataclass(frozen=True)
class Workload:
    """What is asked of a server."""

    tokenizer: Path
    input_len: int
    output_len: int
    requests: int
    """Of each stream, one after the other; a stream more than that warms up and is not counted."""


@dataclass(frozen=True)
class Speed:
    """Of a server under one number of concurrent streams, as `vllm bench serve` calls it."""

    output_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    median_tpot_ms: float


@dataclass(frozen=True)
class Run:
    """One server, from its start to its end."""

    configuration: str
    cores: list[int]
    kernels: str
    checkpoint_mb: float
    peak_rss_mb: float
    speeds: dict[int, Speed]
    """By the number of concurrent streams."""


def configurations(original: Path, offq: Path | None, dtypes: str) -> list[Configuration]:
    models = [(original, False)] + ([(offq, True)] if offq else [])
    return [Configuration(*model, dtype) for model in models for dtype in dtypes.split(",")]


def environment(cores: str, kernels: str | None) -> dict[str, str]:
    chosen = {"VLLM_CPU_OMP_THREADS_BIND": cores}
    return chosen | {OVERRIDE: kernels} if kernels else chosen


def measure(
    configuration: Configuration,
    workload: Workload,
    concurrency: Sequence[int],
    environment: Mapping[str, str],
) -> Run:
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{configuration.name.replace(' ', '-')}.log"
    options = (
        *("--served-model-name", NAME, "--dtype", configuration.dtype),
        *("--max-model-len", str(workload.input_len + workload.output_len + 64)),
        "--no-enable-prefix-caching",  # or the warm-up would answer for the measured prompts
    )
    with serve(configuration.model, log, *options, environment=environment) as server:
        speeds = {streams: load(server, workload, streams) for streams in concurrency}
        said = log.read_text(errors="replace")
        kernels = re.search(r"OffQ uses the (.+) kernels", said)
        cores = re.search(r"core ids=\[([\d, ]*)\]", said)
        weights = configuration.model.glob("*.safetensors")
        return Run(
            configuration=configuration.name,
            cores=[int(core) for core in cores[1].split(",")] if cores else [],
            kernels=kernels[1] if kernels else "",
            checkpoint_mb=sum(file.stat().st_size for file in weights) / 1e6,
            peak_rss_mb=peak_rss_mb(said),
            speeds=speeds,
        )


def load(server: Server, workload: Workload, streams: int) -> Speed:
    """Drive a server with random prompts of one length, and replies of one length."""
    requests = streams * workload.requests
    asked = Load(workload.input_len, workload.output_len, streams, requests, warm_up=streams)
    result = server.log.with_suffix(f".{streams}.json")
    numbers = drive(server.url, NAME, workload.tokenizer, asked, result)
    return Speed(**{field.name: numbers[field.name] for field in fields(Speed)})


def peak_rss_mb(server_log: str) -> float:
    """Of the processes that run the model, which the log names; it includes compilation."""
    total = 0.0
    for pid in set(re.findall(r"\(Worker\S* pid=(\d+)\)", server_log)):
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6
    return total


def describe(runs: Sequence[Run], cores: str) -> str:
    """What the numbers hold for."""
    used = sorted({core for run in runs for core in run.cores})
    kernels = {run.kernels for run in runs if run.kernels}
    return (
        f"{describe_machine()}\nvLLM {version('vllm')}, torch {version('torch')}; the worker on "
        f"cores {used} (VLLM_CPU_OMP_THREADS_BIND={cores}); "
        f"OffQ kernels: {', '.join(kernels) or 'none, only the original was served'}"
    )


@dataclass(frozen=True)
class Row:
    """Medians over the rounds."""

    output_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    median_tpot_ms: float
    peak_rss_mb: float
    checkpoint_mb: float


def summarize(runs: Sequence[Run], streams: int) -> Row:
    measured = [(*astuple(run.speeds[streams]), run.peak_rss_mb, run.checkpoint_mb) for run in runs]
    return Row(*(statistics.median(column) for column in zip(*measured, strict=True)))


def tabulate(runs: Sequence[Run], configured: Sequence[Configuration], title: str) -> Table:
    """A section for each number of streams: the configurations, then OffQ's ratios."""
    table = Table(title=title, caption="ms, MB; *: the fastest original; RSS: with the KV cache")
    table.add_column("", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for streams in runs[0].speeds:
        rows = {
            configuration: summarize(
                [run for run in runs if run.configuration == configuration.name], streams
            )
            for configuration in configured
        }
        originals = [configuration for configuration in configured if not configuration.is_offq]
        strongest = max(originals, key=lambda original: rows[original].output_throughput)
        table.add_row(f"{streams} concurrent", style="bold")
        for configuration, row in rows.items():
            star = " *" if configuration == strongest else ""
            numbers = (f"{value:{form}}" for value, form in zip(astuple(row), FORMS, strict=True))
            table.add_row(configuration.name + star, *numbers)
        for configuration, row in rows.items():
            if configuration.is_offq:
                pairs = zip(astuple(row), astuple(rows[strongest]), strict=True)
                ratios = (f"{ours / theirs:.2f}" for ours, theirs in pairs)
                table.add_row(f"{configuration.name} / *", *ratios)
        table.add_section()
    return table


def main(
    original: Original,
    offq: OffQ = None,
    dtypes: DTypes = "float32,bfloat16",
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    concurrency: Annotated[str, typer.Option(help="Numbers of concurrent streams.")] = "1,8",
    requests: Annotated[int, typer.Option(help="Of each stream, one after the other.")] = 3,
    rounds: Annotated[int, typer.Option(help="Server starts of each configuration.")] = 3,
    cores: Cores = "auto",
    kernels: Kernels = None,
    json_path: JsonPath = None,
) -> None:
    """Serve ORIGINAL and OFFQ in turn, load them with `vllm bench serve`, and compare."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with us
    workload = Workload(original, input_len, output_len, requests)
    configured = configurations(original, offq, dtypes)
    streams = [int(number) for number in concurrency.split(",")]
    runs = []
    for number in range(1, rounds + 1):
        for configuration in configured:
            console.print(f"round {number} of {rounds}: {configuration.name}", style="dim")
            runs.append(
                measure(configuration, workload, streams, environment(cores, kernels)),
            )
    setting = describe(runs, cores)
    title = f"{input_len} tokens in, {output_len} out; medians of {rounds} rounds"
    console.print(setting, soft_wrap=True)
    console.print(tabulate(runs, configured, title))
    if json_path:
        record = {"setting": setting, "runs": [asdict(run) for run in runs]}
        json_path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
