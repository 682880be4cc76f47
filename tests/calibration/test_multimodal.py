"""Multimodal classes: the language model is quantized, images reach it in its rotated basis."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_multimodal import MODELS, make_tiny_multimodal, tiny_inputs
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from calibration.basis import residual_candidates
from calibration.fuse import fuse_rows
from calibration.instrument import instrument
from calibration.loader import load_original
from calibration.multimodal import Surroundings
from calibration.pipeline import quantize
from calibration.report import read_report
from calibration.rotations import principal_rotations
from calibration.settings import Settings
from calibration.simulate import fused_model, load_simulated
from calibration.statistics import collect
from vllm_offq.checkpoint import Checkpoint, CheckpointWriter, validate_checkpoint
from vllm_offq.errors import UserError

TOKENS = torch.randint(0, 380, (4, 48), generator=torch.Generator().manual_seed(1))
SETTINGS = Settings(samples=4, sequence_length=64, dtype="bfloat16", embedding_bits="8")
TOWER, PROJECTOR, NEWLINE = "vision_tower.", "multi_modal_projector.", "image_newline"


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_multimodal(tmp_path_factory.mktemp(name) / "model", name)


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    quantize(str(folder), folder.parent / "offq", SETTINGS)
    return folder.parent / "offq"


@pytest.fixture(scope="module")
def original_model(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_rotated_around_an_image_it_computes_the_same(
    name: str, folder: Path, original_model: PreTrainedModel
) -> None:
    """And would not if images came in the original's basis."""
    original = load_original(str(folder))
    architecture = original.architecture
    instrument(original.model, architecture)
    statistics = collect(original, TOKENS, batch_size=2, advance=lambda: None)
    online = not architecture.rotates_stream
    rotations = principal_rotations(statistics, 64, 64, 64, online=online)
    if not online:
        rotations.residual = residual_candidates(statistics, 64)["top-1"]
    around, inputs = original.surroundings, tiny_inputs(folder, name)
    assert around is not None
    rest = dict(original.rest(partial(fuse_rows, rotations=rotations)))
    unrotated = dict(original.rest(lambda rows: None))
    expected = original_model(**inputs).logits
    with fused_model(original, rotations) as language:
        model = around.join(language, rest)
        assert difference(model(TOKENS).logits, original_model(TOKENS).logits) < 1e-4
        assert difference(model(**inputs).logits, expected) < 1e-4
        assert difference(around.join(language, unrotated)(**inputs).logits, expected) > 1e-2


@torch.no_grad()
def test_the_checkpoint_answers_as_the_original_does(
    name: str, folder: Path, quantized: Path, original_model: PreTrainedModel
) -> None:
    validate_checkpoint(quantized)
    model, _ = load_simulated(quantized)
    inputs = tiny_inputs(quantized, name)
    expected = original_model(**inputs).logits.log_softmax(-1)
    found = model(**inputs).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < divergence < 0.2
    assert read_report(quantized).architecture == type(original_model).__name__


def test_all_but_the_language_model_is_copied(folder: Path, quantized: Path) -> None:
    """To the names that vLLM's class has, which transformers from version 5 on saves shortened."""
    source, checkpoint = load_file(folder / "model.safetensors"), Checkpoint(quantized)
    source = {
        key.replace(TOWER, f"{TOWER}vision_model.")
        if f"{TOWER}encoder.layers.0.layer_norm1.weight" in source and key.startswith(TOWER)
        else key: tensor
        for key, tensor in source.items()
        if key.startswith((TOWER, PROJECTOR, NEWLINE))
    }
    assert source.keys() == {
        key for key in checkpoint.names if key.startswith((TOWER, PROJECTOR, NEWLINE))
    }
    changed = {key for key in source if not checkpoint.load(key).equal(source[key])}
    into_stream = "linear_2", "input_projection", NEWLINE
    last = [key for key in source if any(part in key for part in into_stream)]
    assert changed == set(last)
    files = {path.name for path in folder.iterdir() if "processor" in path.name}
    assert files
    for file in (*files, "chat_template.jinja"):
        assert (quantized / file).read_bytes() == (folder / file).read_bytes()


