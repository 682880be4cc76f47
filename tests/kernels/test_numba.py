"""What only the numba kernels have: a compiler, threads, an inner loop for each instruction set.

Their results are compared with the reference's where the C++ kernels' are.
"""

from functools import partial
from itertools import product
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from parallel import openmp_threads

from vllm_offq.kernels.numba import compiling, tile


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test compiles is kept for no other."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))


def test_each_index_is_visited_once(own_cache: None) -> None:
    @compiling.kernel
    def visit(seen: compiling.Floats2, first: compiling.Int, last: compiling.Int) -> None:
        for i in range(first, last):
            seen[i] += 1

    for threads, count, parts_per_thread in product((1, 2, 3), (0, 1, 2, 3, 100), (1, 4)):
        seen = np.zeros((100, 3), np.float32)
        with openmp_threads(threads):
            visit(seen, count=count, parts_per_thread=parts_per_thread)
        assert (seen[:count] == 1).all()
        assert not seen[count:].any()


def test_running_out_of_memory_in_a_thread_is_raised(own_cache: None) -> None:
    @compiling.kernel
    def take(size: compiling.Int, first: compiling.Int, last: compiling.Int) -> None:
        np.empty(size)[0] = first

    with openmp_threads(2), pytest.raises(MemoryError, match="no memory for intermediate results"):
        take(1 << 60, count=2)


@pytest.mark.parametrize("blocks", [1, 4, 9])
@pytest.mark.parametrize(
    "isa",
    [
        tile.Generic(),
        *[tile.Avx2()] * ("+avx2" in tile.FEATURES),
        *[tile.Avx512Vnni()] * ("+avx512vnni" in tile.FEATURES),
    ],
    ids=lambda isa: type(isa).__name__,
)
def test_products_are_exact_with_every_instruction_set(
    monkeypatch: pytest.MonkeyPatch, isa: tile.Generic, blocks: int
) -> None:
    """Up to the extremes of bytes and codes."""
    multiply = tile.multiply
    monkeypatch.setattr(tile, "ISA", isa)

    @numba.njit
    def run(rows: np.ndarray, codes: np.ndarray, sums: np.ndarray) -> None:
        multiply(rows, codes, sums, 16)

    rows = torch.randint(-128, 128, (5, 3, 8 * blocks), dtype=torch.int8)
    codes = torch.randint(0, 16, (16, blocks, 2, 4), dtype=torch.uint8)
    rows[0], rows[1], codes[2], codes[3] = -128, 127, 15, 0
    low, high = codes.permute(2, 1, 0, 3)
    sums = torch.zeros(5, 3, 40, dtype=torch.int32)
    run(rows.numpy(), (low | high << 4).flatten().numpy(), sums.numpy())
    assert torch.equal(sums[..., 16:32].long(), rows.long() @ codes.flatten(1).long().T)
    assert not sums[..., :16].any()
    assert not sums[..., 32:].any()


def test_kernels_are_compiled_once_until_their_folder_changes(
    own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(x: compiling.Floats2, first: compiling.Int, last: compiling.Int) -> None:
        x[first:last] = 3

    compiled = []
    monkeypatch.setattr(compiling, "_announce", lambda: compiled.append(True))
    for sources in ("old", "old", "new"):
        monkeypatch.setattr(compiling, "_sources", partial(str, sources))
        x = np.zeros((2, 3), np.float32)
        compiling.kernel(fill)(x, count=2)
        assert (x == 3).all()
    assert len(compiled) == 2
