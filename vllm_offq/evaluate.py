"""How far a served model is from its original, measured through vLLM's own engine.

So what is evaluated is what is served. vLLM is imported when an engine is started.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from vllm_offq.checkpoint import validate_checkpoint
from vllm_offq.errors import UserError
from vllm_offq.format import CONFIG_FILE, QUANT_METHOD
from vllm_offq.metrics import Comparison, Estimate, WindowScores, compare

WINDOWS_PER_REQUEST = 8
"""vLLM hands log-probabilities over as Python lists: at most so many windows of them at once."""

Progress = Callable[[str, int, int], None]
"""Called with the model, the number of windows done and their total."""


@dataclass(frozen=True)
class ModelEvaluation:
    """The figures of one model; those against the original are None without one."""

    model: str
    perplexity: Estimate
    perplexity_ratio: Estimate | None = None
    kl_divergence: Estimate | None = None
    top1_agreement: Estimate | None = None
    unseen_mass: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`."""

    original: ModelEvaluation | None
    models: list[ModelEvaluation]
    windows: int
    sequence_length: int
    top_logprobs: int
    dtype: str


def evaluate(
    models: Sequence[str],
    text: str,
    against: str | None = None,
    sequence_length: int = 1024,
    max_tokens: int | None = None,
    dtype: str | None = None,
    top_logprobs: int = 512,
    on_progress: Progress = lambda model, done, total: None,
) -> Evaluation:
    """Perplexity of models on a text and their divergence from an original.

    The text is tokenized once, by the first model's tokenizer, and cut into windows of
    sequence_length tokens, each of which begins as a prompt does; the first token of a window has
    no context and is not scored.
    models, against: folders or hub ids that vLLM can load. dtype: of the activations; None is
    float32 on a CPU, the model's own elsewhere. top_logprobs: see metrics.compare.
    Raises: UserError for bad input, before the first engine starts where possible.
    """
    if sequence_length < 2 or top_logprobs < 1:
        raise UserError("the sequence length must be at least 2 and the top log-probabilities 1")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens must be positive, not {max_tokens}; leave it out for all")
    everything = [*models, against] if against else [*models]
    for model in everything:
        _validate(model)
    tokenized = [_tokenize(model, text) for model in everything]
    for model, other in zip(everything, tokenized, strict=True):
        if other != tokenized[0]:
            raise UserError(
                f"{models[0]} and {model} tokenize the text differently: their figures cannot be "
                "compared"
            )
    windows = cut_windows(*tokenized[0], sequence_length, max_tokens)
    from vllm.platforms import current_platform

    dtype = dtype or ("float32" if current_platform.is_cpu() else "auto")
    vocabulary: int | None = None

    def scores(model: str, top_logprobs: int) -> Iterator[WindowScores]:
        nonlocal vocabulary
        on_progress(model, 0, len(windows))
        with _Engine(model, dtype, sequence_length, top_logprobs) as engine:
            if vocabulary is not None and engine.vocabulary != vocabulary:
                raise UserError(
                    f"{model} has a vocabulary of {engine.vocabulary} tokens, {everything[-1]} of "
                    f"{vocabulary}: their figures cannot be compared"
                )
            vocabulary = engine.vocabulary
            for done, window in enumerate(engine.score(windows), 1):
                yield window
                on_progress(model, done, len(windows))

    if against is None:
        evaluated = [
            ModelEvaluation(model, Estimate.of([_loss(x) for x in scores(model, 0)]).exp())
            for model in models
        ]
        return Evaluation(None, evaluated, len(windows), sequence_length, 0, dtype)

    references = list(scores(against, top_logprobs))
    losses = [_loss(reference) for reference in references]
    evaluated = []
    for model in models:
        model_losses: list[float] = []
        comparisons: list[Comparison] = []
        for reference, window in zip(references, scores(model, top_logprobs), strict=True):
            assert vocabulary is not None
            model_losses.append(_loss(window))
            comparisons.append(compare(reference, window, vocabulary))
        # Paired: what makes a window hard is common to both models.
        excess = [loss - base for loss, base in zip(model_losses, losses, strict=True)]
        evaluated.append(
            ModelEvaluation(
                model,
                Estimate.of(model_losses).exp(),
                Estimate.of(excess).exp(),
                Estimate.of([c.kl_divergence for c in comparisons]),
                Estimate.of([c.top1_agreement for c in comparisons]),
                float(np.mean([c.unseen_mass for c in comparisons])),
            )
        )
    original = ModelEvaluation(against, Estimate.of(losses).exp())
    return Evaluation(
        original, evaluated, len(windows), sequence_length, references[0].logprobs.shape[1], dtype
    )


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises: UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def prompt_start(tokenizer: Any) -> list[int]:
    """What a tokenizer of transformers puts before every prompt: BOS, or nothing."""
    with_special, without = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    return list(with_special[: with_special.index(without[0])])


