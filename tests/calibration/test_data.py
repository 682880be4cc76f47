"""Calibration data: every source gives the sequences asked for, or says why not."""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from tiny_models import CORPUS, make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from calibration import data, data_documents
from calibration.data import calibration_tokens
from calibration.data_documents import Document, read_documents
from calibration.data_sources import BUILT_IN
from vllm_offq.errors import UserError

TEXT = "Every model answers the same question in its own words. " * 60
CHAT = [{"role": "user", "content": "moon"}, {"role": "assistant", "content": "It flew."}]
Loaded = tuple[PreTrainedModel, Tokenizer]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer(loaded: Loaded) -> Tokenizer:
    return AutoTokenizer.from_pretrained(loaded[1].name_or_path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where relative names of files lead."""
    monkeypatch.chdir(tmp_path)
    # The library gives the threads that read Parquet seconds to end, for the interpreter's exit.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return tmp_path


def tokens_of(
    loaded: Loaded | tuple[None, Tokenizer],
    *sources: str,
    samples: int = 3,
    length: int = 32,
    seed: int = 0,
) -> torch.Tensor:
    tokens = calibration_tokens(sources, *loaded, samples, length, seed, lambda steps: None)
    assert tokens.shape == (samples, length) and tokens.dtype == torch.int64
    return tokens


def write_jsonl(name: str, records: Iterable[Any]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def numbered(count: int = 200) -> list[dict[str, str]]:
    return [{"text": f"Document {index} of many. "} for index in range(count)]


def numbers_in(tokenizer: Tokenizer, tokens: torch.Tensor) -> set[str]:
    return set(re.findall(r"Document (\d+) of", "".join(map(tokenizer.decode, tokens))))


def test_plain_text_is_cut_in_runs_of_it(loaded: Loaded) -> None:
    text = "".join(f"{number} lamps were lit.\n\n" for number in range(400))
    Path("text.txt").write_text(text, encoding="utf-8-sig")
    tokens = tokens_of(loaded, "text.txt")
    rows = [loaded[1].decode(row) for row in tokens]
    assert all(row in text for row in rows) and len(set(rows)) == 3
    assert tokens_of(loaded, "text.txt").equal(tokens)
    assert not tokens_of(loaded, "text.txt", seed=1).equal(tokens)


def test_a_large_text_is_read_in_pieces(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of characters of three bytes, so that most pieces begin and end within one."""
    monkeypatch.setattr(data_documents, "WHOLE_TEXT_BYTES", 10_000)
    monkeypatch.setattr(data_documents, "PIECE_BYTES", 1_000)
    text = "".join(chr(0x4E00 + number) for number in range(20_000))
    Path("text.txt").write_text(text, encoding="utf-8-sig")
    documents = list(read_documents("text.txt", loaded[1], 0))
    assert len(documents) == 61 and not any(document.takes_eos for document in documents)
    assert all(document.text in text for document in documents)
    assert sum(len(document.text) for document in documents) > 20_000 - 61
    assert documents != list(read_documents("text.txt", loaded[1], 1))
    read: list[Document] = []

    def watched(*arguments: Any) -> Iterator[Document]:
        for document in read_documents(*arguments):
            read.append(document)
            yield document

    monkeypatch.setattr(data, "read_documents", watched)
    tokens_of(loaded, "text.txt")
    assert len(read) == 3, "as many pieces as samples hold enough"
    Path("text.txt").write_bytes(text.encode() + b"\xff" * 5_000)
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        list(read_documents("text.txt", loaded[1], 0))


def test_names_of_files_may_hold_any_sign(loaded: Loaded) -> None:
    for name in ("year=2024.txt", "a:b.txt", "text", "100% [1]*.md", "100% [1]*.csv"):
        Path(name).write_text("text\n" + TEXT)
        tokens_of(loaded, name)


def test_records_are_shuffled_by_the_seed(loaded: Loaded) -> None:
    source = write_jsonl("many.jsonl", numbered())
    tokens = tokens_of(loaded, source)
    assert tokens_of(loaded, source).equal(tokens)
    assert not tokens_of(loaded, source, seed=1).equal(tokens)
    assert max(map(int, numbers_in(loaded[1], tokens))) > 50  # not only the first


def test_no_more_records_are_read_than_needed(loaded: Loaded) -> None:
    Path("bad.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + '{"prose": ""}\n' * 1000)
    with pytest.raises(UserError, match='no column "text" or "messages"'):
        tokens_of(loaded, "bad.jsonl")
    Path("good.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 1000 + "{}\n")
    tokens_of(loaded, "good.jsonl")


def test_one_long_document_does_not_give_every_sample(loaded: Loaded) -> None:
    source = write_jsonl("long.jsonl", ({"text": f"Document {i} of " * 200} for i in range(20)))
    assert len(numbers_in(loaded[1], tokens_of(loaded, source, samples=10))) > 3


def test_texts_end_in_eos(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    source = write_jsonl("many.jsonl", numbered())
    text = "".join(tokenizer.decode(row) for row in tokens_of(loaded, source, samples=5))
    assert text.count("Document ") >= 5
    assert "many. Document" not in text and "many. </s>Document" in text


def test_bos_begins_every_sequence_and_is_nowhere_else(
    loaded: Loaded, tokenizer: Tokenizer
) -> None:
    """As a server does it, though the chat template writes BOS itself."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    for source in ("chat.jsonl", "text.jsonl"):
        records = numbered() if source == "text.jsonl" else [{"messages": CHAT}] * 99
        tokens = tokens_of((loaded[0], tokenizer), write_jsonl(source, records))
        assert (tokens[:, 0] == bos).all() and not (tokens[:, 1:] == bos).any()


def test_chats_go_through_the_template(loaded: Loaded) -> None:
    source = write_jsonl("chat.jsonl", [{"messages": CHAT}] * 80)
    text = loaded[1].decode(tokens_of(loaded, source)[0])
    assert "<|user|>moon\n<|assistant|>It flew.\n<|us" in text  # and EOS is the template's


def test_the_date_of_a_template_is_always_the_same(loaded: Loaded, tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0]['content'] }} "
    source = write_jsonl("chat.jsonl", [{"messages": CHAT}] * 80)
    text = tokenizer.decode(tokens_of((loaded[0], tokenizer), source)[0])
    assert "moon 2024 moon" in text and str(date.today().year) not in text


def test_texts_and_chats_in_one_file(loaded: Loaded) -> None:
    records = [{"messages": CHAT}, {"text": None, "messages": CHAT}, {"text": " "}] * 9
    records += [{"messages": []}] * 9
    tokens = tokens_of(loaded, write_jsonl("both.jsonl", [*records, {"text": TEXT}]), samples=25)
    text = "".join(loaded[1].decode(row) for row in tokens)
    assert "It flew.\n<|user|>moon" in text and "in its own words" in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.Parquet", "a.csv"])
def test_a_column_of_a_file(loaded: Loaded, name: str) -> None:
    records = [{"id": number, "prose": TEXT} for number in range(4)]
    if name in ("a.jsonl", "a.NDJSON"):
        write_jsonl(name, records)
    elif name == "a.json":
        Path(name).write_text(json.dumps(records))
    else:
        data = Dataset.from_list(records)
        (data.to_parquet if name == "a.Parquet" else data.to_csv)(name)
    assert loaded[1].decode(tokens_of(loaded, f"{name}:prose")[0])[5:-5] in TEXT
    for wrong in (name, f"{name}:words"):
        with pytest.raises(UserError, match=r"no column .*name one of its columns.*: id, prose$"):
            tokens_of(loaded, wrong)


def test_chats_of_parquet_lack_what_they_lack(loaded: Loaded, tokenizer: Tokenizer) -> None:
    """Parquet fills in None for what only other messages have."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'TOOL' if m.tool is defined else m.content }} {% endfor %}"
    )
    messages = [{"role": "user", "content": "moon"}, {"role": "tool", "tool": "lamp"}]
    Dataset.from_dict({"messages": [messages] * 90}).to_parquet("chat.parquet")
    text = tokenizer.decode(tokens_of((loaded[0], tokenizer), "chat.parquet")[0])
    assert "moon TOOL moon TOOL" in text


def test_a_dataset_by_name_config_split_and_column(loaded: Loaded) -> None:
    """The library loads a local folder by the same call as a name on the hub."""
    Path("set").mkdir()
    data = Dataset.from_dict({"text": [CORPUS * 4] * 9, "prose": [TEXT] * 9})
    data.to_parquet("set/train.parquet")
    Dataset.from_list(numbered()).to_parquet("set/validation.parquet")
    for source in ("set", "./set:default", "set:default:train"):
        assert loaded[1].decode(tokens_of(loaded, source)[0])[5:-5] in CORPUS * 4 + CORPUS
    assert loaded[1].decode(tokens_of(loaded, "set:::prose")[0])[5:-5] in TEXT
    tokens = tokens_of(loaded, "set::validation")
    assert numbers_in(loaded[1], tokens)
    assert tokens_of(loaded, "set::validation").equal(tokens)
    assert not tokens_of(loaded, "set::validation", seed=1).equal(tokens)
    for source, sentence in {
        "set:::words": 'no column "words"; name one of its columns behind a colon: text, prose',
        "set::tset": "tset",
        "set:other": "other",
        "set:default:train:text:more": "too many parts",
    }.items():
        with pytest.raises(UserError, match=sentence):
            tokens_of(loaded, source)


@pytest.mark.parametrize("source", BUILT_IN)
def test_built_in_sources(source: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append(f"{name}:{config}:{split}")
        rows = [{"messages": CHAT, "text": TEXT, "page": TEXT}] * 90
        return Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = loaded[1].decode(tokens_of(loaded, source)[0])
    assert ("<|user|>moon" in text) == (source == "ultrachat")
    assert asked == [BUILT_IN[source].rpartition(":")[0]]


def test_without_network(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    sentence = "neither a file nor a dataset .*Couldn't reach.*wikitext, c4, ultrachat, or self"
    for source in ("no-such-set", "nobody/nothing", "no-such-set:a:b:c"):
        with pytest.raises(UserError, match=sentence):
            tokens_of(loaded, source)


def test_self_written_text_is_seeded(loaded: Loaded) -> None:
    tokens = tokens_of(loaded, "self", samples=34)
    assert (tokens[:, 0] == loaded[1].bos_token_id).all()
    assert tokens_of(loaded, "self", samples=34).equal(tokens)
    assert not tokens_of(loaded, "self", samples=34, seed=1).equal(tokens)


def test_self_written_text_is_sampled_as_it_is(loaded: Loaded) -> None:
    """Whatever a model recommends for its answers: penalties, lengths, several at once."""
    tokens = tokens_of(loaded, "self")
    own = GenerationConfig(
        do_sample=True, repetition_penalty=9.0, max_new_tokens=3, num_return_sequences=2
    )
    loaded[0].generation_config = own
    assert tokens_of(loaded, "self").equal(tokens)
    assert loaded[0].generation_config is own


def test_weights_are_shares_of_the_samples(loaded: Loaded) -> None:
    Path("moon.txt").write_text("moon " * 900)
    Path("lamp.txt").write_text("lamp " * 900)
    ticks: list[int] = []
    sources = ("moon.txt=0.5", "lamp.txt=1.5", "self")
    tokens = calibration_tokens(sources, *loaded, 12, 32, 0, ticks.append)
    rows = [loaded[1].decode(row) for row in tokens]
    of_lamps = [row.count("lamp") > 5 for row in rows]
    assert sum(row.count("moon") > 5 for row in rows) == 2
    assert sum(of_lamps) == 6
    assert 0 < sum(of_lamps[:6]) < 6, "what sees the first half alone should see every source"
    assert 11 * 32 < sum(ticks) <= 12 * 32  # what is left is the tokens that the model starts from
    assert calibration_tokens(sources, *loaded, 12, 32, 0, ticks.append).equal(tokens)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n", "empty.txt is empty"),
        ("empty.jsonl", b'\n{"text": ""}\n', "empty.jsonl is empty"),
        ("short.txt", b"one sentence", r"has \d+ tokens, 3 samples of 32 need 96"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("binary.jsonl", b'{"text": "\xff"}', "line 1 cannot be read as UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("odd.jsonl", b'{"prose": "a", "n": 1}\n', "line 1 has no column .* prose, n$"),
        ("list.jsonl", b"[1]\n", "line 1 is not an object"),
        ("number.jsonl", b'{"text": 1}\n', 'line 1: column "text" is neither'),
        ("texts.jsonl", b'{"messages": ["a"]}\n', 'column "messages" is neither'),
        ("chat.jsonl", b'{"messages": [{"role": {}}]}\n', "line 1: the chat template refuses"),
        ("broken.json", b'[{"text": }]', "broken.json cannot be read"),
        ("broken.parquet", b"PAR1", "broken.parquet cannot be read"),
    ],
)
def test_bad_files_are_refused(
    tokenizer: Tokenizer, name: str, content: bytes, sentence: str
) -> None:
    tokenizer.chat_template = "{{ messages[0].role + messages[0].content }}"
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as refusal:
        tokens_of((None, tokenizer), name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.txt", "missing.txt does not exist"),
        ("missing.parquet:text", "missing.parquet:text does not exist"),
        ("./missing", "./missing does not exist"),
        ("there.txt:text", "there.txt is plain text and has no column text"),
        ("there.jsonl:a:b", "give FILE or FILE:COLUMN"),
    ],
)
def test_names_that_lead_nowhere(loaded: Loaded, source: str, sentence: str) -> None:
    Path("there.txt").write_text(TEXT)
    Path("there.jsonl").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        tokens_of(loaded, source)


def test_chats_need_a_chat_template(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    source = write_jsonl("chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match="line 1 has chat messages, and the tokenizer no chat temp"):
        tokens_of((None, tokenizer), source)
