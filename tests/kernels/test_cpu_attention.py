"""The CPU's attention over 4-bit pages against the reference: C++ for every instruction set,
and numba."""

from dataclasses import dataclass
from functools import partial
from math import inf, nan
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, as_reference, attend, empty_cache
from parallel import at_once, openmp_threads
from torch import Tensor

from vllm_offq.kernels import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = 0xFF  # a NaN where it is read as a scale or an offset


def largest_integer(dtype: torch.dtype) -> int:
    """Of the largest query or probability: it has 3 bytes in float32, otherwise 2."""
    return 127 << (16 if dtype == torch.float32 else 8)


@dataclass
class Scene:
    """Requests, their pages, and what they ask."""

    batch: Batch
    cache: Tensor
    query: Tensor
    group_size: int
    sliding_window: int | None = None
    rotation: Tensor | None = None
    soft_cap: float | None = None

    @classmethod
    def random(
        cls,
        kernels: ModuleType,
        seq_lens: list[int],
        new: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        head: tuple[int, int] = (64, 64),
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        sliding_window: int | None = None,
        rotated: bool = False,
    ) -> "Scene":
        batch, (head_size, group_size) = Batch.of(seq_lens, new, block_size), head
        blocks = 1 + sum(-(-length // block_size) for length in seq_lens)
        cache = empty_cache(blocks, kv_heads, block_size, head_size, group_size, GARBAGE)
        rotation = None
        if rotated:
            rotation = torch.linalg.qr(torch.randn(kv_heads, head_size, head_size))[0].contiguous()
        key, value = torch.randn(2, sum(seq_lens), kv_heads, head_size).add(0.3).to(dtype).unbind(0)
        kernels.kv_store(key, value, cache, batch.slots(block_size), group_size, rotation)
        query = torch.randn(sum(new), heads, head_size).to(dtype)
        return cls(batch, cache, query, group_size, sliding_window, rotation)

    def run(self, kernels: ModuleType) -> Tensor:
        cache = as_reference(self.cache, self.group_size) if kernels is reference else self.cache
        scale = self.query.shape[2] ** -0.5
        rest = self.group_size, self.sliding_window, self.rotation, self.soft_cap
        return attend(kernels, self.query, cache, self.batch, scale, *rest)

    def request(self, index: int) -> "Scene":
        """One request alone."""
        query = self.query[self.batch.rows(index)]
        rest = self.group_size, self.sliding_window, self.rotation, self.soft_cap
        return Scene(self.batch.request(index), self.cache, query, *rest)

    def deviation(self) -> Tensor:
        """At most the standard deviation from the reference, of grids and float32. [T, H, 1].

        An element of a query or of the probabilities is off by at most half a step, so by
        1 / sqrt(3) of that in the mean, and by 2^-24 of itself for each float32 operation; n of
        them, not related, by sqrt(n) times as much. Codes reach -8 and 7 in every group: a code
        times its scale is at most 8 / 15 of the range of its token. Scores that are off by e move
        an average by at most e times half the range of what is averaged.
        """
        query, (_, heads, head_size) = self.query.float(), self.query.shape
        if self.rotation is not None:
            query = reference.rotate_heads(query, self.rotation)
        deviation = torch.zeros(*query.shape[:2], 1)
        cache, block_size = as_reference(self.cache, self.group_size), self.cache.shape[2]
        half_step = 1 / (2 * largest_integer(self.query.dtype) * 3**0.5)
        float32 = 2 * 2.0**-24  # on both sides
        for index, length in enumerate(self.batch.seq_lens.tolist()):
            rows = self.batch.rows(index)
            blocks = self.batch.block_table[index, : -(-length // block_size)]
            key, value = (
                x.repeat_interleave(heads // len(x), 0)
                for x in reference.kv_load(cache, blocks, length, self.group_size)
            )
            q, scale = query[rows].transpose(0, 1), head_size**-0.5  # [H, new, D]
            position = torch.arange(length - q.shape[1], length)[:, None]
            distance = position - torch.arange(length)
            hidden = (distance < 0) | (distance >= (self.sliding_window or inf))
            scores, cap = q @ key.transpose(1, 2) * scale, self.soft_cap
            if cap:
                scores = cap * (scores / cap).tanh()
            scores = scores.masked_fill(hidden, -inf)
            key_code, value_code = (
                8 / 15 * (x.amax(2) - x.amin(2)).amax(1)[:, None] for x in (key, value)
            )
            norms = q.norm(dim=2) * key.norm(dim=2).amax(1)[:, None]
            score = half_step * q.abs().amax(2) * key_code + float32 * norms
            score *= scale * head_size**0.5
            score += 8 * float32 * (cap or 0.0)  # capping moves scores towards each other
            most = value.abs().amax((1, 2))[:, None]
            average = half_step * scores.softmax(2).amax(2) * value_code + float32 * most
            deviation[rows] = (score * most + average * length**0.5).T[..., None]
        return deviation

    def check(self, kernels: ModuleType) -> None:
        actual, expected = self.run(kernels), self.run(reference)
        assert actual.isfinite().all()
        rounding = torch.finfo(actual.dtype).eps * expected.abs().float()
        error = ((actual.float() - expected.float()).abs() - rounding).clamp_min(0)
        deviation = self.deviation()
        assert (error <= 6 * deviation).all()
        assert error.norm() <= deviation.expand_as(error).norm()


REQUESTS = st.lists(
    st.tuples(st.integers(1, 300), st.sampled_from([0, 1, 1, 3, 40, 300])), max_size=4
)


@given(
    requests=REQUESTS,
    kv_heads=st.integers(1, 3),
    ratio=st.sampled_from([1, 3, 4, 8]),
    head=st.sampled_from([(16, 16), (64, 64), (96, 96), (128, 128), (256, 128)]),
    block_size=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(FLOATS),
    sliding_window=st.sampled_from([None, None, 1, 7, 100]),
    rotated=st.booleans(),
    soft_cap=st.sampled_from([None, None, 0.7, 50.0]),
    magnitude=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_any_batch(
    kernels: ModuleType,
    requests: list[tuple[int, int]],
    kv_heads: int,
    ratio: int,
    head: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    sliding_window: int | None,
    rotated: bool,
    soft_cap: float | None,
    magnitude: float,
    seed: int,
) -> None:
    """Decodes, whole prefills, later chunks, requests with nothing new, in any mixture."""
    torch.manual_seed(seed)
    seq_lens = [length for length, _ in requests]
    new = [min(length, count) for length, count in requests]
    scene = Scene.random(
        kernels,
        seq_lens,
        new,
        kv_heads * ratio,
        kv_heads,
        head,
        block_size,
        dtype,
        sliding_window,
        rotated,
    )
    scene.query *= magnitude
    scene.soft_cap = soft_cap
    scene.check(kernels)


@pytest.mark.parametrize("sliding_window", [None, 100, 1500])
@pytest.mark.parametrize("block_size", [16, 128])
def test_long_contexts(kernels: ModuleType, block_size: int, sliding_window: int | None) -> None:
    """Which are split between threads if there are few new tokens."""
    torch.manual_seed(0)
    scene = Scene.random(
        kernels,
        [1024, 1025, 2500, 1100, 40],
        [1, 1, 5, 30, 40],
        block_size=block_size,
        sliding_window=sliding_window,
    )
    scene.check(kernels)


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 100, 1024, 1025])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_each_token_sees_its_context_and_no_more(
    kernels: ModuleType, block_size: int, sliding_window: int | None
) -> None:
    """With queries of zero it averages what it sees; each value marks one channel."""
    torch.manual_seed(0)
    seq_lens, new = [1, 16, 17, 129, 1024, 1025, 2500, 8300], [1, 16, 2, 129, 1, 3, 1, 2]
    scene = Scene.random(
        kernels, seq_lens, new, block_size=block_size, sliding_window=sliding_window
    )
    position = torch.cat([torch.arange(length) for length in seq_lens])
    value = torch.nn.functional.one_hot(position * 37 % 64, 64).float()[:, None].repeat(1, 2, 1)
    slots = scene.batch.slots(block_size)
    kernels.kv_store(value, value, scene.cache, slots, scene.group_size)
    scene.query.zero_()
    seen = torch.cat([torch.arange(a - b, a) + 1 for a, b in zip(seq_lens, new, strict=True)])
    # One token more or less moves a channel by about 1 / seen.
    tolerance = 0.25 / seen.clamp_max(sliding_window or inf)[:, None, None]
    assert ((scene.run(kernels) - scene.run(reference)).abs() <= tolerance).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_extreme_codes(kernels: ModuleType, most: float, sign: int) -> None:
    """All but one at one end of the grid, times bytes of 127 and -128."""
    torch.manual_seed(0)
    scene = Scene.random(kernels, [300], [2], head=(256, 256), block_size=128)
    x = torch.full((300, 2, 256), most)
    x[..., 0] = 1 - most
    kernels.kv_store(x, x, scene.cache, scene.batch.slots(128), 256)
    largest = largest_integer(scene.query.dtype)
    scene.query.fill_(sign * (largest - (128 << 8) - 128) / largest)
    scene.query[..., 0] = sign
    scene.check(kernels)


@pytest.fixture
def mixed(kernels: ModuleType) -> Scene:
    """A batch of all kinds of requests."""
    torch.manual_seed(0)
    return Scene.random(kernels, [9, 1500, 150, 3, 200, 2100], [1, 1, 150, 0, 33, 4])


def test_a_request_alone_gives_what_it_gives_in_a_batch(kernels: ModuleType, mixed: Scene) -> None:
    """To the bit."""
    together = mixed.run(kernels)
    for index in range(len(mixed.batch.seq_lens)):
        assert torch.equal(mixed.request(index).run(kernels), together[mixed.batch.rows(index)])


def test_threads_change_nothing(kernels: ModuleType, mixed: Scene) -> None:
    runs = [partial(mixed.run, kernels), partial(mixed.request(5).run, kernels)]
    alone = [run() for run in runs]
    with openmp_threads(2):
        for run, output in zip(runs, alone, strict=True):
            assert torch.equal(run(), output)
    for results, output in zip(at_once(runs), alone, strict=True):
        assert all(torch.equal(result, output) for result in results)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_query_spoils_only_its_own_row(
    kernels: ModuleType, dtype: torch.dtype, bad: float
) -> None:
    torch.manual_seed(0)
    scene = Scene.random(kernels, [1500, 150, 30], [1, 150, 30], dtype=dtype)
    clean = scene.run(kernels)
    spoilt = torch.zeros(clean.shape[:2], dtype=torch.bool)
    for row, head, channel in (0, 1, 0), (70, 3, 63), (180, 0, 17):
        scene.query[row, head, channel] = bad
        spoilt[row, head] = True
    output = scene.run(kernels)
    assert not output[spoilt].isfinite().any()
    assert torch.equal(output[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_of_wider_tensors(kernels: ModuleType, dtype: torch.dtype) -> None:
    """As vLLM passes them; what surrounds the output stays."""
    torch.manual_seed(0)
    scene = Scene.random(kernels, [40, 1100], [40, 3], dtype=dtype)
    expected = scene.run(kernels)
    wide = torch.full((45, 3, 4, 64), 9.0, dtype=dtype)
    wide[1:44, 1] = scene.query
    around = torch.full((45, 3, 4, 64), 9.0, dtype=dtype)
    batch, rest = scene.batch, (0.125, scene.group_size)
    tensors = batch.block_table, batch.seq_lens, batch.query_start_loc
    kernels.paged_attention(wide[1:44, 1], scene.cache, *tensors, around[1:44, 1], *rest)
    assert torch.equal(around[1:44, 1], expected)
    around[1:44, 1] = 9.0
    assert (around == 9.0).all()


def test_an_empty_batch(kernels: ModuleType) -> None:
    assert Scene.random(kernels, [], []).run(kernels).shape == (0, 4, 64)
