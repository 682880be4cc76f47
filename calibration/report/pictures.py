"""All pictures of a report, on axes that several reports may share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from calibration.report.charts import (
    EMPTY,
    histogram_chart,
    histogram_limits,
    log_limits,
    percent_mark,
    range_chart,
    spectrum_chart,
)
from calibration.report.heat_map import DIVERGING, NARROW, WIDE, Limits, heat_map, noise_limits
from calibration.report.schema import Report
from calibration.report.words import by_layer, layer_of, percent, whole, worst_first


@dataclass(frozen=True)
class Picture:
    """The same chart for a desk and for a phone."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class AllLimits:
    """What the axes span. None: no report has that picture."""

    noise: Limits | None
    errors: Limits
    spectrum: Limits | None
    histograms: Limits | None
    experts: Limits
    layers: int


def common_limits(reports: Sequence[Report]) -> AllLimits:
    """Limits that hold every report."""
    decibels = [x for report in reports for row in report.signal_to_noise.values() for x in row]
    shares = [x for report in reports if report.spectrum for x in report.spectrum.fractions]
    histograms = [report.histograms for report in reports if report.histograms]
    experts = [x for r in reports for row in (r.expert_counts or {}).values() for x in row]
    floor, ceiling = log_limits(shares, least=1e-6)
    return AllLimits(
        noise=noise_limits(decibels) if decibels else None,
        errors=log_limits([x for report in reports for x in report.output_error.values()]),
        spectrum=(floor, min(ceiling, 1.0)) if shares else None,
        histograms=histogram_limits(*histograms) if histograms else None,
        experts=(EMPTY, 2.0 * max([1, *experts])),
        layers=max(map(num_layers, reports)),
    )


def pictures(report: Report, limits: AllLimits, prefix: str = "") -> dict[str, Picture | None]:
    """Pictures by name; None where the report has no numbers for one.

    prefix: of the ids, where two reports share a page.
    """
    drawn: dict[str, Picture | None] = {}
    for name in ("noise", "histograms", "spectrum", "errors", "experts"):
        wide = _chart(report, limits, name, WIDE, f"{prefix}{name}-wide")
        narrow = _chart(report, limits, name, NARROW, f"{prefix}{name}-narrow")
        drawn[name] = Picture(wide, narrow) if wide and narrow else None
    return drawn


def change_picture(before: Report, after: Report) -> Picture | None:
    """Signal to noise of the second less the first; None where their layers do not match."""
    rows = {
        site: [new - old for old, new in zip(values, after.signal_to_noise[site], strict=True)]
        for site, values in before.signal_to_noise.items()
        if len(after.signal_to_noise.get(site, [])) == len(values) > 0
    }
    if not rows:
        return None
    reach = max(abs(value) for row in rows.values() for value in row) or 1.0
    wide, narrow = (
        heat_map(
            rows,
            width,
            f"change-{width}",
            "Change of the signal to noise from A to B, a layer a column",
            (-reach, reach),
            ends=("B noisier", "B cleaner"),
            colour_map=DIVERGING,
        )
        for width in (WIDE, NARROW)
    )
    return Picture(wide, narrow)


def num_layers(report: Report) -> int:
    """Layers that the report has numbers of."""
    rows = [len(row) for row in report.signal_to_noise.values()]
    return max([0, *rows, *(layer + 1 for layer in by_layer(report.output_error))])


def experts_by_layer(report: Report) -> dict[int, list[int]]:
    """Tokens that were sent to each expert, by layer's index."""
    counts: Mapping[str, list[int]] = report.expert_counts or {}
    found = {layer_of(name): row for name, row in counts.items() if row}
    return dict(sorted((layer, row) for layer, row in found.items() if layer is not None))


def _chart(
    report: Report, limits: AllLimits, name: str, width: int, identifier: str
) -> Markup | None:
    if name == "noise" and limits.noise and any(report.signal_to_noise.values()):
        title = "Signal to noise of the activations, a layer a column, a place a row"
        return heat_map(report.signal_to_noise, width, identifier, title, limits.noise)
    if name == "histograms" and report.histograms and limits.histograms:
        return histogram_chart(report.histograms, width, identifier, *limits.histograms)
    if name == "spectrum" and report.spectrum and limits.spectrum:
        return spectrum_chart(report.spectrum, width, identifier, limits.spectrum)
    if name == "errors" and (errors := by_layer(report.output_error)):
        return range_chart(
            errors,
            width,
            identifier,
            "Output error of each layer's linears from rounding their weights",
            limits.errors,
            limits.layers,
            percent,
            percent_mark,
            max,
            ("output error", "worst linear"),
            _ranks(report),
        )
    if name == "experts" and (counts := experts_by_layer(report)):
        return range_chart(
            counts,
            width,
            identifier,
            "Calibration tokens that each layer's router sent to its experts",
            limits.experts,
            limits.layers,
            lambda count: f"{count:g}",
            lambda count: whole(0 if count <= EMPTY else count),
            min,
            ("tokens", "rarest expert"),
        )
    return None


def _ranks(report: Report, marked: int = 3) -> dict[int, str]:
    """The ranks of the worst linears, as their table numbers them, where they top their layer."""
    ranks: dict[int, str] = {}
    for rank, (name, _) in enumerate(worst_first(report.output_error), 1):
        layer = layer_of(name)
        if layer is not None:
            ranks.setdefault(layer, str(rank))
        if len(ranks) == marked:
            break
    return ranks
