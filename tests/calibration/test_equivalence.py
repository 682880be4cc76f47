"""With every quantizer off, a rotated model computes what the original computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, make_tiny, make_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.architectures import Architecture
from calibration.basis import residual_candidates
from calibration.fuse import fuse_block
from calibration.instrument import attention_state, instrument, layers_of
from calibration.loader import load_original
from calibration.rotations import Rotations, hadamard_rotations, principal_rotations
from calibration.simulate import fused_model
from calibration.statistics import Statistics, collect

LLAMAS: dict[str, dict[str, Any]] = {
    "wide-heads": {"head_dim": 128, "num_heads": 4, "num_kv_heads": 2, "hidden": 384},
    "biased": {"bias": True, "num_kv_heads": 4},
    "odd-heads": {"hidden": 192, "num_heads": 3, "num_kv_heads": 1, "intermediate": 320},
}
BIASED = {"Gemma3-biased": ("Gemma3", {"attention_bias": True})}
TOKENS = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1))
PARTS = [
    "residual",
    "residual_order",
    "residual_gains",
    "final_gains",
    "residual_block_size",
    "keys",
    "values",
    "down_order",
    "down_block_size",
]


@pytest.fixture(scope="module", params=[*LLAMAS, *FAMILIES, *BIASED])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param in LLAMAS:
        return make_tiny_llama(path, **LLAMAS[request.param])
    family, changes = BIASED.get(request.param, (request.param, {}))
    return make_tiny(path, family, **changes)


@pytest.fixture(scope="module")
def architecture(folder: Path) -> Architecture:
    return load_original(str(folder)).architecture


@pytest.fixture(scope="module")
def original_model(folder: Path) -> PreTrainedModel:
    # Eager, because PyTorch's own attention leaves out Gemma 2's soft cap.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def original_logits(original_model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return original_model(TOKENS).logits


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Statistics:
    original = load_original(str(folder))
    instrument(original.model, original.architecture)
    return collect(original, TOKENS, batch_size=2, advance=lambda: None)


@contextmanager
def rotated(folder: Path, rotations: Rotations) -> Iterator[PreTrainedModel]:
    """The whole model, instrumented, with gains and rotations folded in."""
    with fused_model(load_original(str(folder)), rotations) as model:
        yield model


def rotated_logits(folder: Path, rotations: Rotations) -> Tensor:
    with rotated(folder, rotations) as model:
        return model(TOKENS).logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def offq(statistics: Statistics, architecture: Architecture) -> Rotations:
    online = not architecture.rotates_stream
    dim = statistics.keys.shape[-1]
    head_group = dim if dim % 64 else 64
    rotations = principal_rotations(statistics, 64, head_group, 64, online=online)
    if not online:
        rotations.residual = residual_candidates(statistics, 64)["top-1"]
    return rotations


@pytest.mark.parametrize("part", PARTS)
def test_each_rotation_alone(
    folder: Path,
    architecture: Architecture,
    original_logits: Tensor,
    statistics: Statistics,
    part: str,
) -> None:
    value = getattr(offq(statistics, architecture), part)
    if value is None:
        pytest.skip(f"{architecture.name} does without")
    rotations = Rotations(**{part: value})
    assert difference(rotated_logits(folder, rotations), original_logits) < 1e-4


def test_all_rotations_together(
    folder: Path, architecture: Architecture, original_logits: Tensor, statistics: Statistics
) -> None:
    rotations = offq(statistics, architecture)
    assert (rotations.residual is None) != (rotations.residual_order is None)
    assert difference(rotated_logits(folder, rotations), original_logits) < 1e-4


def test_gain_folding_alone(folder: Path, original_logits: Tensor) -> None:
    assert difference(rotated_logits(folder, Rotations()), original_logits) < 1e-4


def test_quarot_rotations(
    folder: Path, architecture: Architecture, original_logits: Tensor, statistics: Statistics
) -> None:
    rotations = hadamard_rotations(statistics, seed=3, online=not architecture.rotates_stream)
    assert difference(rotated_logits(folder, rotations), original_logits) < 1e-4


def test_a_forgotten_rotation_would_be_seen(
    folder: Path, architecture: Architecture, original_logits: Tensor, statistics: Statistics
) -> None:
    """The tests above mean something: each rotation changes the weights that it is fused into."""
    with rotated(folder, offq(statistics, architecture)) as model:
        for layer in layers_of(model, architecture):
            layer.get_submodule(architecture.down).online_hadamard = None
        without_hadamard = model(TOKENS).logits
    assert difference(without_hadamard, original_logits) > 1e-3


def test_every_other_tensor_of_a_block_is_changed(
    folder: Path, architecture: Architecture, statistics: Statistics
) -> None:
    """So equal logits mean that no gain and no order was forgotten on both sides."""
    original = load_original(str(folder))
    rotations = offq(statistics, architecture)
    with original.block(0) as layer:
        before = {name: value.clone() for name, value in layer.named_parameters()}
        instrument(original.model, architecture)
        fuse_block(layer, 0, original.model.config, architecture, rotations)
        changed = {
            name for name, value in layer.named_parameters() if not value.equal(before[name])
        }
    stays = {name for name in before if name.startswith("self_attn.") and "_norm" in name}
    for role in ("query", "key"):  # their outputs are rotated online
        if getattr(architecture, role) != architecture.value:
            stays.add(f"{getattr(architecture, role)}.bias")
    assert before.keys() - changed == stays & before.keys()


def test_instrumented_model_generates_with_a_cache(
    folder: Path,
    architecture: Architecture,
    original_model: PreTrainedModel,
    statistics: Statistics,
) -> None:
    """Keys are rotated per call, so cached and new ones agree."""
    prompt = TOKENS[:1, :8]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
    expected = original_model.generate(prompt, **options)
    with rotated(folder, offq(statistics, architecture)) as model:
        state = attention_state(layers_of(model, architecture)[0], architecture)
        assert state.key_rotation is not None
        assert model.generate(prompt, **options).equal(expected)
