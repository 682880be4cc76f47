"""What the time of `offq quantize` goes to, by Python's profiler: functions are few and long."""

import cProfile
import pstats
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from calibration.gptq import descend, factor, gptq
from calibration.instrument import BlockInputs
from calibration.moments import SiteMoments
from calibration.scales import fit_scales

Functions = Sequence[Callable[..., Any]]
PARTS: dict[str, tuple[Functions, Functions]] = {
    "Hessians": ([SiteMoments.add], []),
    "Cholesky and inverse": ([factor], []),
    "GPTQ's rounding": ([gptq], [factor, fit_scales, descend]),
    "refits": ([fit_scales, descend], []),
    "blocks": ([BlockInputs.advance], [SiteMoments.add]),
}
"""Functions whose time counts, and those called by them whose time does not."""


def seconds_by_part(profiler: cProfile.Profile) -> dict[str, float]:
    """Of PARTS, from a profile."""
    profiler.create_stats()
    stats: dict[tuple[str, int, str], tuple[Any, ...]] = vars(pstats.Stats(profiler))["stats"]

    def total(functions: Functions) -> float:
        codes: list[Any] = [function.__code__ for function in functions]
        keys = [(code.co_filename, code.co_firstlineno, code.co_name) for code in codes]
        return sum(stats[key][3] for key in keys if key in stats)

    return {name: total(all_of) - total(but) for name, (all_of, but) in PARTS.items()}


def table(parts: Mapping[str, float], whole: float) -> Table:
    """parts: seconds of each; whole: of the run."""
    found = Table(title="what the time went to, in all stages together")
    found.add_column("part")
    found.add_column("s", justify="right")
    found.add_column("share", justify="right")
    for part, seconds in (*parts.items(), ("all else", whole - sum(parts.values()))):
        found.add_row(part, f"{seconds:.1f}", f"{seconds / whole:.0%}")
    return found
