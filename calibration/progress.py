"""How long work reports that it goes on: a bar with rate and time left, or nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)
from rich.text import Text


class Progress(Protocol):
    """Opens a stage of `total` steps; the stage's value is called once a step (or with many)."""

    def __call__(
        self, description: str, total: int, unit: str = ""
    ) -> AbstractContextManager[Callable[..., None]]: ...


@contextmanager
def no_progress(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
    """Reports nothing: for the Python API and tests."""
    yield lambda steps=1: None


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed or task.total == 1:
            return Text("")
        unit = task.fields["unit"] or "token"
        if task.speed >= 1:
            return Text(f"{task.speed:.0f} {unit}s/s")
        return Text(f"{1 / task.speed:.1f} s/{unit}")


def rich_progress(console: Console) -> Progress:
    """Bars on a terminal; elsewhere the finished line of each stage."""

    @contextmanager
    def stage(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
        columns = [
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=16),  # all columns fit a terminal of 80
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        ]
        with RichProgress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, unit=unit)
            yield lambda steps=1: bar.advance(task, steps)
            bar.update(task, completed=total)

    return stage
