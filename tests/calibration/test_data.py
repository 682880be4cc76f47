"""Calibration text: every source gives the sequences asked for, or says why not."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from calibration.data import calibration_tokens
from vllm_offq.errors import UserError

TEXT = "Every model answers the same question in its own words. " * 60


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Tokenizer]:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def tokens_of(
    loaded: tuple[PreTrainedModel, Tokenizer], source: str, samples: int = 3, seed: int = 0
) -> torch.Tensor:
    return calibration_tokens(source, *loaded, samples, 32, seed, lambda steps: None)


def test_plain_text(loaded: tuple[PreTrainedModel, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokens = tokens_of(loaded, str(path))
    assert tokens.shape == (3, 32) and tokens.dtype == torch.int64
    assert all(loaded[1].decode(row)[5:-5] in TEXT for row in tokens)
    assert not tokens_of(loaded, str(path), seed=1).equal(tokens)


def test_jsonl_of_text_and_of_messages(
    loaded: tuple[PreTrainedModel, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    records = [{"text": TEXT}, {"messages": [{"role": "user", "content": "moon"}]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert tokens_of(loaded, str(path)).shape == (3, 32)
    path.write_text("".join(json.dumps(records[1]) + "\n" for _ in range(80)))
    assert "<|user|>moon" in loaded[1].decode(tokens_of(loaded, str(path))[0])


def test_dataset(loaded: tuple[PreTrainedModel, Tokenizer], tmp_path: Path) -> None:
    """The library loads a local folder by the same call as a name on the hub."""
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"text": [TEXT]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match="cannot be read"):
        tokens_of(loaded, str(tmp_path / "set"))
    assert tokens_of(loaded, f"{tmp_path / 'set'}:default:train").shape == (3, 32)


def test_self_written_text_is_seeded(loaded: tuple[PreTrainedModel, Tokenizer]) -> None:
    tokens = tokens_of(loaded, "self", samples=34)
    assert tokens.shape == (34, 32)
    assert (tokens[:, 0] == loaded[1].bos_token_id).all()
    assert tokens_of(loaded, "self", samples=34).equal(tokens)
    assert not tokens_of(loaded, "self", samples=34, seed=1).equal(tokens)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("short.txt", b"one sentence", "samples of 32 need 96"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("odd.jsonl", b'{"prose": "a"}\n', "line 1"),
    ],
)
def test_bad_text_is_refused(
    loaded: tuple[PreTrainedModel, Tokenizer],
    tmp_path: Path,
    name: str,
    content: bytes,
    sentence: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        tokens_of(loaded, str(tmp_path / name))
