"""Documents of a calibration source in an order of the seed: local files, datasets."""

import codecs
import glob
import json
import random
from collections.abc import Iterator
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from calibration.data_sources import BUILT_IN, SELF
from vllm_offq.errors import UserError, reason

LIBRARY_FORMATS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Files that the datasets library reads; .jsonl is read here, for line numbers in errors."""
JSON_LINES = (".jsonl", ".ndjson")
FILE_SUFFIXES = {".txt", ".md", *JSON_LINES, *LIBRARY_FORMATS}
"""A source that ends so is a file that is missing, not the name of a dataset."""
DEFAULT_COLUMNS = ("text", "messages")
WHOLE_TEXT_BYTES = 4 * 2**20
"""Of a file of plain text that is one document; tokenizing takes over a hundred times its size."""
PIECE_BYTES = 2**16
"""Of a larger one, which is read in pieces."""
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""Of UTF-8, all but the first of a character."""
SHUFFLE_BUFFER = 10_000
"""Documents that a stream is shuffled among, and that are read before the first comes."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Today, for chat templates that ask: the same input gives the same bytes on another day."""


class Document(NamedTuple):
    """A text, or chat messages as the chat template writes them."""

    text: str
    takes_eos: bool = True
    """Whether it ends here, and does not say so itself as a chat does."""


def read_documents(
    source: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Document]:
    """Documents, no more read than are taken (but SHUFFLE_BUFFER ahead of a stream).

    source: a key of BUILT_IN, FILE[:COLUMN] or NAME[:CONFIG[:SPLIT[:COLUMN]]]. A file that is
    neither .jsonl, .ndjson, .json, .parquet nor .csv is plain text: one document, or the pieces
    of a large one.
    Raises: UserError, at the document at fault, for what cannot be read.
    """
    source = BUILT_IN.get(source, source)
    file = file_and_column(source)
    if file is None:
        records, column = _dataset(source, seed), (*source.split(":"), "", "", "")[3]
    else:
        path, column = file
        if path.suffix.lower() in JSON_LINES:
            records = _json_lines(path, seed)
        elif path.suffix.lower() in LIBRARY_FORMATS:
            records = _library_file(path, seed)
        elif column:
            raise UserError(f"calibration file {path} is plain text and has no column {column}")
        else:
            yield from _plain_text(path, seed)
            return
    for where, record in records:
        yield _document(record, column, tokenizer, where)


def file_and_column(source: str) -> tuple[Path, str] | None:
    """The file that the source names, with "" where it names no column; None: no file.

    Raises: UserError if that does not exist.
    """
    head, _, tail = source.rpartition(":")
    for name, column in ((source, ""), (head, tail)):
        path = Path(name)
        if name and path.exists() and not path.is_dir():
            return path, column
    path = Path(source.partition(":")[0])
    is_path = path.suffix.lower() in FILE_SUFFIXES or source.startswith((".", "/"))
    if is_path and not path.is_dir():
        raise UserError(f"calibration file {source} does not exist; give FILE or FILE:COLUMN")
    return None


def _plain_text(path: Path, seed: int) -> Iterator[Document]:
    """The whole as one document, or pieces of it in an order of the seed."""
    try:
        if (size := path.stat().st_size) <= WHOLE_TEXT_BYTES:
            yield Document(path.read_text(encoding="utf-8-sig"))
            return
        starts = list(range(0, size, PIECE_BYTES))
        random.Random(seed).shuffle(starts)
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                piece = file.read(PIECE_BYTES)
                if start:  # what is left of a character that began before
                    piece = piece.lstrip(CONTINUATION_BYTES)
                # Unlike bytes.decode, a decoder leaves out a character that goes on behind.
                text = codecs.getincrementaldecoder("utf-8-sig")().decode(piece)
                yield Document(text, takes_eos=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"calibration file {path} cannot be read as UTF-8: {error}") from None


def _json_lines(path: Path, seed: int) -> Iterator[tuple[str, Any]]:
    """Where each record is, and the record. Lines are found first, and parsed when taken."""
    try:
        with path.open("rb") as file:
            starts = list(accumulate(map(len, file), initial=0))[:-1]
            order = list(range(len(starts)))
            random.Random(seed).shuffle(order)
            for index in order:
                where = f"calibration file {path}, line {index + 1}"
                file.seek(starts[index])
                line = file.readline()
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{where} cannot be read as UTF-8: {error}") from None
                except json.JSONDecodeError as error:
                    raise UserError(f"{where} is not JSON: {error.msg}") from None
    except OSError as error:
        raise UserError(f"calibration file {path} cannot be read: {error}") from None


def _library_file(path: Path, seed: int) -> Iterator[tuple[str, Any]]:
    where, format_name = f"calibration file {path}", LIBRARY_FORMATS[path.suffix.lower()]
    try:
        for row in _stream(seed, format_name, data_files=glob.escape(str(path)), split="train"):
            yield where, row
    except Exception as error:  # whatever the library raises
        raise UserError(f"{where} cannot be read ({reason(error)})") from None


def _dataset(source: str, seed: int) -> Iterator[tuple[str, Any]]:
    name, config, split, *rest = (*source.split(":"), "", "")
    if len(rest) > 3:
        raise UserError(
            f"calibration source {source} has too many parts; give NAME[:CONFIG[:SPLIT[:COLUMN]]]"
        )
    try:
        for row in _stream(seed, name, config or None, split=split or "train"):
            yield f"dataset {source}", row
    except Exception as error:  # whatever the library or the network raises
        raise UserError(
            f"calibration source {source} is neither a file nor a dataset that can be loaded "
            f"({reason(error)}); give a text file, one of {', '.join(BUILT_IN)}, or {SELF}, "
            "which needs no network"
        ) from None


def _stream(seed: int, *arguments: Any, **options: Any) -> Iterator[Any]:
    from datasets import load_dataset  # heavy, and needed by these sources only

    rows = load_dataset(*arguments, **options, streaming=True)
    yield from rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _document(record: Any, column: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """The text or messages in the column, or in the first of DEFAULT_COLUMNS with a value."""
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object with columns such as "text"')
    columns = [name for name in ([column] if column else DEFAULT_COLUMNS) if name in record]
    if not columns:
        wanted = f'column "{column}"' if column else 'column "text" or "messages"'
        raise UserError(
            f"{where} has no {wanted}; name one of its columns behind a colon: "
            f"{', '.join(map(str, record))}"
        )
    name = next((name for name in columns if record[name]), columns[0])
    value = record[name]
    if value is None or isinstance(value, str):
        return Document(value or "")
    if value == []:  # a conversation that templates may refuse, as they expect a first message
        return Document("")
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return Document(_chat(value, tokenizer, where), takes_eos=False)
    raise UserError(f'{where}: column "{name}" is neither a text nor a list of chat messages')


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} has chat messages, and the tokenizer no chat template to write them by; "
            "give a source of plain text"
        )
    # Arrow fills with None what a message lacks; templates ask whether it is there.
    present = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template(
            present, tokenize=False, strftime_now=TEMPLATE_DATE.strftime
        )
    except Exception as error:  # whatever the template raises
        raise UserError(f"{where}: the chat template refuses it ({reason(error)})") from None
    return str(text)
