"""`offq quantize` as a user runs it: what it writes, that it repeats, and how it refuses."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny, make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration import cli
from calibration.pipeline import quantize
from calibration.report import Report, read_report
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError
from vllm_offq.format import unpack_int8

QUICK = {"samples": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        "".join(f"In {year} a lamp was lit on rock {year % 7}.\n" for year in range(900))
    )
    return path


@pytest.fixture(scope="module")
def quantized(
    original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("quantized") / "offq"
    return out, quantize(str(original), out, Settings(calibration=(str(text),), **QUICK))


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


def test_the_head_takes_eight_bits_and_loses_next_to_nothing(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), head_bits="16", **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    checkpoint, unquantized = Checkpoint(quantized[0]), Checkpoint(tmp_path / "out")
    weight = unquantized.load("lm_head.weight").float()
    packed = checkpoint.load("lm_head.weight_packed")
    assert packed.nbytes == weight.numel()
    scale = checkpoint.load("lm_head.weight_scale").float()
    error = (unpack_int8(packed) * scale - weight).abs()
    assert (error <= scale / 2 + weight.abs() * 2.0**-8).all()  # which is bfloat16's rounding
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    expected, found = (
        load_simulated(folder)[0](tokens).logits for folder in (tmp_path / "out", quantized[0])
    )
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.02


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
    original, rotated, centred = report.histograms.stages
    assert original.rms == pytest.approx(rotated.rms, rel=1e-3)  # a rotation keeps lengths
    assert centred.max_magnitude < original.max_magnitude
    assert (quantized[0] / "report.html").stat().st_size > 10_000


def test_gptq_beats_rounding_on_every_layer(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), weights="rtn", **QUICK)
    nearest = quantize(str(original), tmp_path / "rtn", settings)
    for name, error in quantized[1].output_error.items():
        assert error < nearest.output_error[name], name


def test_gptq_inputs_decide_what_errors_are_minimised_on(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    """The first layer's first site sees the same tokens either way, but on the grid or not."""
    found = {"original": digests(quantized[0])}
    for inputs in ("quantized", "corrected"):
        settings = Settings(calibration=(str(text),), gptq_inputs=inputs, **QUICK)
        report = quantize(str(original), tmp_path / inputs, settings)
        validate_checkpoint(tmp_path / inputs)
        assert report.signal_to_noise["attention_input"][0] == pytest.approx(
            quantized[1].signal_to_noise["attention_input"][0], abs=0.3
        )
        found[inputs] = digests(tmp_path / inputs)
    assert len({str(files) for files in found.values()}) == 3


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
    settings = Settings(kv_bits="16", group_size=64, weight_group_size=64, **QUICK)
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


def test_embedding_of_eight_bits(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), embedding_bits="8", **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    small, large = (Checkpoint(folder) for folder in (tmp_path / "out", quantized[0]))
    name = "model.embed_tokens"
    wanted = large.load(f"{name}.weight").float()
    scale = small.load(f"{name}.weight_scale").float()
    found = load_simulated(tmp_path / "out")[0].get_submodule(name).weight
    # Half a step of the grid, and what storing the other in bfloat16 has rounded off.
    assert ((found - wanted).abs() <= 0.501 * scale + 2.0**-8 * wanted.abs()).all()
    assert small.load(f"{name}.weight_packed").dtype == torch.int8
    rest = [other for other in large.names if not other.startswith(name)]
    assert all(torch.equal(small.load(other), large.load(other)) for other in rest)


