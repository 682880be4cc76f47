"""docs/compatibility.md names a test for all that it claims; here these are found."""

import ast
from pathlib import Path

import pytest
from compatibility import PAGE, named_tests, refusals, section

TESTS = Path(__file__).parent
BACKED = ["Where it is computed", "What is asked of it", "How it is served", "Refused before"]


@pytest.mark.parametrize("name", sorted(named_tests()))
def test_the_test_that_is_named_exists(name: str) -> None:
    file, _, function = name.partition("::")
    assert Path(file).name.startswith("test_"), "pytest would not collect it"
    module = ast.parse((TESTS / file).read_text())
    assert function in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("heading", BACKED)
def test_every_row_names_a_test(heading: str) -> None:
    rows = section(heading)
    assert rows
    for row in rows:
        assert "::test_" in row[-1], row


def test_every_refusal_has_options_and_a_sentence() -> None:
    """test_features.py serves with these options and reads these sentences."""
    assert refusals()
    for options, sentence in refusals().values():
        assert options[0].startswith("--")
        assert len(sentence.split()) > 4


def test_every_table_is_looked_at() -> None:
    headings = {line.removeprefix("## ") for line in PAGE.splitlines() if line.startswith("## ")}
    with_table = {heading for heading in headings if section(heading)}
    assert with_table == {*BACKED, "Refused by the server"}
