"""How far a checkpoint's predictions are from its own, when the last bits of its floats differ.

    python -m benchmarks.last_bits MODEL CHECKPOINT --text TEXT

Which of 16 codes an activation becomes may hang on its last bit, and a step of one code is many
last bits in the layers after. Dtypes, instruction sets and numbers of threads or ranks differ in
last bits; here every embedding of the simulated model is a millionth larger.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.scores import Scores, keep, logprobs, score
from calibration.loader import load_original
from calibration.simulate import load_simulated
from vllm_offq.errors import UserError
from vllm_offq.evaluate import cut_windows, prompt_start
from vllm_offq.metrics import Estimate

CHANGE = 1e-6


def main(
    model: Annotated[str, typer.Argument(help="The original.")],
    checkpoint: Annotated[Path, typer.Argument(help="Its OffQ checkpoint.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    windows: Annotated[int, typer.Option(min=2, help="How many to score at most.")] = 4,
    window_length: int = 512,
) -> None:
    try:
        table = measure(model, checkpoint, text, windows, window_length)
    except UserError as error:
        sys.exit(f"benchmarks.last_bits: {error}")
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(describe_machine())


def measure(model: str, checkpoint: Path, text: Path, windows: int, window_length: int) -> Table:
    """Score the checkpoint against the original, and once changed against itself."""
    simulated, tokenizer = load_simulated(checkpoint)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    cut = cut_windows(prompt_start(tokenizer), ids["input_ids"], window_length)
    tokens = torch.tensor(cut[:windows])
    table = Table(title=f"{Path(model).name}: {len(tokens)} windows of {window_length} tokens")
    for column in ("what", "against", "perplexity", "KL", "top-1"):
        table.add_column(column)
    with TemporaryDirectory() as folder:
        references = Path(folder)
        original = load_original(model)
        with original.loaded(""):
            _keep_all(original.model, tokens, references)
        scores = _score(simulated, tokens, references)
        table.add_row("the checkpoint", "the original", *_cells(scores))
        _keep_all(simulated, tokens, references)
        simulated.get_input_embeddings().register_forward_hook(_change)
        scores = _score(simulated, tokens, references)
        table.add_row(f"its embeddings times 1 + {CHANGE:g}", "the checkpoint", *_cells(scores))
    return table


def _change(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * (1 + CHANGE)


def _keep_all(model: Any, tokens: Tensor, references: Path) -> None:
    for number, window in enumerate(track(tokens, "running what is compared with", transient=True)):
        keep(logprobs(model, window), references, number)


def _score(model: Any, tokens: Tensor, references: Path) -> Scores:
    return score(model, tokens, references, lambda all_: track(all_, "scoring", transient=True))


def _cells(scores: Scores) -> tuple[str, str, str]:
    perplexity, kl = Estimate.of(scores.loss).exp(), Estimate.of(scores.kl)
    top1 = Estimate.of(scores.top1)
    return (
        f"{perplexity.value:.2f}",
        f"{kl.value:.4f} ± {kl.standard_error:.4f}",
        f"{top1.value:.3f}",
    )


if __name__ == "__main__":
    typer.run(main)
