"""Mixtures of experts by `LLM(...)` answer what a plain transformers calculation says.

How close that is: see test_served.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_served import SENTENCES, Answer, assert_same_in_float32, calculate
from tiny_experts import MODELS, make_tiny_experts, quantize_experts, simulate_experts
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from vllm_server import ENVIRONMENT

pytestmark = pytest.mark.slow


class Models(NamedTuple):
    """The same model, original and quantized."""

    original: Path
    checkpoint: Path
    simulated: PreTrainedModel
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("experts")
    original = make_tiny_experts(folder / "original", request.param)
    checkpoint = quantize_experts(original, folder / "offq")
    tokenizer = AutoTokenizer.from_pretrained(original)
    prompts = [tokenizer(text).input_ids for text in SENTENCES]
    return Models(original, checkpoint, simulate_experts(original), prompts)


@pytest.fixture(scope="module")
def llm(models: Models) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from vllm import LLM

        llm = LLM(
            str(models.checkpoint),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_batched_tokens=64,  # so that longer prompts need several chunks
            max_num_seqs=8,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def ask(llm: Any, prompts: list[list[int]]) -> list[Answer]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    answers = []
    for request in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling):
        output = request.outputs[0]
        of_prompt = chosen(request.prompt_logprobs[1:], request.prompt_token_ids[1:])
        of_answer = chosen(output.logprobs, output.token_ids)
        answers.append(Answer(list(output.token_ids), of_prompt, of_answer))
    return answers


def chosen(entries: list[dict[int, Any]], tokens: list[int]) -> Tensor:
    """The log-probabilities of these tokens."""
    return torch.tensor([e[token].logprob for e, token in zip(entries, tokens, strict=True)])


def test_answers_are_those_of_transformers(llm: Any, models: Models) -> None:
    """Each prompt alone, and all in one batch."""
    assert len(models.prompts[-1]) > 2 * 64
    alone = [ask(llm, [prompt])[0] for prompt in models.prompts[:2]]
    together = ask(llm, models.prompts)
    expected = [calculate(models.simulated, prompt) for prompt in models.prompts]
    for answer, wanted in zip([*alone, *together], [*expected[:2], *expected], strict=True):
        assert_same_in_float32(answer, wanted)
