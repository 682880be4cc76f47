"""The table of `benchmarks.accuracy`."""

from rich.table import Table

from benchmarks.scores import Scores
from vllm_offq.metrics import Estimate

COLUMNS = ("bits/weight", "perplexity", "ratio", "KL", "of quarot's", "top-1")


def table(
    rows: dict[str, dict[str, tuple[Scores, float]]],
    modes: tuple[str, ...],
    original: Scores,
    title: str,
) -> Table:
    """A row for each recipe and mode; differences are paired, ± is the standard error.

    rows: of each recipe and mode, its scores and bits of a quantized weight; modes: their order.
    """
    result = Table(title=title)
    for column in ("recipe", "mode"):
        result.add_column(column)
    for column in COLUMNS:
        result.add_column(column, justify="right")
    perplexity = Estimate.of(original.loss).exp()
    result.add_row("original", "16 bit", "16", f"{perplexity.value:.2f}", "1", "0", "", "1")
    for mode in modes:
        result.add_section()
        quarot = rows.get("quarot", {}).get(mode)
        for name, measured in rows.items():
            if mode not in measured:
                continue
            scores, bits = measured[mode]
            pairs = zip(scores.loss, original.loss, strict=True)
            ratio = Estimate.of([loss - base for loss, base in pairs]).exp()
            kl = Estimate.of(scores.kl)
            share = "" if quarot is None else _cell(Estimate.of_ratio(scores.kl, quarot[0].kl), 3)
            result.add_row(
                name,
                mode,
                f"{bits:.2f}",
                f"{Estimate.of(scores.loss).exp().value:.2f}",
                _cell(ratio),
                _cell(kl),
                share,
                _cell(Estimate.of(scores.top1), 3),
            )
    return result


def _cell(estimate: Estimate, digits: int = 4) -> str:
    error = estimate.standard_error
    return f"{estimate.value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
