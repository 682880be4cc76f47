"""The picture of a benchmark: a column for each kind of prompt, a row for each figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from serving.benchmark import Measured

FIGURES = {
    "output_tokens_per_second": "output tokens/s",
    "ttft_median_ms": "time to first token, ms",
    "tpot_median_ms": "time per output token, ms",
}
STYLES = {"original": "s--", "OffQ": "o-"}


def plot(found: Mapping[str, Sequence["Measured"]], file: Path) -> None:
    """Draw each figure over the number of concurrent streams, a line for each model."""
    prompts = list(
        dict.fromkeys(
            (one.load.shared_prefix, one.load.input_len)
            for of_model in found.values()
            for one in of_model
        )
    )
    size = (1 + 3.2 * len(prompts), 2.6 * len(FIGURES))
    figure, axes = plt.subplots(
        len(FIGURES), len(prompts), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for column, (prefix, input_len) in enumerate(prompts):
        shared = f"{prefix} shared + " if prefix else ""
        axes[0][column].set_title(f"{shared}{input_len} tokens in")
        axes[-1][column].set_xlabel("concurrent streams")
        for row, (name, label) in enumerate(FIGURES.items()):
            axis = axes[row][column]
            for model, of_model in found.items():
                points = [
                    (one.load.streams, getattr(one, name))
                    for one in of_model
                    if (one.load.shared_prefix, one.load.input_len) == (prefix, input_len)
                ]
                axis.plot(*zip(*points, strict=True), STYLES[model], label=model)
            streams = [streams for streams, _ in points]
            axis.set_xscale("log", base=2)
            axis.set_xticks(streams, [str(number) for number in streams])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
    axes[0][0].legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