def test_both_ways_of_naming_give_one_checkpoint(folder: Path, quantized: Path) -> None:
    """transformers 4.52 to 4.57 saves all but the head below `model`."""
    renamed = folder.parent / "renamed"
    renamed.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (renamed / path.name).write_bytes(path.read_bytes())
    tensors = {
        "model." + key.replace("language_model.model.", "language_model."): tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors = {
        key.replace("model.language_model.lm_head", "lm_head"): t for key, t in tensors.items()
    }
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    out = folder.parent / "renamed-offq"
    quantize(str(renamed), out, SETTINGS)
    first, second = Checkpoint(quantized), Checkpoint(out)
    assert sorted(first.names) == sorted(second.names)
    assert all(first.load(key).equal(second.load(key)) for key in first.names)


def test_an_interrupted_run_goes_on(
    folder: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = folder.parent / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(Surroundings, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(folder), out, SETTINGS)
    quantize(str(folder), out, SETTINGS, resume=True)
    first, second = Checkpoint(quantized), Checkpoint(out)
    assert sorted(first.names) == sorted(second.names)
    assert all(first.load(key).equal(second.load(key)) for key in first.names)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_language_model_of_another_class_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_multimodal(tmp_path / "model", "Llava")
    edit_config(folder, text_config={"model_type": "phi"})
    with pytest.raises(
        UserError, match=r"^Llava\w+ with a .* of type phi is not supported; .*llama"
    ):
        load_original(str(folder))


def test_other_multimodal_classes_are_refused_with_the_list(tmp_path: Path) -> None:
    name = "Qwen2_5_VLForConditionalGeneration"
    content = {"model_type": "qwen2_5_vl", "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{name} is not supported; .*Mistral3ForConditional"):
        load_original(str(tmp_path))


def test_what_is_around_is_checked(tmp_path: Path) -> None:
    folder = make_tiny_multimodal(tmp_path / "model", "Llava")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight = "multi_modal_projector.linear_2.weight"
    for changed, sentence in (
        ({weight: tensors[weight] * torch.nan}, f"{weight} is not of finite"),
        ({weight: tensors[weight][:64]}, f"{weight} has shape .64, 256., .* 256 wide"),
        ({f"{TOWER}extra": torch.ones(1).long()}, f"{TOWER}extra is not of finite"),
    ):
        save_file(tensors | changed, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=sentence):  # before the long work
            load_original(str(folder))


@pytest.mark.parametrize(
    ("left_out", "added", "tensor", "sentence"),
    [
        (TOWER, "none", None, "tensors of vision_tower are missing"),
        ("none", "audio_tower.weight", torch.ones(1), "does not belong there"),
        ("none", f"{TOWER}extra", torch.tensor([torch.nan]), "holds NaN"),
        ("none", f"{TOWER}extra", torch.ones(1).long(), "has dtype torch.int64"),
    ],
)
def test_a_checkpoint_with_something_else_around_is_refused(
    left_out: str,
    added: str,
    tensor: Tensor | None,
    sentence: str,
    quantized: Path,
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint(quantized)
    with CheckpointWriter(tmp_path / "changed") as writer:
        for kept in checkpoint.names:
            if not kept.startswith(left_out):
                writer.add(kept, checkpoint.load(kept))
        if tensor is not None:
            writer.add(added, tensor)
        writer.add_text("config.json", (quantized / "config.json").read_text())
    with pytest.raises(UserError, match=sentence):
        validate_checkpoint(tmp_path / "changed")


def test_what_ends_a_row_of_an_image_is_of_llava_next(
    name: str, quantized: Path, tmp_path: Path
) -> None:
    """It must be there, and in no other class."""
    checkpoint = Checkpoint(quantized)
    with CheckpointWriter(tmp_path / "changed") as writer:
        for kept in set(checkpoint.names) - {NEWLINE}:
            writer.add(kept, checkpoint.load(kept))
        if name != "LlavaNext":
            writer.add(NEWLINE, torch.ones(256))
        writer.add_text("config.json", (quantized / "config.json").read_text())
    sentence = "of image_newline are missing" if name == "LlavaNext" else "does not belong there"
    with pytest.raises(UserError, match=sentence):
        validate_checkpoint(tmp_path / "changed")
