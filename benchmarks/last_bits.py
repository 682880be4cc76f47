"""How far a checkpoint's predictions are from its own, when the last bits of its floats differ.

    python -m benchmarks.last_bits MODEL CHECKPOINT --text TEXT

Which of 16 codes an activation becomes may hang on its last bit, and a step of one code is many
last bits in the layers after. Dtypes, instruction sets and numbers of threads or ranks differ in
last bits; here every embedding of the simulated model is a millionth larger.
"""

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
from vllm_offq.evaluate import cut_windows, prompt_start
from vllm_offq.metrics import Estimate

CHANGE = 1e-6


def main(
    model: Annotated[str, typer.Argument(help="The original.")],
    checkpoint: Annotated[Path, typer.Argument(help="Its OffQ checkpoint.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    windows: int = 4,
    window_length: int = 512,
) -> None:
    simulated, tokenizer = load_simulated(checkpoint)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    cut = cut_windows(prompt_start(tokenizer), ids["input_ids"], window_length)
    tokens = torch.tensor(cut[:windows])
    console = Console(width=100, highlight=False)
    table = Table(title=f"{Path(model).name}: {len(tokens)} windows of {window_length} tokens")
    for column in ("what", "KL of it", "top-1", "perplexity"):
        table.add_column(column)
    with TemporaryDirectory() as folder:
        references = Path(folder)
        original = load_original(model)
        with original.loaded(""):
            _keep_all(original.model, tokens, references)
        _add(
            table, "the original, against it the checkpoint", _score(simulated, tokens, references)
        )
        _keep_all(simulated, tokens, references)
        embedding = simulated.get_input_embeddings()
        embedding.register_forward_hook(_change)
        what = f"the checkpoint, against it itself with embeddings times 1 + {CHANGE:g}"
        _add(table, what, _score(simulated, tokens, references))
    console.print(table)
    console.print(describe_machine())


def _change(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * (1 + CHANGE)


def _keep_all(model: Any, tokens: Tensor, references: Path) -> None:
    for number, window in enumerate(track(tokens, "what is compared with", transient=True)):
        keep(logprobs(model, window), references, number)


def _score(model: Any, tokens: Tensor, references: Path) -> Scores:
    return score(model, tokens, references, lambda all_: track(all_, "scoring", transient=True))


def _add(table: Table, what: str, scores: Scores) -> None:
    kl, perplexity = Estimate.of(scores.kl), Estimate.of(scores.loss).exp()
    top1 = Estimate.of(scores.top1).value
    table.add_row(what, f"{kl.value:.4f}", f"{top1:.3f}", f"{perplexity.value:.2f}")


if __name__ == "__main__":
    typer.run(main)
