"""Rows of `benchmarks.accuracy` that were measured before."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

import calibration
import vllm_offq
from benchmarks.accuracy_recipes import Measured, Workload
from benchmarks.scores import Scores
from calibration.data_documents import file_and_column
from calibration.data_sources import parse_source
from vllm_offq.metrics import Estimate

Row = dict[str, tuple[Scores, float]]
"""Of each mode, scores and bits of a quantized weight."""
Measure = Callable[[list[str]], Iterator[Measured]]
"""Measures a recipe in some modes, one after the other."""


class Cache:
    """A file for each recipe and mode. A row holds for the model, text and settings it is of."""

    def __init__(self, folder: Path, workload: Workload, console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.workload, self.console = folder, workload, console
        self.older = 0
        """Rows that were asked for and had been measured by other code than this."""

    def row(self, name: str, settings: dict[str, Any], modes: list[str], measure: Measure) -> Row:
        """A row of the table. measure: called with the modes that are missing."""
        paths = {mode: self.path(settings, mode) for mode in modes}
        missing = [mode for mode in modes if not paths[mode].is_file()]
        for mode, scores, bits in measure(missing) if missing else ():
            kept = {"scores": asdict(scores), "bits": bits, "code": self.code}
            unfinished = paths[mode].with_suffix(".tmp")  # a run may be killed at any moment
            unfinished.write_text(json.dumps(kept), encoding="utf-8")
            unfinished.replace(paths[mode])
            self.console.print(f"{name}, {mode}: KL {Estimate.of(scores.kl).value:.4f}")
        found = {mode: json.loads(paths[mode].read_text()) for mode in modes}
        self.older += sum(kept["code"] != self.code for kept in found.values())
        return {mode: (Scores(**kept["scores"]), kept["bits"]) for mode, kept in found.items()}

    def path(self, settings: dict[str, Any], mode: str) -> Path:
        """Where a recipe with these settings is kept."""
        workload = self.workload
        texts = [_text_digest(option) for option in settings["calibration"]]
        key = [settings, texts, mode, workload.fingerprint, workload.windows.tolist()]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return self.folder / f"{digest}.json"

    @cached_property
    def code(self) -> str:
        """Changes when a line of the packages that quantize does."""
        folders = [Path(package.__file__ or "").parent for package in (calibration, vllm_offq)]
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()[:16]


def _text_digest(option: str) -> str:
    """Of the file that a value of --calibration names; of a dataset there is only its name."""
    file = file_and_column(parse_source(option).name)
    return _digest(file[0]) if file else ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