def cut_windows(
    start: list[int], tokens: list[int], sequence_length: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Windows of sequence_length tokens, one after the other; a shorter end is left out.

    start: what each begins with, see prompt_start: a model that was trained with BOS is lost
    without it. tokens: of the text.
    Raises: UserError if there is not one whole window.
    """
    usable = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    body = sequence_length - len(start)
    starts = range(0, usable - body + 1, body)
    if not starts:
        limit = "" if usable == len(tokens) else f" of which {usable} may be used"
        raise UserError(
            f"the text has {len(tokens)} tokens{limit}, fewer than one window of "
            f"{sequence_length}; give a longer text or a shorter --sequence-length"
        )
    return [start + tokens[first : first + body] for first in starts]


class _Engine:
    """One vLLM engine, whose process and memory are gone after the block."""

    def __init__(self, model: str, dtype: str, sequence_length: int, top_logprobs: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        from vllm import LLM

        try:
            self._llm = LLM(
                model=model,
                dtype=dtype,  # type: ignore[arg-type, unused-ignore]
                max_model_len=sequence_length + 1,
                max_logprobs=-1,
                enforce_eager=True,
                limit_mm_per_prompt={"image": 0},  # only text is scored
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"vLLM cannot run {model}: {_sentence(error)}") from error
        self.vocabulary = int(self._llm.model_config.get_vocab_size())
        self.top_logprobs = min(top_logprobs, self.vocabulary)

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._llm.llm_engine.engine_core.shutdown(timeout=10)

    def score(self, windows: list[list[int]]) -> Iterator[WindowScores]:
        """Log-probabilities of all tokens but the first, window by window."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(
            max_tokens=1,
            prompt_logprobs=self.top_logprobs,
            flat_logprobs=True,
            detokenize=False,
        )
        for start in range(0, len(windows), WINDOWS_PER_REQUEST):
            prompts = [
                TokensPrompt(prompt_token_ids=window)
                for window in windows[start : start + WINDOWS_PER_REQUEST]
            ]
            for output in self._llm.generate(prompts, parameters, use_tqdm=False):
                yield self._window(output.prompt_logprobs)

    def _window(self, flat: Any) -> WindowScores:
        # Row by row: the token itself, then the top K (which may hold it again).
        width = self.top_logprobs + 1
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, width)
        token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, width)
        if np.isnan(logprobs).any():
            raise UserError("the model's log-probabilities are NaN: it is broken on this text")
        return WindowScores(logprobs[:, 0], token_ids[:, 1:], logprobs[:, 1:])


def _loss(scores: WindowScores) -> float:
    return -float(scores.target.astype(np.float64).mean())


def _sentence(error: BaseException) -> str:
    """The line that says what is wrong, of a message that may be a page."""
    if isinstance(error, ValidationError):  # vLLM's configuration classes are pydantic's
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def _validate(model: str) -> None:
    """Check a local OffQ checkpoint in full; anything else is left to vLLM."""
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model} does not exist; give a model folder or a hub id")
    try:
        config = json.loads((Path(model) / CONFIG_FILE).read_text(encoding="utf-8"))
        is_offq = config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return
    if is_offq:
        validate_checkpoint(Path(model))


def _tokenize(model: str, text: str) -> tuple[list[int], list[int]]:
    """What prompts begin with, and the text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} has no tokenizer that loads: {_sentence(error)}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return prompt_start(tokenizer), list(ids)
