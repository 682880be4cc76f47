"""`python -m serving.evaluate`: a model and its OffQ checkpoint on lm-evaluation-harness's tasks.

Both are asked through vLLM's OpenAI-compatible API, so that what is evaluated is what is served,
and on the same documents, so that the difference is known better than either score.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from serving.command import command, wide_console
from serving.contenders import add_arguments, contenders
from serving.paired import Disagreement, MeanDifference
from serving.scores import Row, TaskScores, compare
from vllm_offq.errors import UserError

WORK = Path("build/evaluate")  # the servers' logs
ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
"""vLLM keeps a core for its API server, which has next to nothing to do here."""


def tabulate(rows: Sequence[Row]) -> Table:
    """For people; the JSON file has all digits."""
    table = Table(
        caption="± standard error; recovery: OffQ's share of the original's score, of a perplexity "
        "the inverse ratio; document by document: lost and won answers, or the mean difference in "
        "nats, OffQ's minus the original's, with the p-value of there being none"
    )
    table.add_column("task (documents)")
    table.add_column("metric", overflow="fold")
    for heading in ("original", "OffQ", "recovery", "document by document"):
        table.add_column(heading, justify="right")
    task = ""
    for row in rows:
        if row.task != task:
            table.add_section()
        table.add_row(
            f"{row.task} ({row.documents})" if row.task != task else "",
            row.metric,
            _cell(row.original, row.original_standard_error),
            "" if row.offq is None else _cell(row.offq, row.offq_standard_error),
            "" if row.recovery_percent is None else f"{row.recovery_percent:.1f}%",
            _describe(row.paired),
        )
        task = row.task
    return table


def _cell(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _describe(paired: Disagreement | MeanDifference | None) -> str:
    if paired is None:
        return ""
    if isinstance(paired, Disagreement):
        return f"-{paired.only_first} +{paired.only_second}, p {_p(paired.p_value)}"
    error = "" if paired.standard_error is None else f" ± {paired.standard_error:.3f}"
    p_value = "" if paired.p_value is None else f", p {_p(paired.p_value)}"
    return f"{paired.mean:+.3f}{error}{p_value}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(prog="python -m serving.evaluate", description=__doc__)
    add_arguments(found)
    found.add_argument(
        "--tasks", nargs="+", required=True, help="names that lm-evaluation-harness knows"
    )
    found.add_argument("--limit", type=int, help="only the first N documents of each task")
    found.add_argument(
        "--data-folder", type=Path, help="where the task files of serving/tasks/ find their data"
    )
    found.add_argument("--output", type=Path, help="JSON file for the results")
    found.add_argument(
        "--concurrent", type=int, default=4, help="requests at once (default: %(default)s)"
    )
    found.add_argument(
        "--batch-size", type=int, default=16, help="prompts of a request (default: %(default)s)"
    )
    return found


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Evaluate both models in turn, show the table, write the file.

    Where it ends early, both hold the scores of the model that has some.
    """
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise UserError(f"the folder of {arguments.output} does not exist; make it first")
    models = contenders(arguments)
    try:
        from serving.harness import Tasks, evaluate  # lm-evaluation-harness is slow to import
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: `pip install vllm-offq[eval]`") from error
    tasks = Tasks.load(arguments.tasks, arguments.data_folder)  # fails before a server is started
    scores: list[dict[str, TaskScores]] = []
    seconds: dict[str, float] = {}
    try:
        for contender in models:
            console.print(f"{contender.name}: {contender.model}")
            log = WORK / f"{contender.name}.log"
            with contender.served(arguments.config, log, ALL_CORES) as endpoint:
                began = time.monotonic()
                scores.append(
                    evaluate(
                        endpoint,
                        contender.model,
                        tasks,
                        arguments.limit,
                        arguments.concurrent,
                        arguments.batch_size,
                    )
                )
                seconds[contender.name] = round(time.monotonic() - began, 1)
            console.print(f"{contender.name}: {seconds[contender.name]} s", style="dim")
    finally:
        if scores:
            rows = compare(*scores)
            console.print(tabulate(rows))
            if arguments.output:
                _write(rows, seconds, arguments)


def _write(
    rows: Sequence[Row], seconds: Mapping[str, float], arguments: argparse.Namespace
) -> None:
    record = {
        "original": str(arguments.against),
        "offq": str(arguments.offq_model),
        "limit": arguments.limit,
        "versions": {name: version(name) for name in ("vllm", "lm-eval", "vllm-offq")},
        "seconds": seconds,
        "results": [asdict(row) for row in rows],
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """The command; without words, those of the command line."""
    arguments = parser().parse_args(words)
    with command("evaluate"):
        run(arguments, wide_console())


if __name__ == "__main__":
    main()
