"""report.html: one file that needs nothing else, for a reader who did not write this program."""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from pydantic import JsonValue

from calibration.report import summary
from calibration.report.pictures import common_limits, experts_by_layer, pictures
from calibration.report.schema import Report
from calibration.report.words import (
    duration,
    layer_of,
    percent,
    printable,
    site_words,
    size,
    worst_first,
)

WORST_NAMED = 10


def report_page(report: Report) -> str:
    """The page of one report. The same report gives the same text."""
    return render(
        "report.html.j2",
        report=report,
        summary=summary.sentences(report),
        tiles=summary.tiles(report),
        pictures=pictures(report, common_limits([report])),
        worst=worst_first(report.output_error)[:WORST_NAMED],
        noise_table=_noise_table(report),
        error_table=_error_table(report),
        experts=experts_by_layer(report),
    )


def render(template: str, **values: Any) -> str:
    """A template of this package. Every name is escaped: a model's files are not to be trusted."""
    environment = Environment(
        loader=PackageLoader("calibration.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "dotted": dotted,
        "percent": percent,
        "setting": setting_words,
        "site": site_words,
    }
    environment.globals |= {"duration": duration, "size": size}
    return environment.get_template(template).render(**values)


def dotted(name: str) -> Markup:
    """A full name that may break after its dots."""
    return Markup(".<wbr>").join(printable(name).split("."))


def setting_words(value: JsonValue) -> str:
    """A setting's value as a reader expects it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _noise_table(report: Report) -> list[list[str]]:
    """A row a layer, a column a site."""
    rows = report.signal_to_noise.values()
    return [
        [f"{values[layer]:.1f}" if layer < len(values) else "" for values in rows]
        for layer in range(max(map(len, rows), default=0))
    ]


def _error_table(report: Report) -> tuple[Sequence[str], dict[int, list[str]]]:
    """Kinds of linears, and by layer the worst error of each kind (there may be many experts)."""
    worst: dict[int, dict[str, float]] = {}
    kinds: dict[str, None] = {}
    for name, error in report.output_error.items():
        layer, kind = layer_of(name), name.rpartition(".")[2]
        if layer is not None:
            kinds[kind] = None
            row = worst.setdefault(layer, {})
            row[kind] = max(error, row.get(kind, 0.0))
    table = {
        layer: [percent(row[kind]) if kind in row else "" for kind in kinds]
        for layer, row in sorted(worst.items())
    }
    return list(kinds), table
