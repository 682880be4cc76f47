"""What a run learns while it goes, from which its report is made at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import vllm_offq
from calibration.progress import Progress
from calibration.report import BasisCandidate, Histograms, Refinement, Report, Spectrum, size_kind
from calibration.settings import Settings


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Record:
    """Parts of a report; plain data, so that it is kept with an interrupted run."""

    started: str = field(default_factory=_now)
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    signal_to_noise: dict[str, list[float]] = field(default_factory=dict)
    """Of each site's quantized input, in dB, a value a layer."""
    output_error: dict[str, float] = field(default_factory=dict)
    """Of each linear: squared error of its output from rounding weights, relative."""
    spectrum: dict[str, Any] | None = None
    histograms: dict[str, Any] | None = None
    basis_candidates: list[dict[str, Any]] | None = None
    clip_ratios: dict[str, float] | None = None
    """Of each site, where they were to be chosen."""
    expert_counts: dict[str, list[int]] | None = None
    refinement: dict[str, Any] | None = None

    def timed(self, progress: Progress) -> Progress:
        """The same progress, whose stages add to seconds_by_stage."""

        @contextmanager
        def stage(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
            start, before = time.monotonic(), self.seconds_by_stage.get(description, 0.0)
            with progress(description, total, unit) as advance:

                def tick(steps: int = 1) -> None:
                    self.seconds_by_stage[description] = before + time.monotonic() - start
                    advance(steps)

                yield tick
            self.seconds_by_stage[description] = before + time.monotonic() - start

        return stage

    def report(
        self,
        model: str,
        architecture: str,
        settings: Settings,
        original_bytes: int,
        tensor_bytes: dict[str, int],
    ) -> Report:
        """The report of a finished run. tensor_bytes: of the checkpoint's tensors by name."""
        sizes: dict[str, int] = {}
        for name, size in tensor_bytes.items():
            sizes[size_kind(name)] = sizes.get(size_kind(name), 0) + size
        seconds = {key: round(value, 3) for key, value in self.seconds_by_stage.items()}
        return Report(
            model=model,
            architecture=architecture,
            produced_by=f"vllm-offq {vllm_offq.__version__}",
            settings=asdict(settings) | {"calibration": list(settings.calibration)},
            started=datetime.fromisoformat(self.started),
            seconds=sum(seconds.values()),
            seconds_by_stage=seconds,
            original_bytes=original_bytes,
            checkpoint_bytes=sum(tensor_bytes.values()),
            sizes=sizes,  # type: ignore[arg-type]
            signal_to_noise=self.signal_to_noise,
            output_error=self.output_error,
            expert_counts=self.expert_counts,
            spectrum=None if self.spectrum is None else Spectrum(**self.spectrum),
            histograms=None
            if self.histograms is None
            else Histograms.model_validate(self.histograms),
            basis_candidates=None
            if self.basis_candidates is None
            else [BasisCandidate(**candidate) for candidate in self.basis_candidates],
            clip_ratios=self.clip_ratios,
            refinement=None if self.refinement is None else Refinement(**self.refinement),
        )
