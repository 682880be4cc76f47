"""Calibration sequences from one or several sources, shuffled and packed by the seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibration.data_documents import read_documents
from calibration.data_self import refuse_foreign, write_itself
from calibration.data_sources import SELF, shares
from vllm_offq.errors import UserError
from vllm_offq.evaluate import prompt_start


def calibration_tokens(
    sources: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    advance: Callable[..., None],
) -> Tensor:
    """Sequences of token ids, [samples, sequence_length] int64, the same for the same seed.

    sources: values of --calibration, SOURCE or SOURCE=WEIGHT. Sequences of several are shuffled:
    trials of bases and clip ratios see the first ones alone.
    advance: called with the number of tokens made, samples * sequence_length in all at most.
    Raises: UserError if a source cannot be read, holds too few tokens, or some that the model does
    not have.
    """
    parts = []
    for source, count in shares(sources, samples).items():
        if source == SELF:
            parts.append(write_itself(model, tokenizer, count, sequence_length, seed, advance))
        else:
            parts.append(_pack(source, tokenizer, count, sequence_length, seed))
            refuse_foreign(int(parts[-1].max()), model)
            advance(parts[-1].numel())
    tokens = torch.cat(parts)
    if len(parts) > 1:
        tokens = tokens[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))]
    return tokens


def _pack(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
) -> Tensor:
    """Documents behind one another, cut to sequences, of which the seed chooses.

    Every sequence begins with what a server puts before a prompt, and only there: BOS draws much
    of the attention, so one amid a sequence would show the quantizer what no server sees. EOS
    ends a text, where the tokenizer has one; the chat template itself ends a chat.
    """
    start = prompt_start(tokenizer)
    eos = tokenizer.eos_token_id
    body = sequence_length - len(start)
    parts: list[Tensor] = []
    num_tokens = 0
    # As many documents as samples at least, or one long document would be all that is seen.
    documents = (each for each in read_documents(source, tokenizer, seed) if each.text.strip())
    for number, document in enumerate(documents, 1):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[len(start) :] if ids[: len(start)] == start else ids  # templates write BOS
        if eos is not None and document.takes_eos:
            ids = [*ids, eos]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        num_tokens += len(ids)
        if number >= samples and num_tokens >= samples * body:
            break
    if not num_tokens:
        raise UserError(f"calibration source {source} is empty; give one with text in it")
    available = num_tokens // body
    if available < samples:
        raise UserError(
            f"calibration source {source} has {num_tokens} tokens, {samples} samples of "
            f"{sequence_length} need {samples * body}; give more text or lower --samples or "
            "--sequence-length"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    tokens = torch.cat(parts)[: available * body]
    chunks = tokens.view(available, body)[chosen.sort().values]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(samples, -1), chunks], 1)
