"""What each part of the method gains, in one table: perplexity, KL divergence, top-1 agreement.

    python -m benchmarks.accuracy MODEL --calibration TEXT --text TEXT

Models are simulated by transformers in float32 (the served ones agree with the simulation, see
tests/serving), and compared token by token with the original on the same windows of the text. KL
is exact, over the whole vocabulary. A row that was measured before with the same arguments is
taken from --cache, so a run may be stopped and repeated.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.machine import describe_machine
from calibration.architectures import find_architecture
from calibration.data import calibration_tokens
from calibration.inspect_command import describe
from calibration.instrument import OffQLinear, instrument, layers_of, set_grids
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.plan import plan
from calibration.progress import no_progress
from calibration.settings import Settings
from calibration.simulate import fused_model, load_simulated
from calibration.survey import survey
from vllm_offq.checkpoint import Checkpoint
from vllm_offq.evaluate import cut_windows, prompt_start
from vllm_offq.format import CheckpointConfig
from vllm_offq.metrics import Estimate

PAPER = Settings(basis="top-1", head_basis="hadamard", clip_ratio=1.0, refits=0)
"""OffQ as arXiv 2606.07116 has it: what each addition is added to."""
RECIPES: dict[str, Settings] = {
    "rtn": Settings(recipe="rtn", refits=0),
    "quarot": Settings(recipe="quarot", refits=0),
    "paper": PAPER,
    "+ basis chosen": replace(PAPER, basis="auto"),
    "+ heads principal": replace(PAPER, head_basis="principal"),
    "+ clip ratio 0.95": replace(PAPER, clip_ratio=None),
    "+ GPTQ refined": replace(PAPER, refits=1),
    "+ GPTQ on quantized inputs": replace(PAPER, gptq_inputs="quantized"),
    "+ GPTQ corrected": replace(PAPER, gptq_inputs="corrected"),
    "+ weight groups": PAPER,  # their size is the model's, see `settings_of`
    "offq": Settings(),
    "offq, weight groups": Settings(),
    "offq, weight groups, refined": Settings(refine=128),
}
PARTS = ("rtn", "quarot", "paper", "offq", "offq, weight groups")
"""Recipes that are measured with one part quantized alone, too."""
MODES = ("W4A4KV4", "W4A4", "W4A8KV4", "W4", "A4", "KV4")


@dataclass(frozen=True)
class Scores:
    """Of each window: mean negative log-likelihood, and against the original KL and top-1."""

    loss: list[float]
    kl: list[float]
    top1: list[float]


@dataclass(frozen=True)
class Workload:
    model: str
    calibration: tuple[str, ...]
    samples: int
    sequence_length: int
    windows: Tensor
    """[W, T] int64."""
    references: list[Tensor]
    """Of each window the original's log-probabilities, [T, vocabulary] float32, on disk."""


def settings_of(name: str, workload: Workload) -> Settings:
    """A recipe's settings for this model and calibration."""
    settings = replace(
        RECIPES[name],
        calibration=workload.calibration,
        samples=workload.samples,
        sequence_length=workload.sequence_length,
        head_bits="16",
    )
    if "weight groups" not in name:
        return settings
    original = load_original(workload.model)
    sites = plan(original.model.config, original.architecture, settings).sites
    group_size = min(site.group_size for site in sites.values())
    return replace(settings, group_size=group_size, weight_group_size=group_size)


@torch.no_grad()
def score(model: PreTrainedModel, workload: Workload, what: str) -> Scores:
    """Run a model over all windows."""
    scores = Scores([], [], [])
    for window, reference in track(
        list(zip(workload.windows, workload.references, strict=True)), what, transient=True
    ):
        found = model(window[None]).logits[0].float().log_softmax(-1)
        scores.loss.append(float(-found[:-1].gather(1, window[1:, None]).mean()))
        # In pieces: three tensors of the vocabulary's width at once are many.
        kl, agreed = 0.0, 0
        for p, q in zip(reference.split(128), found.split(128), strict=True):
            kl += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        scores.kl.append(kl / len(window))
        scores.top1.append(agreed / len(window))
    return scores


def set_mode(model: PreTrainedModel, config: CheckpointConfig, mode: str) -> None:
    """Turn the grids of an instrumented model on and off."""
    architecture = find_architecture(model.config.architectures).of(model.config)
    bits = {"W4A8KV4": 8, "W4": None, "KV4": None}.get(mode, 4)
    sites = {name: site.model_copy(update={"bits": bits}) for name, site in config.sites.items()}
    cache = config.kv_cache if "KV4" in mode else None
    config = config.model_copy(update={"sites": sites, "kv_cache": cache})
    for layer in layers_of(model, architecture):
        set_grids(layer, architecture, config)
        for linear in layer.modules():
            if isinstance(linear, OffQLinear) and bits is None:
                linear.grid = None


