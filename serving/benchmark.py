"""`python -m serving.benchmark`: a model and its OffQ checkpoint under load, side by side.

Each is served in turn with the same options and gets the same prompts, by `vllm bench serve`: for
every number of concurrent streams and every prompt length, with and without a shared prefix.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.table import Table

from serving.command import command, wide_console
from serving.contenders import Contender, add_arguments, contenders
from serving.gauges import watch
from serving.load import Load, drive
from vllm_offq.errors import UserError


@dataclass(frozen=True)
class Measured:
    """One model under one load."""

    model: str
    load: Load
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft_median_ms: float
    ttft_p99_ms: float
    tpot_median_ms: float
    tpot_p99_ms: float
    kv_cache_peak: float
    preemptions: int
    prefix_cache_hits: float
    """Share of the prompts' tokens."""


def sweep(arguments: argparse.Namespace) -> list[Load]:
    """Every load, each with prompts of its own."""
    prefixes = [0, arguments.shared_prefix] if arguments.shared_prefix else [0]
    points = [
        (prefix, input_len, streams)
        for prefix in prefixes
        for input_len in arguments.input_lengths
        for streams in arguments.concurrency
    ]
    return [
        Load(
            input_len=input_len,
            output_len=arguments.output_length,
            streams=streams,
            requests=streams * arguments.requests,
            shared_prefix=prefix,
            seed=seed,
        )
        for seed, (prefix, input_len, streams) in enumerate(points)
    ]


def measure(
    contender: Contender, loads: Sequence[Load], profile: Path, folder: Path
) -> Iterator[Measured]:
    """Serve one model and put the loads on it, one after the other."""
    log = folder / f"{contender.name}.log"
    with contender.served(profile, log) as endpoint:
        longest = max(load.shared_prefix + load.input_len + load.output_len for load in loads)
        if longest > endpoint.max_model_len:
            raise UserError(
                f"prompt and reply take up to {longest} tokens, but the server of "
                f"{contender.model} allows {endpoint.max_model_len}"
            )
        endpoint.warm_up(max(load.input_len for load in loads))
        for load in loads:
            name = f"{contender.name}-{load.shared_prefix}+{load.input_len}-{load.streams}.json"
            with watch(endpoint.url) as seen:
                numbers = drive(endpoint.url, endpoint.model, contender.model, load, folder / name)
            yield Measured(
                model=contender.name,
                load=load,
                output_tokens_per_second=numbers["output_throughput"],
                total_tokens_per_second=numbers["total_token_throughput"],
                ttft_median_ms=numbers["median_ttft_ms"],
                ttft_p99_ms=numbers["p99_ttft_ms"],
                tpot_median_ms=numbers["median_tpot_ms"],
                tpot_p99_ms=numbers["p99_tpot_ms"],
                kv_cache_peak=seen.kv_cache_peak,
                preemptions=int(seen.preemptions),
                prefix_cache_hits=seen.prefix_hits / max(seen.prefix_queries, 1),
            )


def tabulate(original: Sequence[Measured], offq: Sequence[Measured]) -> Table:
    """A section for each load: both models, then the ratio.

    The original is measured first; offq may lack loads, where its server failed.
    """
    table = Table(
        caption="milliseconds: median / 99th percentile; KV cache: largest share in use; "
        "ratio: OffQ's by the original's"
    )
    table.add_column("load")
    table.add_column("", no_wrap=True)
    for heading in ("out tok/s", "TTFT", "TPOT", "KV cache", "pre-\nempted", "prefix\nhits"):
        table.add_column(heading, justify="right")
    for before, after in zip_longest(original, offq):
        table.add_section()
        table.add_row(_label(before.load), *_cells(before))
        if after is None:
            continue
        table.add_row("", *_cells(after))
        table.add_row(
            "",
            "ratio",
            _ratio(before.output_tokens_per_second, after.output_tokens_per_second),
            _ratio(before.ttft_median_ms, after.ttft_median_ms),
            _ratio(before.tpot_median_ms, after.tpot_median_ms),
            _ratio(before.kv_cache_peak, after.kv_cache_peak),
            style="bold",
        )
    return table


def _cells(found: Measured) -> tuple[str, ...]:
    return (
        found.model,
        f"{found.output_tokens_per_second:.1f}",
        f"{found.ttft_median_ms:.0f} / {found.ttft_p99_ms:.0f}",
        f"{found.tpot_median_ms:.1f} / {found.tpot_p99_ms:.1f}",
        f"{found.kv_cache_peak:.1%}",
        str(found.preemptions),
        f"{found.prefix_cache_hits:.0%}",
    )


def _label(load: Load) -> str:
    shared = f"{load.shared_prefix} shared + " if load.shared_prefix else ""
    return f"{load.streams} x {shared}{load.input_len} in, {load.output_len} out"


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.2f}" if before > 0 else ""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(prog="python -m serving.benchmark", description=__doc__)
    add_arguments(found)
    found.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8, 32], help="streams at once"
    )
    found.add_argument(
        "--input-lengths", type=int, nargs="+", default=[128, 1024], help="tokens of a prompt"
    )
    found.add_argument("--output-length", type=int, default=128, help="tokens of a reply")
    found.add_argument(
        "--shared-prefix", type=int, help="repeat all with N tokens before, the same for all"
    )
    found.add_argument("--requests", type=int, default=3, help="of each stream, in turn")
    found.add_argument("--output", type=Path, required=True, help="folder for all results")
    return found


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure both models in turn, show the table, write results.json and benchmark.png.

    Where it ends early, table and results.json hold what has been measured until then.
    """
    models, loads, folder = contenders(arguments), sweep(arguments), arguments.output
    if arguments.output_length < 2:
        raise UserError("--output-length must be 2 or more: the time between tokens needs two")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Measured]] = {contender.name: [] for contender in models}
    try:
        for contender in models:
            console.print(f"{contender.name}: {contender.model}")
            for one in measure(contender, loads, arguments.config, folder):
                speed = f"{one.output_tokens_per_second:.1f} tokens/s"
                console.print(f"  {_label(one.load)}: {speed}", style="dim")
                found[contender.name].append(one)
    finally:
        if any(found.values()):
            console.print(tabulate(*found.values()))
            _write(found, arguments)

    from serving.benchmark_plot import plot  # matplotlib is slow to import

    plot(found, folder / "benchmark.png")
    console.print(f"all of it is in {folder}: results.json, benchmark.png, logs")


def _write(found: Mapping[str, Sequence[Measured]], arguments: argparse.Namespace) -> None:
    record = {
        "original": str(arguments.against),
        "offq": str(arguments.offq_model),
        "config": arguments.config.read_text(),
        "versions": {name: version(name) for name in ("vllm", "vllm-offq")},
        "results": [asdict(one) for of_model in found.values() for one in of_model],
    }
    file = arguments.output / "results.json"
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """The command; without words, those of the command line."""
    arguments = parser().parse_args(words)
    with command("benchmark"):
        run(arguments, wide_console())


if __name__ == "__main__":
    main()
