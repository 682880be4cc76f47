"""How close a model comes to the original on windows of text.

Imports nothing but torch: `benchmarks.peer_worker` runs it in another environment.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Of each window: mean negative log-likelihood, and against the original KL and top-1."""

    loss: list[float]
    kl: list[float]
    top1: list[float]


@torch.no_grad()
def logprobs(model: Callable[[Tensor], Any], window: Tensor) -> Tensor:
    """What a causal language model of transformers predicts after each token of a window.

    window: [T] int64. Returns: [T, vocabulary] float32.
    """
    return model(window[None]).logits[0].float().log_softmax(-1)


def loss(found: Tensor, window: Tensor) -> float:
    """Mean negative log-likelihood of all tokens but the first. found: [T, vocabulary]."""
    return float(-found[:-1].gather(1, window[1:, None]).mean())


def keep(found: Tensor, references: Path, number: int) -> None:
    """Write the original's log-probabilities of a window to a folder, as raw float32.

    Raises: OSError if the disk is full.
    """
    (references / f"{number}.bin").write_bytes(found.contiguous().numpy().data)


def kept(references: Path, number: int, length: int) -> Tensor:
    """What `keep` wrote, [length, vocabulary] float32, mapped into memory."""
    path = references / f"{number}.bin"
    size = path.stat().st_size // torch.float32.itemsize
    return torch.from_file(str(path), size=size).view(length, -1)


def score(
    model: Callable[[Tensor], Any],
    windows: Tensor,
    references: Path,
    progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
) -> Scores:
    """Run a model over all windows.

    windows: [W, T] int64; references: the folder of `keep`; progress: what shows an iteration.
    """
    scores = Scores([], [], [])
    for number, window in enumerate(progress(list(windows))):
        found = logprobs(model, window)
        scores.loss.append(loss(found, window))
        # In pieces: three tensors of the vocabulary's width at once are many.
        kl, agreed = 0.0, 0
        reference = kept(references, number, len(window))
        for p, q in zip(reference.split(128), found.split(128), strict=True):
            kl += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        scores.kl.append(kl / len(window))
        scores.top1.append(agreed / len(window))
    return scores
