"""The configuration schema refuses by name what it does not know; packing loses nothing."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_checkpoint import quantization_config

from vllm_offq.errors import UserError
from vllm_offq.format import (
    HEAD_CODE_MAX,
    pack_int4,
    pack_int8,
    parse_config,
    unpack_int4,
    unpack_int8,
)


def refusal(raw: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    return str(caught.value)


def test_a_good_config_survives_json() -> None:
    config = parse_config(quantization_config(head=None, ignore=["lm_head"]))
    assert parse_config(config.model_dump(mode="json")) == config
    assert config.site_of("model.layers.3.mlp.down_proj") == config.sites["mlp_output"]
    assert config.site_of("model.layers.3.mlp.router") is None
    assert config.is_ignored("lm_head")
    assert not config.is_ignored("model.layers.3.mlp.down_proj")


def test_an_ignored_linear_may_be_named_in_full() -> None:
    config = parse_config(quantization_config(ignore=["model.layers.0.mlp.down_proj"]))
    assert config.is_ignored("model.layers.0.mlp.down_proj")
    assert not config.is_ignored("model.layers.1.mlp.down_proj")


def test_an_ignored_parent_is_one_with_all_below_it() -> None:
    config = parse_config(quantization_config(ignore=["vision_tower"]))
    assert config.is_ignored("vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not config.is_ignored("vision_tower2.encoder.layers.0.self_attn.q_proj")
    assert not config.is_ignored("language_model.vision_tower.q_proj")


@pytest.mark.parametrize("key", sorted(quantization_config().keys() - {"embedding"}))
def test_a_missing_key_is_named(key: str) -> None:
    raw = quantization_config()
    del raw[key]
    assert key in refusal(raw)


@pytest.mark.parametrize("key", ["modules", "bits", "group_size", "clip_ratio", "symmetric"])
def test_a_missing_key_of_a_site_is_named_in_full(key: str) -> None:
    raw = quantization_config()
    del raw["sites"]["mlp"][key]
    assert f"sites.mlp.{key} is missing" in refusal(raw)


def test_an_unknown_key_is_named_in_full() -> None:
    raw = quantization_config()
    raw["sites"]["mlp"]["smoothing"] = 1
    assert "sites.mlp.smoothing is an unknown key" in refusal(raw)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("weights.bits", 8),
        ("weights.group_size", "128"),
        ("weights.group_size", 0),
        ("sites", {}),
        ("sites.mlp.modules", []),
        ("sites.mlp.group_size", 32.0),
        ("sites.mlp.symmetric", "no"),
        ("sites.mlp.clip_ratio", 0.0),
        ("sites.mlp.clip_ratio", 1.5),
        ("sites.mlp.clip_ratio", float("nan")),
        ("sites.mlp.fused_rotation", "random"),
        ("sites.mlp.online_hadamard", -32),
        ("head.bits", 5),
        ("kv_cache.key_rotation", 1),
        ("settings_sha256", "abc"),
        ("produced_by", ""),
        ("format_version", 0),
        ("format_version", "1"),
    ],
)
def test_a_wrong_value_is_named(path: str, value: object) -> None:
    raw: Any = copy.deepcopy(quantization_config())
    *parents, last = path.split(".")
    inner = raw
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert path in refusal(raw)


def test_an_odd_group_cannot_be_packed() -> None:
    raw = quantization_config()
    raw["sites"]["mlp"]["group_size"] = 33
    assert "must be even" in refusal(raw)


def test_a_module_belongs_to_one_site() -> None:
    raw = quantization_config()
    raw["sites"]["mlp"]["modules"] = ["gate_proj", "q_proj"]
    assert "q_proj is listed in more than one place" in refusal(raw)


def test_a_newer_format_asks_for_an_upgrade() -> None:
    sentence = refusal(quantization_config(format_version=7))
    assert "format version 7" in sentence
    assert "upgrade vllm-offq" in sentence


@pytest.mark.parametrize("method", ["gptq", None, 4])
def test_another_method_is_no_offq_checkpoint(method: object) -> None:
    assert "no OffQ checkpoint" in refusal(quantization_config(quant_method=method))


@pytest.mark.parametrize("raw", [None, [], "offq"])
def test_no_object_at_all(raw: object) -> None:
    assert "must be a JSON object" in refusal(raw)


@given(shape=st.tuples(st.integers(0, 5), st.integers(0, 5)), data=st.data())
def test_packing_round_trip(shape: tuple[int, int], data: st.DataObject) -> None:
    rows, pairs = shape
    flat = st.lists(st.integers(-8, 7), min_size=2 * rows * pairs, max_size=2 * rows * pairs)
    codes = torch.tensor(data.draw(flat), dtype=torch.int8).view(rows, 2 * pairs)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_int4(packed), codes)


def test_every_byte_is_a_pair_of_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_int4(packed)
    assert codes.min() == -8
    assert codes.max() == 7
    assert torch.equal(pack_int4(codes), packed)


def test_the_even_channel_is_in_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([-8, 7, 0, -1], dtype=torch.int8)).tolist() == [0xF0, 0x78]


def test_a_checkpoint_older_than_embeddings_of_eight_bits() -> None:
    raw = quantization_config()
    del raw["embedding"]
    assert parse_config(raw).embedding is None


def test_every_code_of_the_head_is_two_of_four_bits() -> None:
    codes = torch.arange(-HEAD_CODE_MAX - 1, HEAD_CODE_MAX + 1, dtype=torch.int8).view(4, -1)
    packed = pack_int8(codes)
    assert packed.shape == codes.shape
    assert torch.equal(unpack_int8(packed), codes.short())
    high, low = unpack_int4(packed).chunk(2, -1)
    assert torch.equal(16 * high.short() + low, codes.short())
