"""With every quantizer off, a rotated model computes what the original computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.architectures import find_architecture
from calibration.fuse import fuse_block, fuse_embedding, fuse_head
from calibration.instrument import attention_state, instrument, layers_of
from calibration.loader import load_original
from calibration.rotations import Rotations, hadamard_rotations, principal_rotations
from calibration.statistics import Statistics, collect

LLAMA = find_architecture(["LlamaForCausalLM"])
MODELS = {
    "llama3-like": {"head_dim": 128, "num_heads": 4, "num_kv_heads": 2, "hidden": 384},
    "untied": {"tied": False},
    "biased": {"bias": True, "num_kv_heads": 4},
    "odd-heads": {"hidden": 192, "num_heads": 3, "num_kv_heads": 1, "intermediate": 320},
}
TOKENS = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1))
PARTS = ["residual", "keys", "values", "down_order", "down_block_size"]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@pytest.fixture(scope="module")
def original_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def original_logits(original_model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return original_model(TOKENS).logits


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Statistics:
    original = load_original(str(folder))
    instrument(original.model, LLAMA)
    return collect(original, TOKENS, batch_size=2, advance=lambda: None)


@contextmanager
def rotated(folder: Path, rotations: Rotations) -> Iterator[PreTrainedModel]:
    """The whole model, instrumented, with gains and rotations folded in."""
    original = load_original(str(folder))
    model = original.model
    instrument(model, LLAMA)
    with torch.no_grad(), original.loaded(""):
        fuse_embedding(model.get_submodule(LLAMA.embedding), rotations)
        for index, layer in enumerate(layers_of(model, LLAMA)):
            fuse_block(layer, index, model.config, LLAMA, rotations)
        fuse_head(model.get_submodule(LLAMA.head), model.get_submodule(LLAMA.final_norm), rotations)
        yield model


def rotated_logits(folder: Path, rotations: Rotations) -> Tensor:
    with rotated(folder, rotations) as model:
        return model(TOKENS).logits


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() / expected.norm() < 1e-4


def offq(statistics: Statistics) -> Rotations:
    return principal_rotations(statistics, 64, 64, 64, basis="top-1")


@pytest.mark.parametrize("part", PARTS)
def test_each_rotation_alone(
    folder: Path, original_logits: Tensor, statistics: Statistics, part: str
) -> None:
    rotations = Rotations(**{part: getattr(offq(statistics), part)})
    assert_equal(rotated_logits(folder, rotations), original_logits)


def test_all_rotations_together(
    folder: Path, original_logits: Tensor, statistics: Statistics
) -> None:
    assert_equal(rotated_logits(folder, offq(statistics)), original_logits)


def test_gain_folding_alone(folder: Path, original_logits: Tensor) -> None:
    assert_equal(rotated_logits(folder, Rotations()), original_logits)


def test_quarot_rotations(folder: Path, original_logits: Tensor, statistics: Statistics) -> None:
    rotations = hadamard_rotations(statistics, seed=3)
    assert_equal(rotated_logits(folder, rotations), original_logits)


def test_a_forgotten_rotation_would_be_seen(
    folder: Path, original_logits: Tensor, statistics: Statistics
) -> None:
    """The tests above mean something: each rotation changes the weights that it is fused into."""
    with rotated(folder, offq(statistics)) as model:
        for layer in layers_of(model, LLAMA):
            layer.get_submodule(LLAMA.down).online_hadamard = None
        without_hadamard = model(TOKENS).logits
    assert (without_hadamard - original_logits).norm() / original_logits.norm() > 1e-2


def test_instrumented_model_generates_with_a_cache(
    folder: Path, original_model: PreTrainedModel, statistics: Statistics
) -> None:
    """Keys are rotated per call, so cached and new ones agree."""
    prompt = TOKENS[:1, :8]
    expected = original_model.generate(prompt, max_new_tokens=12, do_sample=False)
    with rotated(folder, offq(statistics)) as model:
        assert attention_state(layers_of(model, LLAMA)[0], LLAMA).key_rotation is not None
        assert model.generate(prompt, max_new_tokens=12, do_sample=False).equal(expected)
