"""How much memory a process and its children hold, watched for as long as a `with` block lasts."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from serving.beside import beside
from vllm_offq.errors import UserError

SAMPLES = 400
"""Of a whole watch, but no more than one a second."""


@dataclass
class Memory:
    """Samples: seconds since the start, and resident MiB; what processes share counts in each."""

    processes: int
    """At the start: the one that was named and all below it."""
    samples: list[tuple[float, float]] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """MiB an hour, by least squares over the second half: in the first, buffers still grow.

        Of a watch too short for two samples there: 0.
        """
        half = self._second_half
        if len(half) < 2:
            return 0.0
        return 3600 * statistics.linear_regression(*zip(*half, strict=True)).slope

    @property
    def growth(self) -> float:
        """MiB by which the fitted line rises over the second half."""
        half = self._second_half
        return self.slope * (half[-1][0] - half[0][0]) / 3600

    @property
    def _second_half(self) -> list[tuple[float, float]]:
        return self.samples[len(self.samples) // 2 :]


@contextmanager
def watch_memory(pid: int, seconds: float) -> Iterator[Memory]:
    """Sample a process while the block runs, which is expected to take this many seconds.

    Raises: UserError if there is no such process.
    """
    try:
        process = psutil.Process(pid)
        found = Memory(1 + len(process.children(recursive=True)))
    except psutil.NoSuchProcess as error:
        raise UserError(f"there is no process {pid}") from error
    began = time.monotonic()

    def look() -> None:
        with suppress(psutil.NoSuchProcess):  # it ended: its clients have more to say of that
            found.samples.append((time.monotonic() - began, resident(process)))

    with beside(look, max(1.0, seconds / SAMPLES)):
        yield found


def resident(process: psutil.Process) -> float:
    """MiB of a process and all below it."""
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total / 2**20
