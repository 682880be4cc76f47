"""`quantize`: what it writes, that it repeats, and what its settings change."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.pipeline import quantize
from calibration.report import Report, read_report
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint

QUICK = {"samples": 4, "sequence_length": 64}


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


def test_checkpoint_is_valid_and_complete(quantized: tuple[Path, Report], original: Path) -> None:
    out, _ = quantized
    validate_checkpoint(out)
    checkpoint = Checkpoint(out)
    assert checkpoint.config.recipe == "offq"
    assert checkpoint.config.kv_cache is not None and checkpoint.config.kv_cache.key_rotation
    assert checkpoint.model_config["tie_word_embeddings"] is False
    prompt = [{"role": "user", "content": "Hello"}]
    carried, expected = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(prompt, tokenize=False)
        for path in (out, original)
    )
    assert carried == expected
    assert (out / "generation_config.json").exists()
    card = (out / "README.md").read_text()
    assert "base_model_relation: quantized" in card


def test_generation_settings_are_kept_as_they_are(
    original: Path, text: Path, tmp_path: Path
) -> None:
    """Also a temperature without sampling, which transformers reads and would not write."""
    copied = tmp_path / "model"
    shutil.copytree(original, copied)
    (copied / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    settings = Settings(calibration=(str(text),), samples=2, sequence_length=32)
    quantize(str(copied), tmp_path / "out", settings)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"]) == (0.6, 0.9)


def test_linears_take_four_bits_and_their_scales(quantized: tuple[Path, Report]) -> None:
    checkpoint = Checkpoint(quantized[0])
    packed = [
        name
        for name in checkpoint.names
        if name.endswith("weight_packed") and not name.startswith("lm_head")
    ]
    weights = sum(2 * checkpoint.load(name).numel() for name in packed)
    stored = sum(
        checkpoint.load(name).nbytes
        for name in checkpoint.names
        if name.endswith(("weight_packed", "weight_scale")) and not name.startswith("lm_head")
    )
    scales = sum(checkpoint.shape(name)[0] for name in packed)
    assert 8 * stored / weights == pytest.approx(4 + 16 * scales / weights, rel=0.01)


def test_quantized_model_still_predicts_what_the_original_does(
    quantized: tuple[Path, Report], original: Path
) -> None:
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    model, _ = load_simulated(quantized[0])
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        expected, found = (m(tokens).logits.log_softmax(-1) for m in (reference, model))
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 1e-4 < divergence < 0.2  # it is quantized, and still close


def test_report_says_what_was_lost(quantized: tuple[Path, Report]) -> None:
    report = quantized[1]
    assert set(report.signal_to_noise) == set(Checkpoint(quantized[0]).config.sites)
    assert all(len(values) == 2 for values in report.signal_to_noise.values())
    assert all(15 < value < 35 for values in report.signal_to_noise.values() for value in values)
    assert len(report.output_error) == 14
    assert read_report(quantized[0]) == report
    on_disk = sum(file.stat().st_size for file in quantized[0].glob("*.safetensors"))
    assert on_disk - 65536 < report.checkpoint_bytes < on_disk  # which has headers as well
    assert sum(report.sizes.values()) == report.checkpoint_bytes
    assert report.spectrum is not None and report.histograms is not None
    original, _, centred = report.histograms.stages
    assert centred.max_magnitude < original.max_magnitude
    assert (quantized[0] / "report.html").stat().st_size > 10_000


def test_gptq_beats_rounding_on_every_layer(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), weights="rtn", **QUICK)
    nearest = quantize(str(original), tmp_path / "rtn", settings)
    for name, error in quantized[1].output_error.items():
        assert error < nearest.output_error[name], name


def test_gptq_goes_by_its_settings(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    """The first layer's first site sees the same tokens either way, but on the grid or not."""
    found = {"default": digests(quantized[0])}
    for option, value in (
        ("gptq_inputs", "quantized"),
        ("gptq_inputs", "corrected"),
        ("gptq_order", "activation"),
    ):
        settings = Settings(calibration=(str(text),), **{option: value}, **QUICK)
        report = quantize(str(original), tmp_path / value, settings)
        validate_checkpoint(tmp_path / value)
        assert report.signal_to_noise["attention_input"][0] == pytest.approx(
            quantized[1].signal_to_noise["attention_input"][0], abs=0.3
        )
        found[value] = digests(tmp_path / value)
    assert len({str(files) for files in found.values()}) == 4


def test_same_seed_and_input_give_the_same_bytes(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    quantize(str(original), tmp_path / "again", Settings(calibration=(str(text),), **QUICK))
    assert digests(tmp_path / "again") == digests(quantized[0])
    quantize(str(original), tmp_path / "other", Settings(calibration=(str(text),), seed=1, **QUICK))
    assert digests(tmp_path / "other") != digests(quantized[0])


@pytest.mark.parametrize("recipe", ["offq", "quarot", "rtn"])
def test_recipes_need_no_text_and_are_valid(recipe: str, original: Path, tmp_path: Path) -> None:
    """The default calibration is text that the model writes."""
    quantize(str(original), tmp_path / recipe, Settings(recipe=recipe, **QUICK))
    validate_checkpoint(tmp_path / recipe)
    load_simulated(tmp_path / recipe)


def test_sixteen_bit_cache_and_weight_groups(original: Path, tmp_path: Path) -> None:
    settings = Settings(kv_bits="16", group_size=32, weight_group_size=64, **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.kv_cache is None
    assert not [name for name in checkpoint.names if name.endswith("key_rotation")]
    assert checkpoint.shape("model.layers.0.mlp.down_proj.weight_scale") == (256, 384 // 64)


def test_activations_of_eight_bits_lose_less(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), activation_bits="8", **QUICK)
    report = quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    for site, values in report.signal_to_noise.items():
        for eight, four in zip(values, quantized[1].signal_to_noise[site], strict=True):
            assert 20 < eight - four < 28  # 24.6 dB: 17 times the levels
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits
        errors = [
            (load_simulated(folder)[0](tokens).logits - expected).norm()
            for folder in (tmp_path / "out", quantized[0])
        ]
    assert errors[0] < 0.95 * errors[1]  # the rest is of the weights and the cache
