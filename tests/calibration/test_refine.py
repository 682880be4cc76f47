"""`--refine` brings predictions closer to the original's, by scales and gains alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_experts import make_tiny_experts
from tiny_models import make_tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calibration import refine as refining
from calibration.instrument import instrument
from calibration.learning import Learning
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated, simulated_model
from calibration.straight_through import CodedProduct, fake_quantize, fake_quantize_kv
from vllm_offq import quantizer
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("original") / "model")


def random_text(seed: int) -> str:
    return "".join(random.Random(seed).choices("etaoin shrdlu.\n", k=20_000))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text(random_text(seed=0))
    return Settings(
        calibration=(str(text),),
        samples=64,
        sequence_length=64,
        group_size=64,
        weight_group_size=64,
        refine=16,
    )


@pytest.fixture(scope="module")
def plain(original: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    quantize(str(original), out, replace(settings, refine=0))
    return out


@pytest.fixture(scope="module")
def refined(original: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "out"
    quantize(str(original), out, settings)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def kl(folder: Path, original: Path) -> float:
    """Mean over text that was not calibrated on."""
    simulated, tokenizer = load_simulated(folder)
    tokens = torch.tensor(tokenizer(random_text(seed=1))["input_ids"][: 32 * 64]).view(32, 64)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    q, p = (each(tokens).logits.log_softmax(-1) for each in (simulated, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_predictions_come_closer(original: Path, plain: Path, refined: Path) -> None:
    assert kl(refined, original) < 0.99 * kl(plain, original)
    validate_checkpoint(refined)
    found = json.loads((refined / "report.json").read_text())["refinement"]
    assert found["used"] and found["steps"] == 16 and found["after"] < found["before"]
    assert "16 steps of refinement brought" in (refined / "report.html").read_text()


def test_only_scales_and_gains_change(plain: Path, refined: Path) -> None:
    before, after = tensors_of(plain), tensors_of(refined)
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.endswith(("weight_scale", "norm.weight")) and not name.startswith("lm_head")
    }
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("steps", [3, 12])
def test_a_stopped_refinement_goes_on(
    steps: int,
    original: Path,
    settings: Settings,
    refined: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    step = Learning.step
    seen: list[int] = []

    def stop(self: Learning, batch: Tensor) -> float:
        if self.done == steps:
            raise KeyboardInterrupt
        return step(self, batch)

    def count(self: Learning, batch: Tensor) -> float:
        seen.append(self.done)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learning, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(original), out, settings)
    monkeypatch.setattr(Learning, "step", count)
    quantize(str(original), out, settings, resume=True)
    assert seen == list(range(steps // refining.SAVE_EVERY * refining.SAVE_EVERY, settings.refine))
    found, wanted = tensors_of(out), tensors_of(refined)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def saved_bytes(folder: Path, layers: int) -> tuple[int, int]:
    """Of a step on 1 x 64 tokens: what autograd keeps, and all parameters of the learning model."""
    source, out = make_tiny_llama(folder / "model", layers=layers), folder / "out"
    quantize(str(source), out, Settings(weights="rtn", refits=0, samples=2, sequence_length=32))
    original, checkpoint = load_original(str(source)), Checkpoint(out)
    tensors = {name: checkpoint.load(name) for name in checkpoint.names}
    config = AutoConfig.from_pretrained(out)
    model = simulated_model(config, checkpoint.config, tensors)
    instrument(original.model, original.architecture)
    learning = Learning(model, original.model, original.architecture, tensors, 1)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.nbytes)
        return x

    with original.loaded(""), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        learning.step(torch.zeros(1, 64, dtype=torch.int64))
    return sum(kept), sum(parameter.nbytes for parameter in model.parameters())


def test_a_step_keeps_little_of_a_block(tmp_path: Path) -> None:
    """Neither its weights in float nor what happens within it."""
    (few, less), (many, more) = (saved_bytes(tmp_path / str(n), layers=n) for n in (2, 6))
    config = AutoConfig.from_pretrained(tmp_path / "6" / "out")
    width = config.hidden_size
    assert (more - less) / 4 == 2 * width * 4  # the gains of two norms
    assert 64 * width * 4 < (many - few) / 4 < 4 * 64 * width * 4


def test_products_with_codes_have_the_gradients_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 32), dtype=torch.int8, generator=generator)
    x, scale, weights = (
        torch.rand(*shape, generator=generator) for shape in ((2, 3, 32), (6, 4), (2, 3, 6))
    )
    found = []
    for product in (
        CodedProduct.apply,
        lambda x, codes, scale: x @ quantizer.dequantize(codes, scale).T,
    ):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        y = product(leaves[0], codes, leaves[1])
        (y * weights).sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_what_does_not_help_changes_nothing(
    original: Path,
    settings: Settings,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("calibration.learning.GAIN_RATE", 1.0)  # so far that all is lost
    report = quantize(str(original), tmp_path / "out", settings)
    assert report.refinement is not None and not report.refinement.used
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(plain)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "did not help" in (tmp_path / "out" / "report.html").read_text()


def test_experts_are_refined_too(settings: Settings, tmp_path: Path) -> None:
    """Scales of experts to which no token is routed stay; the names are those on disk."""
    source = make_tiny_experts(tmp_path / "model", "Mixtral")
    settings = replace(settings, samples=32)
    report = quantize(str(source), tmp_path / "out", settings)
    assert report.refinement is not None and report.refinement.used
    validate_checkpoint(tmp_path / "out")


def test_one_sample_is_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="--refine holds sequences aside"):
        replace(settings, samples=1)


@pytest.mark.parametrize(("clip_ratio", "symmetric", "bits"), [(0.95, False, 4), (0.7, True, 8)])
def test_grid_has_the_quantizers_values(clip_ratio: float, symmetric: bool, bits: int) -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    x[0, :64] = 0.5  # a constant group
    wanted = quantizer.fake_quantize(x, 32, clip_ratio, symmetric, bits)
    for given in (x, x.clone().requires_grad_()):
        assert torch.equal(fake_quantize(given, 32, clip_ratio, symmetric, bits), wanted)


def test_gradient_sees_that_a_wider_step_errs_more() -> None:
    """Central differences of ``x + error * scale(x)`` with the error, in steps, held constant."""
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale, offset = quantizer.group_range(x, 16)
    codes = quantizer.quantize(x, scale, offset)
    error = (quantizer.dequantize(codes, scale, offset) - x).unflatten(-1, (2, 16))
    error = error / scale.unsqueeze(-1)

    def moved(x: Tensor) -> Tensor:
        low, high = x.unflatten(-1, (2, 16)).aminmax(dim=-1)
        step = (high - low) / 15
        return ((x + (error * step.unsqueeze(-1)).flatten(-2)) * weights).sum()

    wanted = torch.stack(
        [
            (moved(x + 1e-6 * direction) - moved(x - 1e-6 * direction)) / 2e-6
            for direction in torch.eye(64, dtype=torch.float64).view(64, 2, 32)
        ]
    ).view(2, 32)
    given = x.float().requires_grad_()
    (found,) = torch.autograd.grad((fake_quantize(given, 16) * weights.float()).sum(), given)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_cache_grid_rounds_scales_to_half() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = fake_quantize_kv(x, 64)
    scale, offset = (part.half().float() for part in quantizer.group_range(x.detach(), 64))
    wanted = quantizer.dequantize(quantizer.quantize(x.detach(), scale, offset), scale, offset)
    assert torch.equal(y, wanted)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
