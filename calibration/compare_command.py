"""`offq compare`: two quantizations side by side."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_offq.errors import UserError

if TYPE_CHECKING:
    from calibration.report.compare import Comparison


def compare(
    a: Annotated[Path, typer.Argument(help="Checkpoint, or its report.json.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The same, to compare with A.", metavar="B")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the pictures of both, side by side.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what differs between two quantizations: settings, sizes, errors."""
    from calibration.report import read_report  # torch and matplotlib are slow to import
    from calibration.report.compare import compare as compare_reports
    from calibration.report.compare_page import compare_page

    before, after = read_report(a), read_report(b)
    comparison = compare_reports(before, after)
    if as_json:
        print(json.dumps(asdict(comparison), indent=2))
    else:
        _print(comparison, f"A {a}", f"B {b}")
    if html is not None:
        page = compare_page(before, after, str(a), str(b))
        try:
            html.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{html} cannot be written: {error.strerror}") from None


def _print(comparison: "Comparison", first: str, second: str) -> None:
    from calibration.report.page import setting_words
    from calibration.report.words import printable

    console = Console()

    def table(title: str, rows: Sequence[tuple[str, ...]], *columns: str) -> None:
        shown = Table(title=title, title_justify="left", min_width=len(title))
        shown.add_column("")
        for column in columns:
            shown.add_column(Text(column), justify="right", overflow="fold")
        for row in rows:  # as Text, because brackets in a model's names would be markup
            shown.add_row(*(Text(printable(cell)) for cell in row))
        console.print(shown)

    console.print(Text(f"{printable(first)}\n{printable(second)}"))
    settings = [
        (key.replace("_", " "), setting_words(left), setting_words(right))
        for key, (left, right) in comparison.settings.items()
    ]
    if settings:
        table("settings that differ", settings, "A", "B")
    else:
        console.print("The settings are the same.")
    quantities = [(quantity.name, *quantity.words) for quantity in comparison.quantities]
    table("numbers", quantities, "A", "B", "change")
    changed = [(error.name, *error.words) for error in comparison.changed_most]
    if changed:
        table("output error, the linears that changed most", changed, "A", "B", "change")
    elif not comparison.unmatched:
        console.print("No linear's output error differs.")
    if comparison.unmatched:
        console.print(f"Linears that only one of the two has: {comparison.unmatched}.")
