"""Calibration sequences: from a text or jsonl file, a dataset, or written by the model itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vllm_offq.errors import UserError

SELF = "self"
"""Name of the source that needs no data: the model samples its own text."""
SELF_BATCH_SIZE = 32
FILE_SUFFIXES = {".txt", ".jsonl", ".json", ".md", ".csv", ".parquet"}
"""A source that ends so is a file that is missing, not the name of a dataset."""


def calibration_tokens(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    advance: Callable[..., None],
) -> Tensor:
    """Sequences of token ids, [samples, sequence_length] int64, the same for the same seed.

    source: "self", a .jsonl file (a "text" field or chat "messages" a line), any other text
    file, or a datasets-library name, NAME[:CONFIG[:SPLIT]] with a "text" or "messages" column.
    Raises: UserError if the source cannot be read or holds too few tokens.
    """
    if source == SELF:
        return _write_itself(model, tokenizer, samples, sequence_length, seed, advance)
    needed = samples * sequence_length
    text = _read(Path(source), tokenizer) if Path(source).exists() else None
    if text is None:
        text = _read_dataset(source, tokenizer, needed)
    if not text.strip():
        raise UserError(f"calibration text {source} is empty; give one with text in it")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = _special_start(tokenizer)
    body = sequence_length - len(starts)
    available = len(tokens) // body
    if available < samples:
        raise UserError(
            f"calibration text {source} has {len(tokens)} tokens, {samples} samples of "
            f"{sequence_length} need {needed}; give more text or lower --samples or "
            "--sequence-length"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    chunks = tokens[: available * body].view(available, body)[chosen.sort().values]
    return torch.cat([starts.expand(samples, -1), chunks], 1)


def _special_start(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every prompt (BOS or nothing), as a server will."""
    with_special, without = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    return torch.tensor(with_special[: len(with_special) - len(without)], dtype=torch.int64)


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"calibration text {path} cannot be read as UTF-8: {error}") from None
    if path.suffix != ".jsonl":
        return text
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None
        documents.append(_document(record, tokenizer, f"{path}, line {number}"))
    return "\n\n".join(documents)


def _document(record: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if isinstance(record, dict):
        if isinstance(text := record.get("text"), str):
            return text
        if isinstance(messages := record.get("messages"), list):
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
    raise UserError(f'{where} needs an object with a "text" string or a "messages" list')


def _read_dataset(source: str, tokenizer: PreTrainedTokenizerBase, needed: int) -> str:
    if Path(source).suffix in FILE_SUFFIXES:
        raise UserError(f"calibration text {source} does not exist")
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    from datasets import load_dataset  # heavy, and needed by this source only

    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        documents: list[str] = []
        characters = 0
        for row in rows:
            documents.append(_document(row, tokenizer, f"dataset {source}"))
            characters += len(documents[-1])
            if characters > 16 * needed:  # more than any tokenizer needs for that many tokens
                break
    except UserError:
        raise
    except Exception as error:  # whatever the library or the network raises
        raise UserError(
            f"calibration source {source} is neither a file nor a dataset that can be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            f"give a text file, or --calibration {SELF}"
        ) from None
    return "\n\n".join(documents)


class _Tick(StoppingCriteria):
    """Never stops the model; tells the progress bar how many tokens each step has written."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def _write_itself(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    advance: Callable[..., None],
) -> Tensor:
    """Text sampled from the model at temperature 1, from its start token on."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError(
            "the tokenizer has no BOS or EOS token to start writing from; give --calibration FILE"
        )
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    torch.manual_seed(seed)
    sequences = []
    for first in range(0, samples, SELF_BATCH_SIZE):
        prompt = torch.full((min(SELF_BATCH_SIZE, samples - first), 1), start)
        sequences.append(
            generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_length=sequence_length,
                eos_token_id=None,  # write on to the full length
                pad_token_id=start,
                stopping_criteria=StoppingCriteriaList([_Tick(advance)]),
            )
        )
    return torch.cat(sequences)
