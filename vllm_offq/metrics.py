"""Perplexity, KL divergence and top-1 agreement from the log-probabilities of two models."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class WindowScores(NamedTuple):
    """What one model says about the T scored tokens of one window of text."""

    target: Floats
    """[T], the log-probability of each token that follows."""
    token_ids: NDArray[np.integer]
    """[T, K], the K likeliest tokens, the likeliest first."""
    logprobs: Floats
    """[T, K], of those."""


@dataclass(frozen=True)
class Comparison:
    """Means over the tokens of one window."""

    kl_divergence: float
    top1_agreement: float
    unseen_mass: float
    """Probability, by the original, of the tokens that are not in both models' top K."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None where there is one window only."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, window_means: list[float]) -> "Estimate":
        """From the means of windows of equal length.

        Tokens of one text depend on each other, so the windows, not the tokens, are the sample.
        """
        count = len(window_means)
        error = float(np.std(window_means, ddof=1) / count**0.5) if count > 1 else None
        return cls(float(np.mean(window_means)), error)

    @classmethod
    def of_ratio(cls, window_means: list[float], others: list[float]) -> "Estimate":
        """Of the mean of some window means to the mean of others, of the same windows.

        To first order, the error is that of the mean of what is left of each window's pair.
        """
        base = float(np.mean(others))
        ratio = float(np.mean(window_means)) / base
        pairs = zip(window_means, others, strict=True)
        left = cls.of([(mean - ratio * other) / base for mean, other in pairs])
        return cls(ratio, left.standard_error)

    def exp(self) -> "Estimate":
        """Of exp(value), to first order: a mean negative log-likelihood becomes a perplexity."""
        value = float(np.exp(self.value))
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)


def compare(original: WindowScores, other: WindowScores, vocabulary: int) -> Comparison:
    """KL(original || other) and agreement of the likeliest token.

    Tokens in both models' top K count one by one, all others as one: merging outcomes can only
    lower a KL divergence, so this is a lower bound. It is exact when K reaches the vocabulary.
    """
    found, other_logprobs = _look_up(original.token_ids, other, vocabulary)
    p = np.where(found, np.exp(original.logprobs.astype(np.float64)), 0.0)
    q = np.where(found, np.exp(other_logprobs), 0.0)
    with np.errstate(divide="ignore"):  # a token that `other` rules out makes KL infinite
        log_ratio = original.logprobs - other_logprobs
    kl = np.where(p > 0, p * np.where(p > 0, log_ratio, 0.0), 0.0).sum(-1)
    # What is left of 1 is known to the rounding of float32 only.
    rounding = float(np.finfo(np.float32).eps)
    p_rest, q_rest = (np.maximum(1.0 - part.sum(-1), rounding) for part in (p, q))
    has_rest = found.sum(-1) < vocabulary
    kl += np.where(has_rest, p_rest * np.log(p_rest / q_rest), 0.0)
    return Comparison(
        kl_divergence=float(kl.mean()),
        top1_agreement=float((original.token_ids[:, 0] == other.token_ids[:, 0]).mean()),
        unseen_mass=float(np.where(has_rest, p_rest, 0.0).mean()),
    )


def _look_up(
    token_ids: NDArray[np.integer], scores: WindowScores, vocabulary: int
) -> tuple[NDArray[np.bool_], Floats]:
    """Whether each of token_ids [T, K] is among the scores of its row, and its log-probability."""
    rows = np.arange(len(token_ids), dtype=np.int64)[:, None] * vocabulary
    wanted, keys = (rows + token_ids).ravel(), (rows + scores.token_ids).ravel()
    order = np.argsort(keys)
    place = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
    found = (keys[place] == wanted).reshape(token_ids.shape)
    logprobs = scores.logprobs.astype(np.float64).ravel()[place].reshape(token_ids.shape)
    return found, logprobs
