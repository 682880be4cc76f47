"""`offq eval`: perplexity and divergence from the original, as vLLM serves the models."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vllm_offq.errors import UserError

if TYPE_CHECKING:
    from vllm_offq.evaluate import Evaluation
    from vllm_offq.metrics import Estimate


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="One or more, each a folder or hub id.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    against: Annotated[
        str | None, typer.Option(help="The original, for divergence from it; run once.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Use the text's first N only.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="As vLLM's; default: float32 on a CPU, else the model's own."),
    ] = None,
    top_logprobs: Annotated[
        int,
        typer.Option(help="Tokens that KL tells apart; the others count as one (a lower bound)."),
    ] = 512,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement through vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # keeps the progress bar readable
    from vllm_offq.evaluate import evaluate as run
    from vllm_offq.evaluate import read_text

    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise UserError(f"the folder of {json_file} does not exist; make it first")
    if json_file is not None and json_file.is_dir():
        raise UserError(f"{json_file} is a folder; give --json a file's name")
    console = Console(markup=False, emoji=False)  # names may hold brackets and colons
    with _progress(console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(model: str, done: int, total: int) -> None:
            if model not in tasks:
                tasks[model] = progress.add_task(model, total=total)
            progress.update(tasks[model], completed=done)

        evaluation = run(
            checkpoints,
            read_text(text),
            against,
            sequence_length,
            max_tokens,
            dtype,
            top_logprobs,
            show,
        )
    console.print(_table(evaluation, text))
    if json_file is not None:
        content = {"text": str(text)} | asdict(evaluation)
        try:
            json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{json_file} cannot be written: {error.strerror}") from None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _table(evaluation: "Evaluation", text: Path) -> Table:
    table = Table(
        title=f"{text.name}: {evaluation.windows} windows of {evaluation.sequence_length} tokens, "
        f"{evaluation.dtype}"
    )
    table.add_column("model", overflow="fold")
    table.add_column("perplexity", justify="right")
    if evaluation.original is None:
        for model in evaluation.models:
            table.add_row(model.model, _cell(model.perplexity, 2))
        return table
    for column in ("ratio", "KL", "top-1"):
        table.add_column(column, justify="right")
    table.add_row(evaluation.original.model, _cell(evaluation.original.perplexity, 2))
    for model in evaluation.models:
        table.add_row(
            model.model,
            _cell(model.perplexity, 2),
            _cell(model.perplexity_ratio, 4),
            _cell(model.kl_divergence, 4),
            _cell(model.top1_agreement, 4),
        )
    unseen = max(model.unseen_mass or 0.0 for model in evaluation.models)
    table.caption = (
        f"± standard error over windows. ratio, KL divergence and agreement of the likeliest token "
        f"are against {evaluation.original.model}; KL tells the top {evaluation.top_logprobs} "
        f"tokens apart, the others hold {unseen:.2%} of the probability."
    )
    return table


def _cell(estimate: "Estimate | None", digits: int) -> str:
    if estimate is None:
        return ""
    error = estimate.standard_error
    return f"{estimate.value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
