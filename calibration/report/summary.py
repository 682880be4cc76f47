"""A report in words that need no knowledge of quantization."""

from dataclasses import dataclass
from statistics import fmean

from calibration.report.pictures import num_layers
from calibration.report.schema import Refinement, Report
from calibration.report.words import duration, percent, site_words, size, worst_first


@dataclass(frozen=True)
class Tile:
    """One number that a reader takes home."""

    value: str
    meaning: str


def tiles(report: Report) -> list[Tile]:
    """The numbers at the top of the page."""
    found = [
        Tile(
            f"{shrinkage(report):.2f} \u00d7 smaller",
            f"{size(report.original_bytes)} to {size(report.checkpoint_bytes)}",
        )
    ]
    decibels = all_decibels(report)
    if decibels:
        found.append(Tile(f"{fmean(decibels):.1f} dB", "signal to noise of activations, mean"))
    errors = report.output_error.values()
    if errors:
        found.append(Tile(percent(fmean(errors)), "output error by rounding weights, mean"))
    found.append(Tile(duration(report.seconds), "to quantize"))
    return found


def sentences(report: Report) -> list[str]:
    """What was done, what it saved, what it cost, in this order."""
    layers = num_layers(report)
    found = [
        f"{report.model} ({layers} layers, {report.architecture}) was quantized: {_bits(report)}. "
        f"On disk it went from {size(report.original_bytes)} to {size(report.checkpoint_bytes)}, "
        f"{shrinkage(report):.2f} times smaller."
    ]
    decibels = all_decibels(report)
    if decibels:
        mean = fmean(decibels)
        value, site, layer = min(
            (value, site, layer)
            for site, values in report.signal_to_noise.items()
            for layer, value in enumerate(values)
        )
        found.append(
            f"Rounding the activations adds noise. On average it is {mean:.1f} dB below them, "
            f"which is {_share_of_noise(mean)} of their power; the noisiest place is the "
            f"{site_words(site)} of layer {layer}, with {value:.1f} dB."
        )
    if report.output_error:
        name, error = worst_first(report.output_error)[0]
        found.append(
            "Rounding the weights changes what a linear layer gives: its squared error is "
            f"{percent(fmean(report.output_error.values()))} of the squared output on average, "
            f"and {percent(error)} for the worst, {name}."
        )
    if report.refinement is not None:
        found.append(_refinement(report.refinement))
    return found


def all_decibels(report: Report) -> list[float]:
    """Of every site and layer."""
    return [value for values in report.signal_to_noise.values() for value in values]


def shrinkage(report: Report) -> float:
    """How many times smaller the checkpoint is than the original."""
    return report.original_bytes / max(report.checkpoint_bytes, 1)


def _bits(report: Report) -> str:
    eight = report.settings.get("activation_bits") == "8"
    cached = report.settings.get("kv_bits") == "4"
    what = f"the weights {'' if eight else 'and activations '}of its linear layers"
    what += " and its key-value cache" if cached else ""
    bits = "4 bits, the activations 8," if eight else "4 bits"
    rest = "" if cached else "; its key-value cache stays as it was"
    return f"{what} now take {bits} instead of 16 or more{rest}"


def _refinement(refinement: Refinement) -> str:
    change = f"from {refinement.before:.4f} to {refinement.after:.4f} nats"
    if not refinement.used:
        return (
            f"{refinement.steps} steps of refinement did not help: on text held aside the "
            f"predictions' divergence from the original's went {change}, so nothing was changed."
        )
    return (
        f"{refinement.steps} steps of refinement brought the predictions' divergence from the "
        f"original's, on text held aside, {change}."
    )


def _share_of_noise(decibel: float) -> str:
    return percent(10 ** (-decibel / 10)) if decibel > 0 else "all"
