"""What models score on tasks, and two of them side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

from serving.paired import (
    Disagreement,
    MeanDifference,
    disagreement,
    mean_difference,
    standard_error,
)
from vllm_offq.errors import UserError

LOGLIKELIHOOD = "log-likelihood"


@dataclass(frozen=True)
class Score:
    """One metric of one task for one model."""

    value: float
    standard_error: float | None
    higher_is_better: bool
    of_documents: tuple[float, ...] | None
    """The same for every document, where it is a plain number of each."""


@dataclass(frozen=True)
class TaskScores:
    """All metrics of one task for one model."""

    documents: tuple[str, ...]
    """A hash of each, in order."""
    metrics: dict[str, Score]


@dataclass(frozen=True)
class Row:
    """One metric of one task, of both models; None where OffQ's has no scores."""

    task: str
    metric: str
    documents: int
    original: float
    original_standard_error: float | None
    offq: float | None
    offq_standard_error: float | None
    recovery_percent: float | None
    """What OffQ keeps of the original's score; of a perplexity, the inverse ratio."""
    paired: Disagreement | MeanDifference | None
    """Document by document."""


def compare(
    original: Mapping[str, TaskScores], offq: Mapping[str, TaskScores] | None = None
) -> list[Row]:
    """Set two models' scores side by side, or the original's alone.

    Raises: UserError if they are not of the same documents.
    """
    rows = []
    for task, before in original.items():
        after = None if offq is None else offq[task]
        if after is not None and before.documents != after.documents:
            raise UserError(f"the data of {task} changed between the two models; evaluate again")
        for metric, score in before.metrics.items():
            other = None if after is None else after.metrics[metric]
            rows.append(_row(task, metric, len(before.documents), score, other))
    return rows


def _row(task: str, metric: str, documents: int, before: Score, after: Score | None) -> Row:
    return Row(
        task=task,
        metric=metric,
        documents=documents,
        original=before.value,
        original_standard_error=_error(before),
        offq=None if after is None else after.value,
        offq_standard_error=None if after is None else _error(after),
        recovery_percent=None if after is None else _recovery(metric, before, after),
        paired=None if after is None else _paired(before, after),
    )


def _error(score: Score) -> float | None:
    if score.standard_error is not None or score.of_documents is None:
        return score.standard_error
    is_mean = abs(sum(score.of_documents) / len(score.of_documents) - score.value) < 1e-9
    return standard_error(score.of_documents) if is_mean else None


def _recovery(metric: str, before: Score, after: Score) -> float | None:
    """A share is of a scale that begins at 0, which log-likelihoods are not on."""
    if metric == LOGLIKELIHOOD:
        return None
    part, whole = (after, before) if before.higher_is_better else (before, after)
    return 100 * part.value / whole.value if whole.value > 0 else None


def _paired(before: Score, after: Score) -> Disagreement | MeanDifference | None:
    first, second = before.of_documents, after.of_documents
    if not first or not second:
        return None
    if {*first, *second} <= {0.0, 1.0}:
        return disagreement(first, second)
    return mean_difference(first, second)
