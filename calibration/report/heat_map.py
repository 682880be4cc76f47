"""Layers along x, places along y, numbers in the cells."""

import math
from collections.abc import Mapping, Sequence
from statistics import quantiles

from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calibration.report.svg import INK, MUTED, PAPER, draw
from calibration.report.words import site_words

SEQUENTIAL = "cividis"
"""Looks the same with every kind of colour blindness; its lightness rises all the way."""
DIVERGING = "PuOr"
WIDE, NARROW = 920, 340
"""Of every chart there is one for a desk and one for a phone, so that the type stays legible."""

Limits = tuple[float, float]


def noise_limits(decibels: Sequence[float]) -> Limits:
    """From the noisiest to the cleanest, never the same.

    A place far cleaner than the rest (beyond Tukey's fence) would leave them all in one colour, so
    the scale ends at the fence; the noisiest places are what is looked for and always on it.
    """
    low, high = min(decibels), max(decibels)
    if len(decibels) > 1:
        lower, _, upper = quantiles(decibels, n=4)
        high = min(high, upper + 1.5 * (upper - lower))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def heat_map(
    rows: Mapping[str, Sequence[float]],
    width: int,
    name: str,
    title: str,
    limits: Limits,
    unit: str = "dB",
    ends: tuple[str, str] = ("noisier", "cleaner"),
    colour_map: str = SEQUENTIAL,
) -> Markup:
    """Values of each row, a layer a column, wrapped into as many blocks as stay readable."""
    wide = width == WIDE
    label_width, least, cell_height, size = (112, 26.5, 24, 9) if wide else (62, 17.6, 21, 8.5)
    layers = max(map(len, rows.values()))
    blocks = math.ceil(layers / ((width - label_width) // least))
    columns = math.ceil(layers / blocks)
    cell_width = min((width - label_width) / columns, 2.0 * least)
    head, gap, legend = 16, 12, 40
    bar = (width - label_width) * (0.4 if wide else 1)
    block_height = head + cell_height * len(rows) + gap
    height = blocks * block_height + legend
    colours, norm = colormaps[colour_map], Normalize(*limits)

    def paint(figure: Figure) -> Mapping[str, str]:
        figure.set_layout_engine("none")  # places are in pixels here
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        tooltips: dict[str, str] = {}
        for layer in range(layers):
            block, column = divmod(layer, columns)
            x, y = label_width + column * cell_width, block * block_height
            axes.text(
                x + cell_width / 2, y + 11, str(layer), size=size - 1, color=MUTED, ha="center"
            )
            for row, (site, values) in enumerate(rows.items()):
                if layer >= len(values):
                    continue
                value, top = values[layer], y + head + row * cell_height
                colour = to_hex(colours(norm(value)))
                gid = f"cell-{row}-{layer}"
                tooltips[gid] = f"layer {layer}, {site_words(site)}: {value:.2f} {unit}"
                corner, size_of_cell = (x, top), (cell_width, cell_height)
                cell = Rectangle(corner, *size_of_cell, facecolor=colour, edgecolor=PAPER, gid=gid)
                axes.add_patch(cell)
                axes.text(
                    x + cell_width / 2,
                    top + cell_height / 2,
                    _number(value, 1 if wide else 0),
                    size=size,
                    color=_contrast(colour),
                    ha="center",
                    va="center_baseline",
                )
        for block in range(blocks):
            axes.text(0, block * block_height + 11, "layer", size=size - 1, color=MUTED)
            for row, site in enumerate(rows):
                middle = block * block_height + head + (row + 0.5) * cell_height
                label = site_words(site) if wide else site_words(site).replace(" ", "\n", 1)
                axes.text(
                    0, middle, label, size=size + 1 if wide else size - 0.5, color=INK, va="center"
                )
        goes_on = max(max(values, default=-math.inf) for values in rows.values()) > limits[1]
        last = (" and more, " if goes_on else ", ") + ends[1]
        _legend(axes, colours, limits, unit, (f", {ends[0]}", last), label_width, height - 26, bar)
        return tooltips

    return draw(paint, width, height, name, title)


def _legend(
    axes: Axes,
    colours: Colormap,
    limits: Limits,
    unit: str,
    ends: tuple[str, str],
    x: float,
    y: float,
    width: float,
) -> None:
    steps = 48
    for step in range(steps):
        colour = to_hex(colours((step + 0.5) / steps))
        left = x + width * step / steps
        axes.add_patch(Rectangle((left, y), width / steps + 0.4, 9, facecolor=colour))
    low, high = (_number(limit, 1) for limit in limits)
    for place, alignment, number, end in (
        (x, "left", low, ends[0]),
        (x + width, "right", high, ends[1]),
    ):
        axes.text(
            place,
            y + 21,
            f"{number} {unit}{end}",
            size=8.5,
            color=MUTED,
            ha=alignment,
        )


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text.replace("-", "\u2212")


def _contrast(colour: str) -> str:
    """Black or white, whichever stands out more by WCAG's contrast."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.179 else "#000000"
