"""What differs between two reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pydantic import JsonValue

from calibration.report.schema import Report
from calibration.report.words import duration, percent, site_words, size

CHANGED_NAMED = 10
ABSENT = "-"
"""In the place of what one of the reports does not have."""


@dataclass(frozen=True)
class Quantity:
    """One number of both reports; None where a report does not have it."""

    name: str
    unit: str
    """bytes, seconds, dB, or fraction."""
    before: float | None
    after: float | None

    @property
    def words(self) -> tuple[str, str, str]:
        """Of A, of B, and the change from A to B."""
        return self._word(self.before), self._word(self.after), self._change()

    def _word(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.unit == "bytes":
            return size(value)
        if self.unit == "seconds":
            return duration(value)
        return percent(value) if self.unit == "fraction" else f"{value:.1f} dB"

    def _change(self) -> str:
        if self.before is None or self.after is None:
            return ""
        if self.before == self.after:
            return "="
        if self.unit == "dB":
            return f"{self.after - self.before:+.1f} dB"
        return f"{self.after / self.before - 1:+.1%}" if self.before else ""


@dataclass(frozen=True)
class Comparison:
    """Two reports, side by side."""

    settings: dict[str, tuple[JsonValue, JsonValue]]
    """Those that differ, the model and what made it included."""
    quantities: list[Quantity]
    changed_most: list[Quantity]
    """Output errors of the linears whose error changed most, most first."""
    unmatched: int
    """Linears that only one of the reports has."""


def compare(before: Report, after: Report) -> Comparison:
    """What differs from the first report (A) to the second (B)."""
    shared = before.output_error.keys() & after.output_error.keys()
    errors = [
        Quantity(name, "fraction", before.output_error[name], after.output_error[name])
        for name in shared
    ]
    errors.sort(key=lambda error: (-abs((error.after or 0) - (error.before or 0)), error.name))
    return Comparison(
        settings=_settings(before, after),
        quantities=_quantities(before, after),
        changed_most=[error for error in errors if error.before != error.after][:CHANGED_NAMED],
        unmatched=len(before.output_error.keys() ^ after.output_error.keys()),
    )


def _settings(before: Report, after: Report) -> dict[str, tuple[JsonValue, JsonValue]]:
    first, second = (
        {key: getattr(report, key) for key in ("model", "architecture", "produced_by")}
        | report.settings
        | {f"clip_ratio, {site}": ratio for site, ratio in (report.clip_ratios or {}).items()}
        | {"basis used": _basis(report)}
        for report in (before, after)
    )
    keys = [*first, *(key for key in second if key not in first)]
    values = {key: (first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _basis(report: Report) -> JsonValue:
    """Of the residual stream, if it has one: the one that was chosen, else what was given."""
    if report.spectrum is None:
        return ABSENT
    chosen = (candidate.name for candidate in report.basis_candidates or [] if candidate.chosen)
    return next(chosen, report.settings.get("basis", ABSENT))


def _quantities(before: Report, after: Report) -> list[Quantity]:
    both = (before, after)
    found = [
        Quantity("checkpoint", "bytes", before.checkpoint_bytes, after.checkpoint_bytes),
        Quantity("original", "bytes", before.original_bytes, after.original_bytes),
    ]
    kinds = dict.fromkeys([*before.sizes, *after.sizes])
    found += [Quantity(kind, "bytes", *(r.sizes.get(kind) for r in both)) for kind in kinds]
    found.append(Quantity("time", "seconds", before.seconds, after.seconds))
    for site in dict.fromkeys([*before.signal_to_noise, *after.signal_to_noise]):
        rows = [report.signal_to_noise.get(site) for report in both]
        name = f"signal to noise, {site_words(site)}"
        found.append(Quantity(f"{name}, mean", "dB", *map(_mean, rows)))
        found.append(Quantity(f"{name}, worst", "dB", *(min(r) if r else None for r in rows)))
    errors = [list(report.output_error.values()) for report in both]
    found.append(Quantity("output error, mean", "fraction", *map(_mean, errors)))
    found.append(
        Quantity("output error, worst", "fraction", *(max(r) if r else None for r in errors))
    )
    return found


def _mean(values: Sequence[float] | None) -> float | None:
    return fmean(values) if values else None
