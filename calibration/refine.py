"""`--refine`: a quantized model's scales and gains, brought closer to the original's predictions.

End to end, so both models are in memory as a whole. Some sequences are held aside: where the
divergence on them does not fall, the checkpoint stays as it is.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from calibration.instrument import instrument
from calibration.learning import Learning, divergence
from calibration.loader import Original
from calibration.progress import Progress
from calibration.report import Refinement
from calibration.resume import SavedRun
from calibration.settings import Settings
from calibration.simulate import simulated_model
from vllm_offq.errors import UserError
from vllm_offq.format import CheckpointConfig

BATCH_TOKENS = 1024
"""Of a step, or one sequence where that is longer."""
HELD_ASIDE = 16
"""One in so many sequences, and at least one, judges the result."""
SAVE_EVERY = 8
"""Steps."""
STATE = "refinement"


def refine(
    original: Original,
    config: CheckpointConfig,
    tensors: dict[str, Tensor],
    tokens: Tensor,
    settings: Settings,
    saved: SavedRun,
    progress: Progress,
) -> tuple[dict[str, Tensor], Refinement]:
    """Learn for `settings.refine` steps.

    original: its config is the checkpoint's; tensors: of the checkpoint; tokens: [S, T] int64.
    Returns: what replaces tensors of the checkpoint, by name, and what it brought.
    Raises: UserError if the divergence is not finite.
    """
    architecture, steps = original.architecture, settings.refine
    tokens = tokens[torch.randperm(len(tokens), generator=_generator(settings.seed))]
    count = max(1, len(tokens) // HELD_ASIDE)
    held_aside, tokens = tokens[:count], tokens[count:]
    batch_size = max(1, BATCH_TOKENS // tokens.shape[1])
    model = simulated_model(original.model.config, config, tensors, original.devices)
    instrument(original.model, architecture)  # forgets what quantizing has set in it

    def judge() -> float:
        parts = [
            divergence(model, original.model, architecture, batch) * len(batch)
            for batch in held_aside.split(batch_size)
        ]
        return _finite(sum(parts) / len(held_aside))

    learning = Learning(model, original.model, architecture, tensors, steps)
    with original.loaded(""), progress("refining", steps, unit="step") as advance:
        before = judge()
        if (kept := saved.load(STATE)) is not None:
            learning.restore(kept)
            advance(learning.done)
        batches = list(_batches(tokens, batch_size, steps, settings.seed))
        for batch in batches[learning.done :]:
            _finite(learning.step(batch))
            advance()
            if learning.done % SAVE_EVERY == 0:
                saved.save(STATE, learning.state())
        learned = learning.result()
        after = judge()
    used = after < before
    result = Refinement(steps=steps, before=before, after=after, used=used)
    return (learned if used else {}), result


def _finite(divergence: float) -> float:
    if not math.isfinite(divergence):
        raise UserError("--refine: the predictions are not finite; quantize without it")
    return divergence


def _batches(tokens: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """One for each step; every sequence once before any comes again."""
    generator = _generator(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(tokens), generator=generator).tolist()
        yield tokens[order[:batch_size]]
        order = order[batch_size:]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
