"""What a model's files say of it is read before it is loaded, or refused in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration.loader import load_original
from vllm_offq.errors import REASON_LENGTH, UserError, reason

SUPPORTED = "supported; supported: Gemma2ForCausalLM, .*Qwen3MoeForCausalLM$"


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, f"^architecture Mamba.* is not {SUPPORTED}"),
        ({"architectures": ["XForCausalLM"], "model_type": "x"}, f"XFor.* is not {SUPPORTED}"),
        ({"architectures": None, "model_type": "x"}, f"^architecture x is not {SUPPORTED}"),
        ({"architectures": [], "model_type": None}, rf"\(none named\) is not {SUPPORTED}"),
        ({"architectures": [1]}, r"architectures must be a list of class names, not \[1\]$"),
        ({"architectures": "LlamaForCausalLM"}, "class names, not 'LlamaForCausalLM'$"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers.* expected int, got str"),
        ({"hidden_act": "nonsense"}, r"its configuration wrong \(KeyError: 'nonsense'\)$"),
    ],
)
def test_configurations_that_are_refused(
    model: Path, changes: dict[str, Any], sentence: str
) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(UserError, match=sentence) as refusal:
        load_original(str(model))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "is no model: its config.json holds no JSON object"),
        ("{", "no readable model configuration .*line 1"),
    ],
)
def test_a_config_that_is_none(model: Path, content: str, sentence: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_original(str(model))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "x.XConfig"}, "model_type": "x"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_class": "X"},
        ),
    ],
)
def test_the_user_is_not_asked_about_code_of_the_model(
    model: Path, file: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / file, **changes)
    with pytest.raises(UserError):
        load_original(str(model))
    assert "[y/N]" not in capsys.readouterr().out


def test_a_folder_without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer that loads .* library serialization"):
        load_original(str(model))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a valid JSON file"),
        ("[]", "TypeError"),
    ],
)
def test_generation_settings_that_cannot_be_read(model: Path, content: str, sentence: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"generation_config.json cannot be read .*{sentence}"):
        load_original(str(model))


def test_generation_settings_may_be_none(model: Path) -> None:
    (model / "generation_config.json").unlink()
    assert load_original(str(model)).model.generation_config is not None


def test_a_reason_is_one_line_and_not_a_page() -> None:
    assert reason(KeyError("nonsense")) == "KeyError: 'nonsense'"
    assert (
        reason(ValueError("Either:\n  one\n\n or another")) == "ValueError: Either: one or another"
    )
    assert len(reason(ValueError("page " * 1000))) == REASON_LENGTH + 1
