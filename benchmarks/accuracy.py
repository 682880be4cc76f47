"""What each part of the method gains, in one table: perplexity, KL divergence, top-1 agreement.

    python -m benchmarks.accuracy MODEL --calibration TEXT --text TEXT

Models are simulated by transformers in float32 (the served ones agree with the simulation, see
tests/serving), and compared token by token with the original on the same windows of the text. KL
is exact, over the whole vocabulary. A row that was measured before with the same arguments is
taken from --cache, so a run may be stopped and repeated.

Others' work stands in the table too where --peer-python names a Python that has it, see
benchmarks/peer.py: `python scripts/setup_peer.py` makes one.
"""

import argparse
import shutil
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import peer
from benchmarks.accuracy_cache import Cache, Measure, Row
from benchmarks.accuracy_recipes import (
    MODES,
    PARTS,
    RECIPES,
    Workload,
    measure,
    refusal,
    settings_of,
)
from benchmarks.accuracy_table import table
from benchmarks.machine import describe_machine
from benchmarks.scores import Scores, keep, logprobs, loss
from calibration.instrument import instrument
from calibration.loader import load_original
from vllm_offq.errors import UserError
from vllm_offq.evaluate import cut_windows, prompt_start


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Workload, Scores]:
    """Cut the text, and run the original over it. arguments: of `workload_parser`."""
    if arguments.windows < 1:
        raise UserError("--windows must be at least 1")
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {arguments.text} cannot be read: {error}") from None
    original = load_original(arguments.model)
    instrument(original.model, original.architecture)  # its attention knows Gemma 2's soft cap
    ids = original.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = cut_windows(prompt_start(original.tokenizer), ids, arguments.window_length)
    windows = torch.tensor(cut[: arguments.windows])
    refuse_small_disk(windows.numel() * original.model.config.vocab_size * 4, folder)
    losses: list[float] = []
    with torch.no_grad(), original.loaded(""):
        for number, window in enumerate(track(windows, "original", transient=True)):
            found = logprobs(original.model, window)
            losses.append(loss(found, window))
            keep(found, folder, number)
    workload = Workload(
        arguments.model,
        tuple(arguments.calibration),
        arguments.samples,
        arguments.sequence_length,
        windows,
        folder,
        original.weights.fingerprint(),
    )
    return workload, Scores(losses, [0.0] * len(windows), [1.0] * len(windows))


def refuse_small_disk(num_bytes: int, folder: Path) -> None:
    """Raises: UserError if the original's predictions have no room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"what the original predicts takes {num_bytes / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB are free at {folder.parent}; give fewer --windows, or set TMPDIR "
            "to a folder with more room"
        )


def main() -> None:
    """The command line."""
    arguments = parse()
    try:
        run(arguments, Console(width=160))
    except UserError as error:
        sys.exit(f"benchmarks.accuracy: {error}")


def workload_parser(description: str) -> argparse.ArgumentParser:
    """Of the arguments that `prepare` takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-length", type=int, default=1024)
    return parser


def parse() -> argparse.Namespace:
    parser = workload_parser((__doc__ or "").splitlines()[0])
    names = [*RECIPES, *peer.TRANSFORMS]
    parser.add_argument("--recipes", nargs="+", choices=names, help="default: all that can be run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--sources",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="calibration texts to set side by side: a row of the recipe offq on each",
    )
    parser.add_argument("--cache", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--peer-python", type=Path, help="a Python that has llm-compressor")
    arguments = parser.parse_args()
    arguments.recipes = arguments.recipes or (names if arguments.peer_python else list(RECIPES))
    if arguments.peer_python is None and not set(arguments.recipes) <= set(RECIPES):
        parser.error("llm-compressor's recipes need --peer-python")
    return arguments


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure what is not in the cache, and print the table."""
    start = time.monotonic()
    if arguments.peer_python:
        peer.version(arguments.peer_python)  # refuses before anything is run
    rows: dict[str, Row] = {}
    with TemporaryDirectory() as folder:
        workload, original = prepare(arguments, Path(folder))
        cache = Cache(arguments.cache, workload, console)
        for name in applicable(arguments.recipes, workload, console):
            settings, modes, run_recipe = recipe(name, arguments, workload)
            wanted = [mode for mode in arguments.modes if mode in modes]
            rows[name] = cache.row(name, settings, wanted, run_recipe)
        for source in arguments.sources:
            name = f"offq on {source}"
            elsewhere = replace(workload, calibration=(source,))
            settings, modes, run_recipe = recipe("offq", arguments, elsewhere)
            rows[name] = cache.row(name, settings, list(modes[:1]), run_recipe)
    tokens = f"{arguments.samples} x {arguments.sequence_length}"
    texts = ", ".join(Path(source).name for source in arguments.calibration)
    title = (
        f"{Path(arguments.model).name}: {len(workload.windows)} windows of "
        f"{arguments.window_length} tokens of {arguments.text.name}; "
        f"calibrated on {tokens} tokens of {texts}"
    )
    console.print(table(rows, MODES, original, title))
    console.print(f"{describe_machine()}; {(time.monotonic() - start) / 60:.0f} minutes")
    if cache.older:
        console.print(
            f"{cache.older} rows are from --cache, measured by other versions of the code"
        )


def applicable(names: list[str], workload: Workload, console: Console) -> list[str]:
    """Of recipes, those that suit the model. Prints why another one does not."""
    suitable = []
    for name in names:
        refuses = peer.refusal if name in peer.TRANSFORMS else refusal
        if reason := refuses(name, workload.kind[1]):
            console.print(f"no row of {name}: {reason}")
        else:
            suitable.append(name)
    return suitable


def recipe(
    name: str, arguments: argparse.Namespace, workload: Workload
) -> tuple[dict[str, Any], tuple[str, ...], Measure]:
    """Settings of a row, the modes it is measured in, and what measures it."""
    if name in RECIPES:
        modes = MODES if name in PARTS else MODES[:1]
        return asdict(settings_of(name, workload)), modes, partial(measure, name, workload)
    python, log = arguments.peer_python, arguments.cache / "peer.log"
    settings = peer.settings_of(name, peer.version(python), workload)
    return settings, peer.MODES, partial(peer.measure, python, log, settings, workload)


if __name__ == "__main__":
    main()
