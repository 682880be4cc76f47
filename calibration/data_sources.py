"""Names of calibration data: SOURCE[=WEIGHT], the built-in sources, each source's samples."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vllm_offq.errors import UserError

SELF = "self"
"""Name of the source that needs no data: the model samples its own text."""

# Licences: CC BY-SA 3.0, ODC-BY 1.0 and MIT. WikiText by whole articles: the original's rows are
# lines, which would be shuffled.
BUILT_IN = {
    "wikitext": "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:train:page",
    "c4": "allenai/c4:en:train:text",
    "ultrachat": "HuggingFaceH4/ultrachat_200k:default:train_sft:messages",
}
"""Short names for NAME:CONFIG:SPLIT:COLUMN of the datasets library, which fetches them."""

PATH_GOES_ON = re.compile(r"[/:]|\.\D")
"""Found behind a = that belongs to a path: a=1/b.txt, a=1.txt, a=b.txt:column."""


@dataclass(frozen=True)
class Source:
    """One value of --calibration."""

    name: str
    """"self", a key of BUILT_IN, FILE[:COLUMN] or NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    weight: Fraction = Fraction(1)
    """Its share of the samples, relative to the other sources'."""


def parse_source(option: str) -> Source:
    """SOURCE or SOURCE=WEIGHT.

    Names of datasets hold no =, and what looks like the rest of a path or a column is no weight,
    so only a source that itself ends in = and a word needs its weight written.
    Raises: UserError if the weight is not a positive number or the source is empty.
    """
    name, equals, value = option.rpartition("=")
    if not equals or PATH_GOES_ON.search(value):
        name, value = option, "1"
    try:
        weight = Fraction(value)
    except ValueError:
        weight = Fraction(0)
    if weight <= 0:
        raise UserError(
            f"--calibration {option}: the weight {value} is not a positive number; give "
            "SOURCE=NUMBER, and =1 behind a source that holds = itself"
        )
    if not name:
        raise UserError(f"--calibration {option!r} names no source")
    return Source(name, weight)


def shares(options: Sequence[str], samples: int) -> dict[str, int]:
    """Samples of each source by its weight, rounded by largest remainder, in the order given.

    options: values of --calibration.
    Raises: UserError for a bad weight, a source given twice or one that gets no sample.
    """
    if not options:
        raise UserError(f"no calibration source is given; --calibration {SELF} needs no data")
    sources = [parse_source(option) for option in options]
    total = sum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    result: dict[str, int] = {}
    for source, count in zip(sources, counts, strict=True):
        if source.name in result:
            raise UserError(f"calibration source {source.name} is given twice; give it a weight")
        if count == 0:
            raise UserError(
                f"calibration source {source.name} gets none of the {samples} samples; raise "
                "--samples or its weight"
            )
        result[source.name] = count
    return result
