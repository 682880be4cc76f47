"""Calibration text that the model writes itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vllm_offq.errors import UserError

BATCH_SIZE = 32


class _Tick(StoppingCriteria):
    """Never stops the model; tells the progress bar how many tokens each step has written."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def write_itself(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    advance: Callable[..., None],
) -> Tensor:
    """Text sampled from the model at temperature 1, from its start token on.

    Returns: token ids, [samples, sequence_length] int64. advance is called with the tokens of
    each step. Raises: UserError if the tokenizer has no token to start from, or one that the model
    does not have.
    """
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError(
            "the tokenizer has no BOS or EOS token to start writing from; give --calibration FILE"
        )
    refuse_foreign(start, model)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    torch.manual_seed(seed)
    sequences = []
    # What the model's own says beyond these would count too: penalties, other lengths.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for first in range(0, samples, BATCH_SIZE):
            prompt = torch.full((min(BATCH_SIZE, samples - first), 1), start, device=model.device)
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
    finally:
        model.generation_config = own
    return torch.cat(sequences).cpu()


def refuse_foreign(token: int, model: PreTrainedModel) -> None:
    """Raises: UserError if the token is not of the model's vocabulary."""
    if token >= (size := model.config.vocab_size):
        raise UserError(
            f"the tokenizer gives token {token}, but the model has only {size}, from 0 on; give "
            "the model with the tokenizer that it was trained with"
        )
