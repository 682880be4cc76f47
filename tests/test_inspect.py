"""`offq inspect`: sizes that add up, settings, and exit code 2 for what is invalid."""

import json
import sys
from pathlib import Path

import pytest
from sample_checkpoint import HIDDEN, VOCABULARY, tensors, write

from calibration.cli import main


def offq(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["offq", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_json_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path / "model")
    assert offq(monkeypatch, "inspect", str(checkpoint), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["valid"] is True
    assert content["problem"] is None
    assert content["bytes"] == sum(tensor.nbytes for tensor in tensors().values())
    assert content["bytes"] == sum(entry["bytes"] for entry in content["tensors"].values())
    assert content["bytes_on_disk"] > content["bytes"]
    for kind in ("embedding and head", "head, 8 bit"):
        assert content["tensors"][kind]["parameters"] == VOCABULARY * HIDDEN
    # Per layer and channel 16 bits more: 352 channels of 64 to 128 inputs.
    assert 4.1 < content["bits_per_quantized_weight"] < 4.25
    assert content["quantization_config"]["sites"]["mlp_output"]["online_hadamard"] == 32


def test_the_table_names_sites_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offq(monkeypatch, "inspect", str(write(tmp_path / "model"))) == 0
    output = capsys.readouterr().out
    for word in (
        "quantized weights",
        "down_proj",
        "asymmetric",
        "0.95",
        "head",
        "KV cache",
        "passed",
    ):
        assert word in output


@pytest.mark.parametrize("names", [[1], ["[/red]"], "Llama", ["\x1b[31mred"]])
def test_names_of_no_class_are_shown_and_refused(
    names: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write(tmp_path / "model[w4]")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": names}))
    assert offq(monkeypatch, "inspect", str(checkpoint)) == 2
    captured = capsys.readouterr()
    assert "model[w4]" in "".join(captured.out.split("\n"))
    assert "failed" in captured.out and "\x1b" not in captured.out
    assert captured.err.startswith("offq: ")


def test_an_invalid_checkpoint_is_shown_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path / "model")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    assert offq(monkeypatch, "inspect", str(checkpoint), "--json") == 2
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["valid"] is False
    assert "model.layers.1." in content["problem"]
    assert content["problem"] in captured.err


def test_no_checkpoint_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offq(monkeypatch, "inspect", str(tmp_path)) == 2
    assert "has no config.json" in capsys.readouterr().err
