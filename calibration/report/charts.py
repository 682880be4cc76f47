"""The other pictures of a report. Limits are arguments, so that two reports can share axes."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from calibration.report.heat_map import WIDE, Limits
from calibration.report.schema import Histogram, Histograms, Spectrum
from calibration.report.svg import ACCENT, INK, LINE, MUTED, WORST, draw
from calibration.report.words import percent, whole

STAGE_TITLES = {
    "original": "1. the model's own",
    "rotated": "2. rotated",
    "offset removed": "3. offset removed",
}
EMPTY = 0.7
"""Where a logarithmic axis of counts puts 0."""


def spectrum_chart(spectrum: Spectrum, width: int, name: str, limits: Limits) -> Markup:
    """Energy of each principal direction, falling."""
    shares = spectrum.fractions
    stem = 3.0 if width == WIDE else 1.5

    def paint(figure: Figure) -> Mapping[str, str]:
        axes = figure.subplots()
        tooltips: dict[str, str] = {}
        floor = limits[0]
        for rank, share in enumerate(shares, 1):
            gid = f"direction-{rank}"
            tooltips[gid] = f"direction {rank}: {percent(share)} of the energy"
            height = max(share, floor)
            colour, shape = (WORST, "D") if rank == 1 else (ACCENT, "o")
            axes.vlines(rank, floor, height, color=LINE, linewidth=stem)
            # Not clipped: at the ends of the axis a point is seen whole.
            (point,) = axes.plot(rank, height, shape, color=colour, markersize=stem + 2, gid=gid)
            point.set_clip_on(False)
        axes.set(yscale="log", ylim=limits, xlim=(0, max(len(shares), 4) + 1))
        axes.set(xlabel="principal direction, strongest first", ylabel="share of the energy")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, prune="lower"))
        _log_axis(axes, percent_mark)
        axes.annotate(
            percent(shares[0]),
            (1, max(shares[0], floor)),
            (8, 0),
            textcoords="offset points",
            color=INK,
            va="center",
        )
        return tooltips

    title = f"Spectrum: the first of {len(shares)} directions has {percent(shares[0])}"
    return draw(paint, width, 250 if width == WIDE else 230, name, title, _size(width))


def histogram_chart(
    histograms: Histograms, width: int, name: str, reach: float, highest: float
) -> Markup:
    """One panel a stage, the same axes in all: -reach to reach, counts to `highest`."""
    stages = histograms.stages
    wide = width == WIDE
    # The same width of bins in all panels, or heights would not compare.
    bins = max(map(_bin_width, stages))

    def paint(figure: Figure) -> None:
        shape = (1, len(stages)) if wide else (len(stages), 1)
        panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flat
        for axes, histogram in zip(panels, stages, strict=True):
            edges, counts = _merged(histogram, bins)
            colour = WORST if histogram.stage == "original" else ACCENT
            axes.stairs(
                [max(count, EMPTY) for count in counts],
                edges,
                baseline=EMPTY,
                fill=True,
                color=colour,
            )
            axes.set(yscale="log", xlim=(-reach, reach), ylim=(EMPTY, highest * 2))
            axes.set_title(STAGE_TITLES[histogram.stage])
            text = f"largest {histogram.max_magnitude:.3g}\n{histogram.peak_to_rms:.1f} x rms"
            axes.text(0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", color=MUTED)
            axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
            _log_axis(axes, whole)
        figure.supxlabel("value of an activation", color=MUTED, fontsize=_size(width))
        figure.supylabel("how many", color=MUTED, fontsize=_size(width))

    title = "Histograms of activations: " + ", ".join(
        f"{STAGE_TITLES[histogram.stage]}: largest {histogram.max_magnitude:.3g}"
        for histogram in stages
    )
    height = 250 if wide else 140 * len(stages) + 40
    return draw(paint, width, height, name, title, _size(width))


def range_chart(
    values: Mapping[int, Sequence[float]],
    width: int,
    name: str,
    title: str,
    limits: Limits,
    num_layers: int,
    spoken: Callable[[float], str],
    mark: Callable[[float], str],
    worst: Callable[[Sequence[float]], float],
    words: tuple[str, str],
    marks: Mapping[int, str] | None = None,
) -> Markup:
    """Of each layer the range of its values, their median and the worst.

    spoken, mark: a value in tooltips and on the axis. words: what a value is, what the worst
    is called. marks: texts beside the worst of some layers.
    """
    floor = limits[0]
    size = 5.0 if width == WIDE else 3.6

    def paint(figure: Figure) -> Mapping[str, str]:
        axes = figure.subplots()
        tooltips: dict[str, str] = {}
        for layer, found in values.items():
            gid, middle, extreme = f"layer-{layer}", median(found), worst(found)
            tooltips[gid] = (
                f"layer {layer}: median {spoken(middle)}, {words[1]} {spoken(extreme)}, "
                f"{len(found)} in all"
            )
            low, high, centre, end = (
                max(number, floor) for number in (min(found), max(found), middle, extreme)
            )
            axes.vlines(layer, low, high, color=LINE, linewidth=size, gid=gid)
            axes.plot(layer, centre, "o", color=ACCENT, markersize=size, markeredgewidth=0)
            # Where the worst lies on the floor of the axis it is seen whole.
            axes.plot(
                layer, end, "D", color=WORST, markersize=size, markeredgewidth=0, clip_on=False
            )
            if marks and layer in marks:
                axes.annotate(
                    marks[layer],
                    (layer, end),
                    (0, 5),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                    weight="bold",
                )
        axes.set(yscale="log", ylim=limits, xlim=(-0.8, num_layers - 0.2))
        axes.set(xlabel="layer", ylabel=words[0])
        axes.xaxis.set_major_locator(MaxNLocator(12 if width == WIDE else 6, integer=True))
        _log_axis(axes, mark)
        axes.plot([], [], "D", color=WORST, markersize=size, label=words[1])
        axes.plot([], [], "o", color=ACCENT, markersize=size, label="median")
        axes.plot([], [], color=LINE, linewidth=size, label="range")
        figure.legend(loc="outside upper left", ncols=3, labelcolor=MUTED, handletextpad=0.5)
        return tooltips

    return draw(paint, width, 290 if width == WIDE else 260, name, title, _size(width))


def log_limits(values: Sequence[float], least: float = 1e-9) -> Limits:
    """Room for all positive values on a logarithmic axis, and for a number above them."""
    positive = [value for value in values if value > least] or [least]
    return min(positive) / 1.6, max(positive) * 2


def histogram_limits(*all_histograms: Histograms) -> Limits:
    """Reach and highest count that hold every panel."""
    stages = [stage for histograms in all_histograms for stage in histograms.stages]
    reach = max(1e-30, *(histogram.max_magnitude for histogram in stages))
    counts = [1]
    for histograms in all_histograms:
        width = max(map(_bin_width, histograms.stages))
        counts += [max(_merged(histogram, width)[1]) for histogram in histograms.stages]
    return reach * 1.03, max(counts)


def _bin_width(histogram: Histogram) -> float:
    return histogram.bin_edges[1] - histogram.bin_edges[0]


def _merged(histogram: Histogram, width: float) -> tuple[list[float], list[int]]:
    """Bins as wide as asked for, or a little less where that is no whole number of them."""
    step = max(1, int(width / _bin_width(histogram) + 1e-6))
    counts = histogram.counts
    edges = [*histogram.bin_edges[:-1:step], histogram.bin_edges[-1]]
    return edges, [sum(counts[start : start + step]) for start in range(0, len(counts), step)]


def percent_mark(value: float) -> str:
    """A fraction as an axis says it: without zeros at the end."""
    return f"{value * 100:g}%"


def _log_axis(axes: Axes, spoken: Callable[[float], str]) -> None:
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spoken(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _size(width: int) -> float:
    return 11 if width == WIDE else 9.5
