"""Matplotlib figures as SVG that lives inside a page: its fonts, its colours, its tooltips."""

import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from calibration.report.words import printable

# Colours that no colour map has stand for the page's, which differ by day and by night.
INK, MUTED, LINE, ACCENT, WORST, PAPER = (f"#{i:02x}{i:02x}{i:02x}" for i in range(1, 7))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    WORST: "var(--worst)",
    PAPER: "var(--paper)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "offq",
    "text.parse_math": False,  # names are not formulas
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same widths everywhere
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def draw(
    paint: Callable[[Figure], Mapping[str, str] | None],
    width: float,
    height: float,
    name: str,
    title: str,
    font_size: float = 11,
) -> Markup:
    """Let `paint` fill a figure and return it as an `<svg>` element.

    paint: may return tooltips by gid of the artist. width, height: CSS pixels at scale 1.
    name: prefix of ids, unique in the page. title: what a screen reader says.
    """
    buffer = BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style would change the bytes
        texts = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
        ticks = ("xtick.labelsize", "ytick.labelsize")
        style: Any = _STYLE | dict.fromkeys(texts, font_size) | dict.fromkeys(ticks, font_size - 1)
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        tooltips = paint(figure) or {}
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for unwanted in ("metadata", "defs"):  # the day; and what styles every element of the page
        for child in root.findall(_SVG + unwanted):
            if unwanted == "metadata" or child.find(_SVG + "style") is not None:
                root.remove(child)
    _adopt(root, name, tooltips)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": printable(title),
        "class": "chart",
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adopt(root: ElementTree.Element, name: str, tooltips: Mapping[str, str]) -> None:
    """Plain names for HTML, the page's colours, ids that no other figure has."""
    used = set(re.findall(r"#([\w-]+)\)?", " ".join(_values(root))))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        link = element.attrib.pop(_LINK, None)
        if link is not None:
            element.set("href", link.replace("#", f"#{name}-"))
        for key, value in element.attrib.items():
            own = value.replace("url(#", f"url(#{name}-")
            for colour, variable in _VARIABLES.items():
                own = own.replace(colour, variable)
            element.set(key, own)
        identifier = element.attrib.pop("id", "")
        if identifier in used:
            element.set("id", f"{name}-{identifier}")
        if identifier in tooltips:
            tooltip = ElementTree.Element("title")
            tooltip.text = printable(tooltips[identifier])
            element.insert(0, tooltip)


def _values(root: ElementTree.Element) -> list[str]:
    return [value for element in root.iter() for value in element.attrib.values()]
