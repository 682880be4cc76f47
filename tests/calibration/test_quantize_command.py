"""`offq quantize` on the command line: what it says, and how it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantize import digests
from transformers import AutoTokenizer

from calibration import cli
from calibration.pipeline import quantize
from calibration.report import Report
from calibration.settings import Settings
from vllm_offq.errors import UserError

QUICK = {"samples": 4, "sequence_length": 64}


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
    elif change == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([*map("<{}>".format, range(400)), "lamp"])
        tokenizer.bos_token = "lamp"
        tokenizer.save_pretrained(folder)
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


@pytest.mark.parametrize("model", ["../model", "./model", "out/my--model", "models/llama-"])
def test_paths_that_lead_nowhere(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "quantize", model, "out") == 2
    assert_one_sentence(capsys, f"{model} does not exist and is no hub id")


@pytest.mark.parametrize("place", ["model", "out"])
def test_names_that_no_file_can_have_are_refused(
    place: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"model": original, "out": tmp_path / "out"} | {place: tmp_path / ("a" * 300)}
    assert run(monkeypatch, "quantize", *paths.values()) == 2
    assert_one_sentence(capsys, "is too long a name; choose a shorter one")
    assert not any(tmp_path.iterdir())


def assert_one_sentence(capsys: pytest.CaptureFixture[str], sentence: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("offq: ") and sentence in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--group-size", "48"], "--group-size from [128, 64, 32, 16]"),
        (["--group-size", "0"], "--group-size must be positive, not 0"),
        (["--group-size", "-64"], "--group-size must be positive, not -64"),
        (["--recipe", "quarot", "--group-size", "64"], "--group-size does nothing for the recipe"),
        (["--weight-group-size", "32"], "--weight-group-size"),
        (["--weight-group-size", "0"], "--weight-group-size must be positive, not 0"),
        (["--weight-group-size", "-128"], "--weight-group-size must be positive, not -128"),
        (["--recipe", "rtn", "--weight-group-size", "64"], "--weight-group-size does nothing for"),
        (["--seed", "1180591620717411303424"], "--seed must be from 0 to 2^64 - 1"),
        (["--weights", "rtn", "--refits", "2"], "--refits 2 does nothing for weights that are"),
        (["--recipe", "rtn", "--gptq-inputs", "corrected"], "--gptq-inputs corrected does nothing"),
        (["--weights", "rtn", "--gptq-order", "activation"], "--gptq-order activation does noth"),
        (["--recipe", "quarot", "--basis", "all"], "--basis all does nothing for the recipe quar"),
        (["--recipe", "rtn", "--head-basis", "hadamard"], "--head-basis hadamard does nothing"),
        (["--seed", "-1"], "--seed must be from 0 to 2^64 - 1"),
        (["--device", "cpu:5"], "--device cpu:5 is not supported; choose cpu, "),
        (["--sequence-length", "2048"], "--sequence-length 2048 is more than the 1024 tokens"),
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


@pytest.mark.parametrize("calibration", ["text", "self"])
def test_a_tokenizer_of_another_model_is_refused(
    calibration: str,
    original: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = damaged(original, tmp_path / "model", "tokenizer")
    source = text if calibration == "text" else calibration
    options = ["--calibration", source, "--samples", 4, "--sequence-length", 64]
    assert run(monkeypatch, "quantize", model, tmp_path / "out", *options) == 2
    assert_one_sentence(capsys, "but the model has only 512, from 0 on; give the model with the")


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


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("model", "model"),
        ("model", "link"),
        ("link", "model"),
        ("model", "."),
        ("model/some.gguf", "model"),
        ("elsewhere", "model"),
        (".", "."),
    ],
)
def test_a_model_is_not_written_over_itself(
    source: str,
    out: str,
    overwrite: bool,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(original, tmp_path / "model")
    (tmp_path / "model" / "some.gguf").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "elsewhere").mkdir()  # its weights are links, as in the hub's cache
    for file in (tmp_path / "model").iterdir():
        (tmp_path / "elsewhere" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="from which the original is read"):
        quantize(source, out, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


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
