"""Reading a checkpoint, and the sentence for every way it can be broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_checkpoint import HIDDEN, model_config, tensors, write
from torch import Tensor

from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError
from vllm_offq.format import INDEX_FILE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "model", max_shard_bytes=30_000)


def test_round_trip(checkpoint: Path) -> None:
    validate_checkpoint(checkpoint)
    read = Checkpoint(checkpoint)
    assert read.config.sites["mlp_output"].online_hadamard == 32
    assert read.model_config["hidden_size"] == HIDDEN
    assert set(read.names) == set(tensors())
    for name, tensor in tensors().items():
        assert read.shape(name) == tensor.shape
        assert read.dtype(name) == tensor.dtype
        assert torch.equal(read.load(name), tensor)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]
    shard = load_file(path)
    shard[name] = change(shard[name].clone())
    save_file(shard, path)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        validate_checkpoint(folder)
    return str(caught.value)


def test_not_a_folder(tmp_path: Path) -> None:
    assert "absent is not a folder" in refusal(tmp_path / "absent")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'"offq"'])
def test_bad_json(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json" in refusal(checkpoint)


def test_an_unquantized_model(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.pop("quantization_config"))
    assert "unquantized model; quantize it with `offq quantize`" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"format_version": 2}, "format version 2"),
        ({"sparsity": 0.5}, "sparsity is an unknown key"),
        ({"ignore": "lm_head"}, "ignore is wrong"),
        ({"weights": {"bits": 4, "group_size": 24}}, "must be null or a multiple of group_size 32"),
        (
            {"weights": {"bits": 4, "group_size": 96}},
            "weights.group_size 96 does not divide the 64",
        ),
        (
            {"kv_cache": {"bits": 4, "group_size": 12, "key_rotation": True}},
            "kv_cache.group_size 12 does not divide the 16 channels",
        ),
        ({"head": {"bits": 8, "group_size": 48}}, "head.group_size 48 does not divide the 64"),
        ({"head": None}, "lm_head.weight is missing"),
        ({"kv_cache": None}, "self_attn.attn.key_rotation does not belong"),
    ],
)
def test_bad_quantization_config(checkpoint: Path, change: dict[str, Any], sentence: str) -> None:
    edit_json(
        checkpoint / "config.json", lambda config: config["quantization_config"].update(change)
    )
    assert sentence in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"hidden_size": "64"}, "hidden_size must be a positive number, not '64'"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
        ({"vocab_size": 51}, "model.embed_tokens.weight has shape [50, 64] instead of [51, 64]"),
    ],
)
def test_config_and_tensors_disagree(
    checkpoint: Path, change: dict[str, Any], sentence: str
) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(change))
    assert sentence in refusal(checkpoint)


@pytest.mark.parametrize("key", ["group_size", "online_hadamard"])
def test_a_site_that_does_not_fit_its_linears(checkpoint: Path, key: str) -> None:
    edit_json(
        checkpoint / "config.json",
        lambda config: config["quantization_config"]["sites"]["mlp_output"].update({key: 96}),
    )
    assert f"{key} 96 does not divide the 128 channels of model.layers.0.mlp.down_proj" in refusal(
        checkpoint
    )


def test_scales_per_group(tmp_path: Path) -> None:
    config = model_config()
    quantization = config["quantization_config"]
    quantization["weights"]["group_size"] = 16
    for site in quantization["sites"].values():
        site["group_size"] = 16
    folder = write(tmp_path / "model", config)
    sentence = refusal(folder)
    assert "q_proj.weight_scale has shape [64, 1] instead of [64, 4]" in sentence


def test_a_linear_without_a_site(checkpoint: Path) -> None:
    edit_json(
        checkpoint / "config.json",
        lambda config: config["quantization_config"]["sites"].pop("mlp"),
    )
    assert "mlp.gate_proj is neither in a site nor in ignore" in refusal(checkpoint)


def test_no_index(checkpoint: Path) -> None:
    (checkpoint / INDEX_FILE).unlink()
    assert f"has no {INDEX_FILE}" in refusal(checkpoint)


def test_index_without_weight_map(checkpoint: Path) -> None:
    (checkpoint / INDEX_FILE).write_text("{}")
    assert "has no weight_map" in refusal(checkpoint)


def test_a_missing_shard(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"has no {shard.name}" in refusal(checkpoint)


@pytest.mark.parametrize(
    "filename", ["../secret.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "model.bin", 7]
)
def test_the_index_may_not_lead_elsewhere(checkpoint: Path, filename: object) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    shutil.copy(shard, checkpoint.parent / "secret.safetensors")
    edit_json(
        checkpoint / INDEX_FILE,
        lambda index: index["weight_map"].update({"model.norm.weight": filename}),
    )
    sentence = refusal(checkpoint)
    assert repr(filename) in sentence
    assert "model.norm.weight" in sentence


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_shard(checkpoint: Path, size: int) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:size])
    assert f"{shard.name} is truncated or corrupt" in refusal(checkpoint)


def test_a_shard_of_noise(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert f"{shard.name} is truncated or corrupt" in refusal(checkpoint)


def test_index_and_shard_disagree(checkpoint: Path) -> None:
    name = "model.norm.weight"
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    edit_json(checkpoint / INDEX_FILE, lambda content: content["weight_map"].pop(name))
    sentence = refusal(checkpoint)
    assert f"tensor {name} is in {index['weight_map'][name]}" in sentence


def test_a_tensor_missing_in_its_shard(checkpoint: Path) -> None:
    edit_json(
        checkpoint / INDEX_FILE,
        lambda index: index["weight_map"].update(
            {"model.norm.bias": index["weight_map"]["model.norm.weight"]}
        ),
    )
    assert "tensor model.norm.bias should be in model-0" in refusal(checkpoint)


def test_a_renamed_tensor(checkpoint: Path) -> None:
    name, renamed = "model.layers.1.mlp.up_proj.weight_scale", "model.layers.1.mlp.up_proj.scales"
    filename = json.loads((checkpoint / INDEX_FILE).read_text())["weight_map"][name]
    shard = load_file(checkpoint / filename)
    shard[renamed] = shard.pop(name)
    save_file(shard, checkpoint / filename)
    edit_json(
        checkpoint / INDEX_FILE,
        lambda index: index["weight_map"].update({renamed: index["weight_map"].pop(name)}),
    )
    assert f"tensor {name} is missing (there is an unexpected {renamed})" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "model.layers.0.mlp.down_proj.weight_packed",
            lambda x: x.view(128, 32),
            "has shape [128, 32] instead of [64, 64]",
        ),
        (
            "model.layers.0.mlp.down_proj.weight_packed",
            lambda x: x.view(torch.int8),
            "has dtype torch.int8 instead of torch.uint8",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight_scale",
            lambda x: x.float(),
            "has dtype torch.float32 instead of torch.float16",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight_scale",
            lambda x: x.index_fill_(0, torch.tensor([63]), float("nan")),
            "holds NaN or infinity",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight_scale",
            lambda x: x.index_fill_(0, torch.tensor([5]), float("inf")),
            "holds NaN or infinity",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight_scale",
            lambda x: x.index_fill_(0, torch.tensor([5]), -0.5),
            "holds a negative scale",
        ),
        (
            "model.layers.0.self_attn.attn.key_rotation",
            lambda x: x.fill_(float("nan")),
            "holds NaN or infinity",
        ),
        (
            "model.layers.0.self_attn.attn.key_rotation",
            lambda x: x * 1.01,
            "is not orthogonal",
        ),
        (
            "model.embed_tokens.weight",
            lambda x: x.index_fill_(0, torch.tensor([49]), float("inf")),
            "holds NaN or infinity",
        ),
        ("model.norm.weight", lambda x: x.fill_(float("nan")), "holds NaN or infinity"),
        ("model.embed_tokens.weight", lambda x: x.fill_(float("nan")), "holds NaN or infinity"),
    ],
)
def test_a_spoilt_tensor(
    checkpoint: Path, name: str, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    edit_tensor(checkpoint, name, change)
    assert f"tensor {name} {sentence}" in refusal(checkpoint)


def test_any_random_rotation_survives_float16(checkpoint: Path) -> None:
    edit_tensor(
        checkpoint,
        "model.layers.0.self_attn.attn.key_rotation",
        lambda x: torch.linalg.qr(torch.randn(x.shape))[0].half().contiguous(),
    )
    validate_checkpoint(checkpoint)
