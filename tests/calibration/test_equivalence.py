"""With every quantizer off, a rotated model computes what the original computes."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.architectures import find_architecture
from calibration.fuse import fuse
from calibration.instrument import attention_state, instrument, layers_of
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


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def original_logits(folder: Path) -> Tensor:
    return load(folder)(TOKENS).logits


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Statistics:
    model = load(folder)
    instrument(model, LLAMA)
    return collect(model, LLAMA, TOKENS, batch_size=2, advance=lambda: None)


def rotated_logits(folder: Path, rotations: Rotations) -> Tensor:
    model = load(folder)
    instrument(model, LLAMA)
    fuse(model, LLAMA, rotations)
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
    model = load(folder)
    instrument(model, LLAMA)
    fuse(model, LLAMA, offq(statistics))
    for layer in layers_of(model, LLAMA):
        layer.get_submodule(LLAMA.down).online_hadamard = None
    without_hadamard = model(TOKENS).logits
    assert (without_hadamard - original_logits).norm() / original_logits.norm() > 1e-2


def test_instrumented_model_generates_with_a_cache(folder: Path, statistics: Statistics) -> None:
    """Keys are rotated per call, so cached and new ones agree."""
    prompt = TOKENS[:1, :8]
    expected = load(folder).generate(prompt, max_new_tokens=12, do_sample=False)
    model = load(folder)
    instrument(model, LLAMA)
    fuse(model, LLAMA, offq(statistics))
    assert attention_state(layers_of(model, LLAMA)[0], LLAMA).key_rotation is not None
    assert model.generate(prompt, max_new_tokens=12, do_sample=False).equal(expected)
