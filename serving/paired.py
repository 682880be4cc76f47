"""Whether two models differ on the same documents: small samples say little, pairs say more."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanDifference:
    """Second minus first, document by document."""

    mean: float
    standard_error: float | None
    """None for one document."""
    p_value: float | None
    """Two-sided, by the normal distribution; None where there is no standard error above 0."""


@dataclass(frozen=True)
class Disagreement:
    """Of right and wrong answers, by McNemar's exact test: were the losses just bad luck?"""

    only_first: int
    """Documents that only the first model has right."""
    only_second: int
    p_value: float
    """Two-sided: how often a fair coin is at least that uneven."""


def mean_difference(first: Sequence[float], second: Sequence[float]) -> MeanDifference:
    """Of numbers that both models have of every document."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / len(differences)
    error = standard_error(differences)
    if not error:
        return MeanDifference(mean, error, None)
    return MeanDifference(mean, error, math.erfc(abs(mean) / error / math.sqrt(2)))


def disagreement(first: Sequence[float], second: Sequence[float]) -> Disagreement:
    """Of scores that are 0 or 1."""
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    return Disagreement(only_first, only_second, sign_test(only_first, only_second))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of these counts, were both equally likely."""
    tosses, tail, ways = wins + losses, 0, 1
    for heads in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)  # of that many heads and one more
    return min(1.0, 2 * tail / 2**tosses)


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None for a single one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
