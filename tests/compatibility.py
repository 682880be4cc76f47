"""docs/compatibility.md, as its tests read it."""

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()


def section(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, cell by cell, without its head."""
    text = re.split(r"^## ", PAGE.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def refusals() -> dict[str, tuple[list[str], str]]:
    """By what is refused: the options of `vllm serve` and the sentence that it ends with."""
    return {
        feature: (shlex.split(options.strip("`")), sentence)
        for feature, options, sentence, *_ in section("Refused by the server")
    }


def named_tests() -> set[str]:
    """All of the page, `folder/test_file.py::test_name` below tests/."""
    return set(re.findall(r"`([\w/]+\.py::\w+)`", PAGE))
