"""The page of `offq compare`: the pictures of two reports on the same axes."""

from calibration.report.compare import compare
from calibration.report.page import render
from calibration.report.pictures import change_picture, common_limits, pictures
from calibration.report.schema import Report


def compare_page(before: Report, after: Report, first: str, second: str) -> str:
    """One self-contained page. first, second: what the two are called."""
    limits = common_limits([before, after])
    return render(
        "compare.html.j2",
        first=first,
        second=second,
        reports={"A": before, "B": after},
        comparison=compare(before, after),
        pictures={
            "A": pictures(before, limits, prefix="a-"),
            "B": pictures(after, limits, prefix="b-"),
        },
        change=change_picture(before, after),
    )
