"""The original stays what it is, wherever its tensors come from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from tiny_experts import make_tiny_experts
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from tiny_multimodal import make_tiny_multimodal
from transformers import AutoTokenizer

from calibration.loader import Original, load_original, put_bos
from calibration.weights import LoadedWeights
from vllm_offq.errors import UserError


@pytest.fixture(params=["shards", "memory"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Original:
    folder = make_tiny_llama(tmp_path / "model")
    original = load_original(str(folder))
    if request.param == "memory":  # as a GGUF file is
        original.weights = LoadedWeights(load_file(folder / "model.safetensors"))
    return original


def test_what_is_changed_in_a_block_is_gone_after_it(original: Original, tmp_path: Path) -> None:
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for change in (True, False):
        with original.block(1) as layer:
            for name, parameter in layer.named_parameters():
                assert parameter.equal(stored[f"model.layers.1.{name}"]), name
                if change:
                    parameter.zero_()
    assert all(parameter.is_meta for parameter in original.model.parameters())


def test_a_tied_head_is_a_copy_of_the_embedding(original: Original) -> None:
    architecture = original.architecture
    with original.loaded(architecture.embedding, architecture.head) as (embedding, head):
        assert head.weight.equal(embedding.weight)
        embedding.weight.zero_()
        assert not head.weight.eq(0).all()
    with original.loaded(architecture.head) as (head,):
        assert not head.weight.eq(0).all()


def test_bytes_are_those_on_disk(original: Original, tmp_path: Path) -> None:
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert original.num_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    one, other = (
        LoadedWeights({"weight": torch.full((4,), value)}).fingerprint() for value in (1.0, 2.0)
    )
    assert one != other


def test_a_model_here_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_llama(tmp_path / "llama")
    monkeypatch.chdir(folder)
    assert load_original(".").name == "llama"
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert load_original("..").name == "llama"
    (tmp_path / "link").symlink_to(folder)
    assert load_original(str(tmp_path / "link")).name == "link"


def test_a_head_that_is_lost_is_not_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", tied=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no lm_head\.weight, .* may be incomplete"):
        load_original(str(folder))


@pytest.mark.parametrize("says", [True, False, None])
def test_bos_is_put_where_a_gguf_says_so(tmp_path: Path, says: bool | None) -> None:
    writer = GGUFWriter(tmp_path / "tokenizer.gguf", "gemma3")
    if says is not None:
        writer.add_add_bos_token(says)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = make_tiny_tokenizer()
    put_bos(tokenizer, GGUFReader(tmp_path / "tokenizer.gguf"))
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        starts = each("a")["input_ids"][0] == each.bos_token_id
        assert starts == bool(says)


def add(folder: Path, *names: str) -> Path:
    """Tensors, of the shape that Llama's biases of queries have."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(256) for name in names}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_tiny_llama, "model.layers.0.self_attn.q_proj.bias"),
        (make_tiny_llama, "model.layers.2.input_layernorm.weight"),
        (
            lambda folder: make_tiny_experts(folder, "Mixtral"),
            "model.layers.1.block_sparse_moe.experts.8.w1.weight",
        ),
        (lambda folder: make_tiny_experts(folder, "Qwen3-MoE"), "model.layers.0.mlp.experts.down"),
        (
            lambda folder: make_tiny_multimodal(folder, "Llava"),
            "language_model.model.layers.2.input_layernorm.weight",
        ),
    ],
)
def test_tensors_that_the_configuration_does_not_name_are_refused(
    make: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    load_original(str(folder))
    sentence = f"of 2 layers, does not name: {name.removeprefix('language_model.')}; correct config"
    with pytest.raises(UserError, match=sentence):
        load_original(str(add(folder, name)))


def test_many_tensors_are_not_all_named(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    add(folder, *(f"model.layers.2.{number}" for number in range(9)))
    with pytest.raises(UserError, match=r"layers\.2\.0, .*layers\.2\.3 and 5 more; correct config"):
        load_original(str(folder))


def test_tensors_that_are_computed_anyway_may_be_there(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    load_original(str(add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", "other.weight")))
