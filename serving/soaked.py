"""What a soak found: for people, and for a JSON file."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from serving.gauges import Watch
from serving.memory import Memory
from serving.traffic import KINDS


@dataclass
class Soak:
    """What happened; complete after the load."""

    requests: list[tuple[str, float]] = field(default_factory=list)
    """Kind, and seconds until it was over."""
    near_ties: list[float] = field(default_factory=list)
    """Nats, of fixed prompts whose answers parted there."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seen: Watch | None = None
    memory: Memory | None = None

    def note(self, near_tie: float | None) -> None:
        """Keep it, if there was one."""
        if near_tie is not None:
            self.near_ties.append(near_tie)


def tabulate(found: Soak) -> Table:
    """A line for each kind of request, then what the server and its memory did."""
    table = Table(caption="seconds: of a request, from its start to its end")
    table.add_column("asked for")
    for heading in ("requests", "median s", "longest s"):
        table.add_column(heading, justify="right")
    for name in KINDS:
        seconds = [taken for kind, taken in found.requests if kind == name]
        if seconds:
            times = (f"{median(seconds):.2f}", f"{max(seconds):.2f}")
            table.add_row(name, str(len(seconds)), *times)
    table.add_section()
    table.add_row("all", f"{len(found.requests)}", "", "")
    table.add_row("failures", str(len(found.failures)), "", "")
    table.add_row("near ties", str(len(found.near_ties)), "", "")
    if found.seen is not None:
        table.add_row("preemptions", f"{found.seen.preemptions:.0f}", "", "")
        table.add_row("KV cache, peak", f"{found.seen.kv_cache_peak:.0%}", "", "")
    return table


def describe(memory: Memory | None) -> str:
    """One line about the server's memory."""
    if memory is None:
        return "memory: not watched; --pid names the server's process"
    first, last = memory.samples[0][1], memory.samples[-1][1]
    return (
        f"memory of {memory.processes} processes: {first:,.0f} MiB at first, {last:,.0f} at the "
        f"end; in the second half {memory.growth:+.1f} MiB, {memory.slope:+.1f} an hour"
    )


def summarize(found: Soak) -> dict[str, Any]:
    """For the JSON file."""
    memory = found.memory
    return {
        "seconds": round(found.seconds, 1),
        "requests": dict(Counter(kind for kind, _ in found.requests)),
        "failures": found.failures,
        "near_ties": found.near_ties,
        "seen": None if found.seen is None else asdict(found.seen),
        "memory": None
        if memory is None
        else {
            "processes": memory.processes,
            "slope_mib_per_hour": memory.slope,
            "growth_mib": memory.growth,
            "samples": memory.samples,
        },
    }
