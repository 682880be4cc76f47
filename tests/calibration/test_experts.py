"""Mixtures of experts: taken apart, rotated and quantized, they compute what they did."""

from pathlib import Path

import pytest
import torch
from tiny_experts import EXPERTS, MODELS, make_tiny_experts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.architectures import find_architecture
from calibration.experts import LEAST_SHARE, Experts
from calibration.inspect_command import describe
from calibration.instrument import instrument
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.plan import plan
from calibration.progress import no_progress
from calibration.settings import Settings
from calibration.simulate import fused_model, load_simulated
from calibration.survey import survey
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError

QUICK = Settings(samples=4, sequence_length=64)
TOKENS = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_experts(tmp_path_factory.mktemp("experts") / "model", request.param)


@pytest.fixture(scope="module")
def original_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_experts_taken_apart_compute_the_same(folder: Path, original_logits: Tensor) -> None:
    original = load_original(str(folder))
    with original.loaded(""), torch.no_grad():
        assert difference(original.model(TOKENS).logits, original_logits) < 1e-5


@pytest.mark.parametrize("recipe", ["offq", "quarot"])
def test_rotations_leave_the_logits_alone(
    recipe: str, folder: Path, original_logits: Tensor
) -> None:
    """Experts and router read the rotated stream; every expert has its own order of channels."""
    original, settings = load_original(str(folder)), Settings(recipe=recipe)
    instrument(original.model, original.architecture)
    config = plan(original.model.config, original.architecture, settings)
    rotations = survey(original, TOKENS, 2, config, settings, no_progress).rotations
    if rotations.down_order is not None:
        assert not rotations.down_order[0, 0].equal(rotations.down_order[0, 1])
    with fused_model(load_original(str(folder)), rotations) as model:
        assert difference(model(TOKENS).logits, original_logits) < 1e-4
        model.get_submodule("model.layers.0.mlp.gate").weight.mul_(-1)
        assert difference(model(TOKENS).logits, original_logits) > 1e-2  # routers count


def test_quantized(folder: Path, original_logits: Tensor, tmp_path: Path) -> None:
    report = quantize(str(folder), tmp_path / "offq", QUICK)
    validate_checkpoint(tmp_path / "offq")
    checkpoint = Checkpoint(tmp_path / "offq")
    assert checkpoint.config.ignore == ["gate"]
    routers = [name for name in checkpoint.names if name.endswith("gate.weight")]
    assert len(routers) == 2  # in 16 bit, one a layer
    found = describe(checkpoint)["tensors"]["linears, 16 bit"]
    assert (found["tensors"], found["parameters"]) == (2, 2 * EXPERTS * 256)
    expected = original_logits.log_softmax(-1)
    with torch.no_grad():
        simulated = load_simulated(tmp_path / "offq")[0](TOKENS).logits.log_softmax(-1)
    assert float((expected.exp() * (expected - simulated)).sum(-1).mean()) < 0.2
    top_k = AutoConfig.from_pretrained(folder).num_experts_per_tok
    assert report.expert_counts is not None and len(report.expert_counts) == 2
    for counts in report.expert_counts.values():
        assert len(counts) == EXPERTS and sum(counts) == 4 * 64 * top_k
    assert len(report.output_error) == 2 * (4 + 3 * EXPERTS)
    assert all(0 < error < 0.1 for error in report.output_error.values())
    assert all(len(values) == 2 for values in report.signal_to_noise.values())


def test_experts_that_no_token_is_routed_to_are_calibrated_on_others() -> None:
    torch.manual_seed(0)
    experts = Experts(("gate", "up", "down"), 3, 16, 8, torch.nn.functional.silu)
    hidden = torch.randn(64, 16)
    index = torch.tensor([[0, 1]]).expand(64, 2).clone()
    index[0, 0] = 2  # one token for expert 2
    weights = torch.rand(64, 2)
    seen: dict[int, int] = {}
    for number in range(3):
        experts.get_submodule(f"{number}.gate").register_forward_hook(
            lambda _, inputs, __, number=number: seen.update({number: len(inputs[0])})
        )
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        assert seen == {0: 63, 1: 64, 2: 1}
        experts.calibrates = True
        torch.testing.assert_close(experts(hidden, index, weights), expected)
    assert seen == {0: 63, 1: 64, 2: 64 // LEAST_SHARE + 1}
    assert experts.counts == [126, 128, 2]


def test_what_is_not_supported_is_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    architecture = find_architecture(config.architectures).of(config)
    with pytest.raises(UserError, match="--gptq-inputs corrected is not supported for mixtures"):
        plan(config, architecture, Settings(gptq_inputs="corrected"))
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = [0]
        with pytest.raises(UserError, match="blocks without experts"):
            plan(config, architecture, Settings())