def test_both_ends_in_four_bits(original: Path, text: Path, tmp_path: Path) -> None:
    settings = Settings(calibration=(str(text),), head_bits="16", **QUICK)
    quantize(str(original), tmp_path / "large", settings)
    small = replace(settings, head_bits="4", embedding_bits="4")
    quantize(str(original), tmp_path / "gptq", small)
    quantize(str(original), tmp_path / "nearest", replace(small, weights="rtn"))
    large, tokenizer = load_simulated(tmp_path / "large")
    tokens = torch.tensor([tokenizer(text.read_text())["input_ids"][:256]])
    hidden = large.get_decoder()(tokens)[0]
    wanted = large.lm_head(hidden)
    errors = []
    for name in ("gptq", "nearest"):
        validate_checkpoint(tmp_path / name)
        found, _ = load_simulated(tmp_path / name)
        checkpoint = Checkpoint(tmp_path / name)
        for end in ("model.embed_tokens", "lm_head"):
            expected = large.get_submodule(end).weight
            assert checkpoint.load(f"{end}.weight_packed").nbytes * 2 == expected.numel()
            off = (found.get_submodule(end).weight - expected).norm() / expected.norm()
            assert 0.02 < off < 0.15
        errors.append((found.lm_head(hidden) - wanted).norm() / wanted.norm())
    assert errors[0] < errors[1] < 0.15


def test_an_embedding_that_vllm_keeps_is_refused(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "model", "Gemma2")
    with pytest.raises(UserError, match="--embedding-bits 8 is not supported for Gemma2"):
        quantize(str(source), tmp_path / "out", Settings(embedding_bits="8", **QUICK))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["offq", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_command_line(
    original: Path,
    text: Path,
    quantized: tuple[Path, Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--calibration", text, "--samples", 4, "--sequence-length", 64]
    assert run(monkeypatch, "quantize", original, tmp_path / "out", *options) == 0
    assert digests(tmp_path / "out") == digests(quantized[0])
    printed = capsys.readouterr().out
    assert "signal to noise, mlp output" in printed and "smaller" in printed


def damaged(original: Path, folder: Path, change: str) -> Path:
    """A copy of the original with one thing wrong."""
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    if change == "architecture":
        config["architectures"] = ["MambaForCausalLM"]
    elif change == "quantized":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    elif change == "no config":
        (folder / "config.json").unlink()
        return folder
    elif change == "NaN weight":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "huge weight":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "overflow":
        tensors = load_file(folder / "model.safetensors")
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e25
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("architecture", "MambaForCausalLM is not supported; supported: Gemma2ForCausalLM, "),
        ("quantized", "quantized already"),
        ("no config", "has no config.json"),
        ("NaN weight", "model.layers.1.mlp.up_proj.weight has NaN"),
        ("huge weight", "layer 1, mlp.gate_proj/mlp.up_proj: a weight is too large"),
        ("overflow", "layer 1 gives NaN or infinite activations"),
        ("truncated", "cannot be loaded"),
    ],
)
def test_bad_models_are_refused(
    change: str,
    sentence: str,
    original: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = damaged(original, tmp_path / "model", change)
    options = ["--calibration", text, "--samples", 4, "--sequence-length", 64]
    assert run(monkeypatch, "quantize", model, tmp_path / "out", *options) == 2
    assert_one_sentence(capsys, sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def assert_one_sentence(capsys: pytest.CaptureFixture[str], sentence: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("offq: ") and sentence in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--group-size", "48"], "--group-size from [128, 64, 32, 16]"),
        (["--weight-group-size", "32"], "--weight-group-size"),
        (["--samples", "0"], "--samples"),
        (["--calibration", "missing.txt"], "missing.txt does not exist"),
        (["--calibration", "no-such-dataset"], "neither a file nor a dataset"),
        (["--samples", "4000"], "give more text or lower --samples"),
    ],
)
def test_bad_options_are_refused(
    options: list[str],
    sentence: str,
    original: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    defaults = ["--calibration", text, "--samples", 4, "--sequence-length", 64]
    assert run(monkeypatch, "quantize", original, tmp_path / "out", *defaults, *options) == 2
    assert_one_sentence(capsys, sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["no-such-folder", "nobody/no-such-model", "text.txt"])
def test_what_is_no_model_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text.txt").write_text("no model")
    with pytest.raises(UserError, match=source):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_unless_overwritten(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), **QUICK)
    out = tmp_path / "out"
    quantize(str(original), out, settings)
    before = digests(out)
    with pytest.raises(UserError, match="--overwrite"):
        quantize(str(original), out, settings)
    assert digests(out) == before
    other = Settings(calibration=(str(text),), seed=1, **QUICK)
    quantize(str(original), out, other, overwrite=True)
    assert digests(out) != before
