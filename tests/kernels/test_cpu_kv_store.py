"""The CPU's 4-bit pages against the reference's: C++ for every instruction set, and numba."""

from functools import partial
from types import ModuleType

import torch
from page_contract import PagesOfTheReference, random_slots, stored
from paged import as_reference
from parallel import at_once, openmp_threads


class TestPages(PagesOfTheReference):
    as_reference = staticmethod(as_reference)


def test_threads_change_nothing(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 70, 4, 64).unbind(0)
    runs = [
        partial(stored, kernels, key, value, random_slots(70, block_size), block_size, 64)
        for block_size in (16, 32)
    ]
    alone = [run() for run in runs]
    with openmp_threads(2):
        for run, pages in zip(runs, alone, strict=True):
            assert torch.equal(run(), pages)
    for results, pages in zip(at_once(runs), alone, strict=True):
        assert all(torch.equal(result, pages) for result in results)
