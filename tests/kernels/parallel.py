"""Running kernels on several threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch
from torch import Tensor


@contextmanager
def openmp_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_once(runs: Sequence[Callable[[], Tensor]], times: int = 20) -> list[list[Tensor]]:
    """What each run returns, several times, while the others run in threads of their own."""
    start = Barrier(len(runs))

    def repeat(run: Callable[[], Tensor]) -> list[Tensor]:
        start.wait()
        return [run() for _ in range(times)]

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(repeat, runs))