def measure(name: str, modes: list[str], workload: Workload) -> Iterator[tuple[str, Scores, float]]:
    """Mode, scores and bits of a quantized weight, for each mode."""
    settings = settings_of(name, workload)
    with_weights = [mode for mode in modes if "W4" in mode]
    if with_weights:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "offq"
            quantize(workload.model, out, settings)
            model, _ = load_simulated(out)
            config = Checkpoint(out).config
            bits = describe(Checkpoint(out))["bits_per_quantized_weight"]
        for mode in with_weights:
            set_mode(model, config, mode)
            yield mode, score(model, workload, f"{name}, {mode}"), bits
    without = [mode for mode in modes if "W4" not in mode]
    if without:
        original = load_original(workload.model)
        config = plan(original.model.config, original.architecture, settings)
        tokens = calibration(workload, settings)
        instrument(original.model, original.architecture)
        found = survey(original, tokens, 1, config, settings, no_progress)
        original.model.config.architectures = [original.architecture.name]
        with fused_model(original, found.rotations) as model:
            for mode in without:
                set_mode(model, config, mode)
                yield mode, score(model, workload, f"{name}, {mode}"), 16


def calibration(workload: Workload, settings: Settings) -> Tensor:
    """The tokens that `quantize` calibrates on."""
    original = load_original(workload.model)
    return calibration_tokens(
        settings.calibration,
        original.model,
        original.tokenizer,
        settings.samples,
        settings.sequence_length,
        settings.seed,
        lambda steps=1: None,
    )


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Workload, Scores]:
    """Cut the text, and run the original over it."""
    original = load_original(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    ids = original.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = cut_windows(prompt_start(original.tokenizer), ids, arguments.window_length)
    windows = torch.tensor(cut[: arguments.windows])
    references: list[Tensor] = []
    losses: list[float] = []
    with torch.no_grad(), original.loaded(""):
        for number, window in enumerate(track(windows, "original", transient=True)):
            found = original.model(window[None]).logits[0].float().log_softmax(-1)
            losses.append(float(-found[:-1].gather(1, window[1:, None]).mean()))
            path = str(folder / f"{number}.bin")
            kept = torch.from_file(path, shared=True, size=found.numel()).view_as(found)
            references.append(kept.copy_(found))
    workload = Workload(
        arguments.model,
        tuple(arguments.calibration),
        arguments.samples,
        arguments.sequence_length,
        windows,
        references,
    )
    return workload, Scores(losses, [0.0] * len(windows), [1.0] * len(windows))


def table(rows: dict[str, dict[str, tuple[Scores, float]]], original: Scores, title: str) -> Table:
    """A row for each recipe and mode; differences are paired, ± is the standard error."""
    result = Table(title=title)
    for column in ("recipe", "mode"):
        result.add_column(column)
    columns = ("bits/weight", "perplexity", "ratio", "KL", "of quarot's", "top-1")
    for column in columns:
        result.add_column(column, justify="right")
    perplexity = Estimate.of(original.loss).exp()
    result.add_row("original", "16 bit", "16", f"{perplexity.value:.2f}", "1", "0", "", "1")
    for mode in MODES:
        result.add_section()
        quarot = rows.get("quarot", {}).get(mode)
        for name, modes in rows.items():
            if mode not in modes:
                continue
            scores, bits = modes[mode]
            pairs = zip(scores.loss, original.loss, strict=True)
            ratio = Estimate.of([loss - base for loss, base in pairs]).exp()
            kl = Estimate.of(scores.kl)
            share = "" if quarot is None else f"{kl.value / Estimate.of(quarot[0].kl).value:.3f}"
            result.add_row(
                name,
                mode,
                f"{bits:.2f}",
                f"{Estimate.of(scores.loss).exp().value:.2f}",
                _cell(ratio),
                _cell(kl),
                share,
                f"{Estimate.of(scores.top1).value:.3f}",
            )
    return result


def _cell(estimate: Estimate) -> str:
    error = estimate.standard_error
    return f"{estimate.value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cache", type=Path, default=Path("build/accuracy"))
    arguments = parser.parse_args()
    start = time.monotonic()
    console = Console(width=120)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        workload, original = prepare(arguments, Path(folder))
        rows: dict[str, dict[str, tuple[Scores, float]]] = {}
        for name in arguments.recipes:
            wanted = [m for m in arguments.modes if m == "W4A4KV4" or name in PARTS]
            paths = {mode: _cache_file(arguments, name, mode, workload) for mode in wanted}
            missing = [mode for mode in wanted if not paths[mode].is_file()]
            for mode, scores, bits in measure(name, missing, workload):
                kept = {"scores": asdict(scores), "bits": bits}
                paths[mode].write_text(json.dumps(kept), encoding="utf-8")
                console.print(f"{name}, {mode}: KL {Estimate.of(scores.kl).value:.4f}")
            found = {mode: json.loads(paths[mode].read_text()) for mode in wanted}
            rows[name] = {m: (Scores(**kept["scores"]), kept["bits"]) for m, kept in found.items()}
    tokens = f"{arguments.samples} x {arguments.sequence_length}"
    title = (
        f"{Path(arguments.model).name}: {len(workload.windows)} windows of "
        f"{arguments.window_length} tokens; calibrated on {tokens} tokens"
    )
    console.print(table(rows, original, title))
    console.print(f"{describe_machine()}; {(time.monotonic() - start) / 60:.0f} minutes")


def _cache_file(arguments: argparse.Namespace, name: str, mode: str, workload: Workload) -> Path:
    key = [asdict(settings_of(name, workload)), mode, arguments.model, workload.windows.tolist()]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(arguments.cache) / f"{digest}.json"


if __name__ == "__main__":
    main()
