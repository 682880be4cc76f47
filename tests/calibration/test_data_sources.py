"""Values of --calibration: which part is the weight, and what share of the samples it gives."""

import pytest

from calibration.data_sources import parse_source, shares
from calibration.settings import Settings
from vllm_offq.errors import UserError


@pytest.mark.parametrize(
    ("options", "samples", "expected"),
    [
        (["a"], 5, [5]),
        (["a", "b", "c"], 32, [11, 11, 10]),
        (["a=1", "b=2"], 32, [11, 21]),
        (["a=0.1", "b=0.7", "c=0.2"], 10, [1, 7, 2]),
        (["a=1e3", "b=500"], 3, [2, 1]),
    ],
)
def test_largest_remainder(options: list[str], samples: int, expected: list[int]) -> None:
    assert list(shares(options, samples).values()) == expected


@pytest.mark.parametrize(
    ("option", "name", "weight"),
    [
        ("wiki.txt", "wiki.txt", 1),
        ("wiki.txt=2", "wiki.txt", 2),
        ("data/year=2024/a.txt", "data/year=2024/a.txt", 1),
        ("year=2024.txt", "year=2024.txt", 1),
        ("year=2024.txt=.5", "year=2024.txt", 0.5),
        ("a=b.jsonl:column", "a=b.jsonl:column", 1),
        ("data/year=2024=1", "data/year=2024", 1),
        ("org/name:config:split:column=3", "org/name:config:split:column", 3),
    ],
)
def test_a_weight_is_told_from_a_name(option: str, name: str, weight: float) -> None:
    source = parse_source(option)
    assert (source.name, source.weight) == (name, weight)


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (("a.txt=0",), "weight 0 is not a positive number"),
        (("a.txt=-1",), "weight -1 is not a positive number"),
        (("a.txt=half",), "weight half is not a positive number"),
        (("a.txt=nan",), "weight nan is not a positive number"),
        (("a.txt=",), "not a positive number"),
        (("a.txt", ""), "names no source"),
        ((), "no calibration source"),
        (("a.txt", "a.txt=2"), "a.txt is given twice"),
        (("a.txt", "b.txt=0.001"), "b.txt gets none of the 32 samples"),
        ("a.txt", "tuple of sources"),
    ],
)
def test_bad_settings_are_refused(sources: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Settings(calibration=sources)
