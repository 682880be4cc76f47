"""What the task files of this folder read: documents from files, without a network.

lm-evaluation-harness calls these with its metadata, in which `data_folder` stands.
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from vllm_offq.errors import UserError

PIECE = 2000
"""Characters of a document that plain text is cut into, about: enough to read on from."""


def read_jsonl(data_folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """One document a line."""
    path = _existing(data_folder, file)
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    documents = [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return {"test": Dataset.from_list(documents)}


def read_text(data_folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """A plain text as documents of whole lines, so that there is a sample to compare on."""
    pieces = [""]
    for line in _existing(data_folder, file).read_text(encoding="utf-8").splitlines(keepends=True):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += line
    return {"test": Dataset.from_dict({"text": [piece for piece in pieces if piece.strip()]})}


def perplexities(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """As lm-evaluation-harness's wikitext counts words and bytes."""
    ((loglikelihood, _),) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{place} is not an object")
    return document


def _existing(folder: str, file: str) -> Path:
    path = Path(folder, file)
    if not path.is_file():
        raise UserError(f"the data file {path} does not exist; serving/tasks/ says what it holds")
    return path
