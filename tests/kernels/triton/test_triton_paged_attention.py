"""Triton's attention over 4-bit pages against the reference."""

from dataclasses import replace
from math import inf, nan
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paged import empty_cache
from triton_scene import MODULE, Scene

from vllm_offq.errors import UserError
from vllm_offq.kernels.triton import paged_attention_config, target
from vllm_offq.kernels.triton.kv_store import kv_store
from vllm_offq.kernels.triton.paged_attention_config import (
    attention_config,
    attention_workspace,
    most_parts,
    tiles_for,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
REQUESTS = st.lists(
    st.tuples(st.integers(1, 150), st.sampled_from([0, 1, 1, 3, 20, 150])), max_size=3
)


@given(
    requests=REQUESTS,
    kv_heads=st.integers(1, 2),
    ratio=st.sampled_from([1, 3, 4, 8]),
    head=st.sampled_from([(16, 16), (64, 64), (96, 96), (128, 128), (256, 128), (64, 32)]),
    block_size=st.sampled_from([16, 32, 48, 128]),
    dtype=st.sampled_from(FLOATS),
    sliding_window=st.sampled_from([None, None, 1, 7, 100]),
    rotated=st.booleans(),
    soft_cap=st.sampled_from([None, None, 0.7, 30.0]),
    num_cores=st.sampled_from([1, 8]),
    magnitude=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_any_batch(
    requests: list[tuple[int, int]],
    kv_heads: int,
    ratio: int,
    head: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    sliding_window: int | None,
    rotated: bool,
    soft_cap: float | None,
    num_cores: int,
    magnitude: float,
    seed: int,
) -> None:
    """Decodes, whole prefills, later chunks, requests with nothing new, in any mixture."""
    torch.manual_seed(seed)
    seq_lens = [length for length, _ in requests]
    new = [min(length, count) for length, count in requests]
    rest = block_size, dtype, sliding_window, rotated, soft_cap, num_cores
    scene = Scene.random(seq_lens, new, kv_heads * ratio, kv_heads, head, *rest)
    scene.query *= magnitude
    scene.check()


@pytest.mark.parametrize("sliding_window", [None, 400])
@pytest.mark.parametrize("block_size", [16, 128])
def test_long_contexts_are_split(block_size: int, sliding_window: int | None) -> None:
    """Between more programs than some of them have tiles."""
    torch.manual_seed(0)
    lengths, new = [700, 641, 60, 3], [1, 3, 1, 0]
    scene = Scene.random(lengths, new, block_size=block_size, sliding_window=sliding_window)
    scene.num_cores = 16
    scene.check()


@pytest.mark.parametrize(("head_size", "group_size"), [(64, 64), (64, 32), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_are_kept_in_the_workspace(
    dtype: torch.dtype, head_size: int, group_size: int
) -> None:
    """Whatever it held before; one of the size asked for is enough."""
    torch.manual_seed(0)
    scene = Scene.random(
        [700, 641, 60], [1, 1, 1], head=(head_size, group_size), dtype=dtype, num_cores=16
    )
    with patch.object(paged_attention_config, "num_cores", lambda device: 16):
        size = attention_workspace(dtype, head_size, group_size, torch.device("cpu"))
    workspace = torch.full((size,), nan)
    assert scene.run(workspace=workspace).equal(scene.run())
    assert not workspace.isnan().all()


@settings(deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    head_size=st.sampled_from([64, 128, 256]),
    tensor_core=st.sampled_from(["mma", "wgmma", "mfma"]),
    new=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    padding=st.integers(0, 100),
    ratio=st.integers(1, 40),
    kv_heads=st.integers(1, 16),
    max_context=st.integers(1, 100_000),
    cores=st.integers(1, 304),
)
def test_no_batch_has_more_parts_than_the_workspace_holds(
    dtype: torch.dtype,
    head_size: int,
    tensor_core: str,
    new: list[int],
    padding: int,
    ratio: int,
    kv_heads: int,
    max_context: int,
    cores: int,
) -> None:
    assume(sum(new) > 0)
    tiles, tokens = tiles_for(dtype, head_size, 1, tensor_core), sum(new) + padding
    batch = tokens, len(new), max(new), ratio, kv_heads, max_context, cores
    config = attention_config(tiles, *batch)
    if config.splits > 1:
        assert tokens * ratio * kv_heads * config.splits <= most_parts(tiles, cores)
    if padding == 0:  # which is then no limit
        with patch.object(paged_attention_config, "most_parts", lambda *_: 1 << 60):
            assert attention_config(tiles, *batch) == config


@pytest.mark.parametrize("num_cores", [1, 16])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 100])
@pytest.mark.parametrize("block_size", [16, 128])
def test_each_token_sees_its_context_and_no_more(
    block_size: int, sliding_window: int | None, num_cores: int
) -> None:
    """With queries of zero it averages what it sees; each value marks one channel."""
    torch.manual_seed(0)
    seq_lens, new = [1, 16, 17, 129, 300], [1, 16, 2, 100, 1]
    rest = (64, 64), block_size, torch.float16, sliding_window
    scene = Scene.random(seq_lens, new, 4, 2, *rest, num_cores=num_cores)
    position = torch.cat([torch.arange(length) for length in seq_lens])
    value = torch.nn.functional.one_hot(position * 37 % 64, 64).float()[:, None].repeat(1, 2, 1)
    kv_store(value, value, scene.cache, scene.batch.slots(block_size), scene.group_size)
    scene.query.zero_()
    seen = torch.cat([torch.arange(a - b, a) + 1 for a, b in zip(seq_lens, new, strict=True)])
    # One token more or less moves a channel by about 1 / seen.
    tolerance = 0.25 / seen.clamp_max(sliding_window or inf)[:, None, None]
    assert ((scene.run() - scene.expected()).abs() <= tolerance).all()


@pytest.mark.parametrize("block_size", [16, 128])
def test_blocks_that_no_token_sees_any_more_are_not_read(block_size: int) -> None:
    """Blocks before the window may be taken away: the table then names any other."""
    torch.manual_seed(0)
    scene = Scene.random([400], [2], block_size=block_size, sliding_window=33)
    expected = scene.run()
    scene.batch.block_table[0, : (400 - 2 - 33 + 1) // block_size] = len(scene.cache) - 1
    assert torch.equal(scene.run(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_extreme_codes(most: float, sign: int, dtype: torch.dtype) -> None:
    """All but one at one end of the grid, whose steps differ: their roundings are not related."""
    torch.manual_seed(0)
    scene = Scene.random([200], [2], head=(256, 256), block_size=128, dtype=dtype)
    x = torch.full((200, 2, 256), most)
    x[..., 0] = 1 - most
    x *= 1 + torch.rand(200, 1, 1)
    kv_store(x, x, scene.cache, scene.batch.slots(128), 256)
    scene.query.fill_(sign * 0.99)
    scene.query[..., 0] = sign
    scene.check()


@pytest.mark.parametrize("gpu", [target.AMD, target.nvidia((9, 0))])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tiles_of_other_gpus(dtype: torch.dtype, gpu: target.Gpu) -> None:
    torch.manual_seed(0)
    scene = Scene.random([90, 40], [80, 1], head=(256, 128), dtype=dtype)
    with patch.object(MODULE, "gpu", lambda: gpu):
        scene.check()


@pytest.mark.parametrize("num_cores", [1, 16])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_query_spoils_only_its_own_row(
    dtype: torch.dtype, bad: float, num_cores: int
) -> None:
    torch.manual_seed(0)
    scene = Scene.random([300, 20, 3], [1, 20, 3], dtype=dtype, num_cores=num_cores)
    clean = scene.run()
    spoilt = torch.zeros(clean.shape[:2], dtype=torch.bool)
    for row, head, channel in (0, 1, 0), (7, 3, 63), (22, 0, 17):
        scene.query[row, head, channel] = bad
        spoilt[row, head] = True
    output = scene.run()
    assert not output[spoilt].isfinite().any()
    assert torch.equal(output[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("num_cores", [1, 16])
def test_slices_of_wider_tensors(num_cores: int) -> None:
    """As vLLM passes them; what surrounds the output stays, and so do rows of no request."""
    torch.manual_seed(0)
    scene = Scene.random([40, 300], [40, 3], num_cores=num_cores)
    expected = scene.run()
    wide = torch.full((49, 3, 4, 64), 9.0, dtype=scene.query.dtype)
    wide[1:44, 1] = scene.query
    around = torch.full_like(wide, 9.0)
    replace(scene, query=wide[1:47, 1]).run(around[1:47, 1])
    torch.testing.assert_close(around[1:44, 1], expected)
    around[1:44, 1] = 9.0
    assert (around == 9.0).all()


def test_a_cache_of_more_than_2_gib() -> None:
    torch.manual_seed(0)
    scene = Scene.random([60], [2])
    stride = 2**30
    storage = torch.empty(
        (len(scene.cache) - 1) * stride + scene.cache[0].numel(), dtype=torch.uint8
    )
    far = storage.as_strided(scene.cache.shape, (stride, *scene.cache.stride()[1:]))
    far.copy_(scene.cache)
    assert torch.equal(replace(scene, cache=far).run(), scene.run())


def test_nothing_to_do() -> None:
    assert Scene.random([], []).run().shape == (0, 4, 64)
    assert Scene.random([5], [0]).run().shape == (0, 4, 64)


def test_smaller_groups_are_refused() -> None:
    scene = replace(Scene.random([5], [1]), cache=empty_cache(1, 2, 16, 64, 16), group_size=16)
    with pytest.raises(UserError, match="heads of 64 channels in groups of 16 are not supported"):
        scene.run()
