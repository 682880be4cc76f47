"""Numbers and names as people read them."""

import math
import re
from collections.abc import Mapping


def printable(text: str) -> str:
    """Names come from a model's files: control and direction characters are made visible."""
    spaced = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else "\ufffd" for char in spaced)


def site_words(site: str) -> str:
    """A site's name in words."""
    return re.sub(r"\b(mlp|kv)\b", lambda word: word[0].upper(), printable(site).replace("_", " "))


def percent(value: float) -> str:
    """A fraction with two significant digits."""
    if 0.995 <= value < 1:
        return "over 99%"
    if value == 0 or value >= 0.0995:
        return f"{value:.0%}"
    if value < 9.95e-6:
        return f"{value * 100:.1e}%"
    return f"{value:.{1 - math.floor(math.log10(value * 100 * 1.0051))}%}"


def whole(value: float) -> str:
    """A count in three or four characters: 950, 12k, 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            value = num_bytes / limit
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Two units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def layer_of(name: str) -> int | None:
    """The layer's index in a full name: its first number."""
    found = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name)
    return int(found[1]) if found else None


def by_layer(errors: Mapping[str, float]) -> dict[int, list[float]]:
    """Values of the linears of each layer; what lies outside the layers is left out."""
    layers: dict[int, list[float]] = {}
    for name, error in errors.items():
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(layer, []).append(error)
    return dict(sorted(layers.items()))


def worst_first(errors: Mapping[str, float]) -> list[tuple[str, float]]:
    """All linears, largest error first, ties by name."""
    return sorted(errors.items(), key=lambda item: (-item[1], item[0]))
