"""`offq quantize` on a terminal: progress while it runs, a summary at the end."""

from functools import partial
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from calibration.memory import map_large_tensors
from calibration.pipeline import quantize
from calibration.progress import rich_progress
from calibration.report import HTML_FILE, Report
from calibration.resume import unfinished
from calibration.settings import Settings


def run(
    model: str, out: Path, settings: Settings, device: str, overwrite: bool, resume: bool | None
) -> None:
    """Quantize with bars, then print what was done."""
    console = Console()
    progress = rich_progress(console)
    map_large_tensors()
    if resume and not unfinished(out):
        console.print("There is no unfinished run to go on with; this one begins anew.")
    try:
        report = quantize(
            model,
            out,
            settings,
            device=device,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    except (KeyboardInterrupt, SystemExit):
        if unfinished(out):
            console.print("Stopped; the same command with --resume goes on from here.")
        raise
    console.print(summary(report))
    # As they are, in one line each, so that the command can be copied.
    plain = partial(console.print, markup=False, emoji=False, highlight=False, soft_wrap=True)
    plain(f"Wrote {out} - serve it: vllm serve {out}")
    plain(f"Pictures of what happened: {out / HTML_FILE}")


def summary(report: Report) -> Table:
    """Sizes, signal-to-noise of the activations by place, the linears that lost most, time."""
    table = Table(title="Quantized", show_header=False)
    ratio = report.original_bytes / report.checkpoint_bytes
    table.add_row(
        "weights",
        f"{report.original_bytes / 1e6:.0f} MB to {report.checkpoint_bytes / 1e6:.0f} MB "
        f"({ratio:.2f} times smaller)",
    )
    for site, values in report.signal_to_noise.items():
        worst = min(range(len(values)), key=values.__getitem__)
        table.add_row(
            f"signal to noise, {site.replace('_', ' ')}",
            f"{fmean(values):.1f} dB mean, {values[worst]:.1f} dB worst (layer {worst})",
        )
    for candidate in report.basis_candidates or []:
        if candidate.chosen:
            tried = len(report.basis_candidates or [])
            table.add_row("basis", f"{candidate.name}, the best of {tried}")
    if report.clip_ratios is not None:
        chosen = (
            f"{site.replace('_', ' ')} {ratio:g}" for site, ratio in report.clip_ratios.items()
        )
        table.add_row("clip ratios", ", ".join(chosen))
    name, error = max(report.output_error.items(), key=lambda item: item[1])
    table.add_row(
        "output error from rounding weights",
        f"{fmean(report.output_error.values()):.2%} mean, {error:.2%} worst ({name})",
    )
    if (refinement := report.refinement) is not None:
        table.add_row(
            f"divergence by {refinement.steps} steps of refinement",
            f"{refinement.before:.4f} to {refinement.after:.4f} nats"
            + ("" if refinement.used else ", so nothing was changed"),
        )
    table.add_row("time", f"{report.seconds:.0f} s")
    return table
