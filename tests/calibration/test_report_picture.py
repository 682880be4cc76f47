"""Reports as a real browser shows them: what is asserted are pixels."""

import html
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from sample_report import NOTHING_OPTIONAL, SITES, sample_report

from calibration.report.compare_page import compare_page
from calibration.report.page import report_page
from calibration.report.schema import Histogram, Histograms

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

PHONE, DESK = 400, 1100
HEIGHT = 8000
"""Of the window: more than any page here needs."""


@dataclass(frozen=True)
class Shot:
    colours: np.ndarray
    """[height, width] uint32, 0xRRGGBB."""
    scroll_width: int

    def where(self, colour: int) -> np.ndarray:
        """[n, 2] places (y, x) of a colour."""
        return np.argwhere(self.colours == colour)


def shoot(page: str, folder: Path, dark: bool = False) -> dict[int, Shot]:
    """The whole page by width; in frames, because Chromium makes no window as narrow as a phone."""
    wrapper = folder / "frames.html"
    frames = "".join(
        f"""<iframe style="border:0;vertical-align:top;width:{width}px;height:{HEIGHT}px"
        srcdoc="{html.escape(page)}"></iframe>"""
        for width in (PHONE, DESK)
    )
    wrapper.write_text(
        f"""<meta charset="utf-8"><body style="margin:0;white-space:nowrap;font-size:0">{frames}
        <script>onload = () => {{
        const pages = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument)
        document.title = pages.map(page => [page.documentElement.scrollWidth,
        Math.ceil(page.body.getBoundingClientRect().height)]).join() }}</script>""",
        encoding="utf-8",
    )
    picture = folder / "picture.png"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={PHONE + DESK},{HEIGHT}",
        f"--screenshot={picture}",
        "--dump-dom",
        wrapper.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r"<title>(\d+),(\d+),(\d+),(\d+)</title>", done.stdout)
    assert measured is not None
    widths, heights = ([int(value) for value in measured.groups()[i::2]] for i in (0, 1))
    assert max(heights) <= HEIGHT
    box = (0, 0, PHONE + DESK, max(heights))
    rgb = np.asarray(Image.open(picture).crop(box).convert("RGB")).astype(np.uint32)
    colours = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    return {
        PHONE: Shot(colours[: heights[0], :PHONE], widths[0]),
        DESK: Shot(colours[: heights[1], PHONE:], widths[1]),
    }


@pytest.mark.parametrize(
    "page",
    [
        partial(report_page, sample_report(layers=80)),
        partial(report_page, sample_report(experts=4, model="example/" + "a-long-name" * 9)),
        partial(report_page, sample_report(**NOTHING_OPTIONAL)),
        partial(compare_page, sample_report(16), sample_report(16, seed=1), "first", "second"),
    ],
    ids=["80 layers", "experts and a long name", "bare", "compare"],
)
def test_nothing_is_cut_off_at_the_side(tmp_path: Path, page: partial[str]) -> None:
    for width, shot in shoot(page(), tmp_path).items():
        assert shot.scroll_width == width
        inside = shot.colours != shot.colours[0, 0]
        margin = 12  # the page keeps as much clear on both sides
        assert not inside[:, :margin].any()
        assert not inside[:, -margin:].any()
        assert inside.mean() > 0.03
        # Every screenful of a phone's height shows something.
        assert all(part.any() for part in np.array_split(inside, max(1, len(inside) // 800)))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_heat_map_has_the_right_colours_in_the_right_places(tmp_path: Path, dark: bool) -> None:
    layers = 8
    # Values rise along the layers; every place lies a step above the one over it.
    noise = {
        site: [10.0 + 4 * layer + row for layer in range(layers)] for row, site in enumerate(SITES)
    }
    low, high = noise[SITES[0]][0], noise[SITES[-1]][-1]
    report = sample_report(**NOTHING_OPTIONAL, signal_to_noise=noise, output_error={})
    for shot in shoot(report_page(report), tmp_path, dark).values():
        places = np.zeros((len(SITES), layers, 2))
        for row, values in enumerate(noise.values()):
            for layer, value in enumerate(values):
                colour = to_hex(colormaps["cividis"]((value - low) / (high - low)))
                found = shot.where(int(colour[1:], 16))
                assert len(found) > 80, f"layer {layer}, row {row}"
                places[row, layer] = np.median(found, axis=0)
        y, x = places[..., 0], places[..., 1]
        assert (np.diff(x, axis=1) > 8).all()
        assert (np.diff(y, axis=0) > 8).all()
        assert (np.ptp(x, axis=0) < 4).all()
        assert (np.ptp(y, axis=1) < 4).all()


def test_night_differs_from_day(tmp_path: Path) -> None:
    page = report_page(sample_report())
    for dark, paper, accent, worst in (
        (False, 0xFDFDFC, 0x3B73A8, 0xB4501E),
        (True, 0x15191D, 0x7FB2E0, 0xF09A63),
    ):
        for shot in shoot(page, tmp_path, dark).values():
            assert shot.colours[0, 0] == paper
            assert len(shot.where(accent)) > 1000
            assert len(shot.where(worst)) > 1000


def test_an_outlier_layer_stands_out(tmp_path: Path) -> None:
    """The diamond of the worst linear is the highest of its chart, and at its layer's place."""
    layers, worst = 20, 15
    errors = {
        f"model.layers.{layer}.mlp.down_proj": 0.2 if layer == worst else 0.01
        for layer in range(layers)
    }
    report = sample_report(**NOTHING_OPTIONAL, output_error=errors, signal_to_noise={})
    for shot in shoot(report_page(report), tmp_path).values():
        diamonds = shot.where(0xB4501E)
        drawn = diamonds[diamonds[:, 0] > diamonds[:, 0].min() + 15]  # below the legend's own
        peak = drawn[drawn[:, 0] < drawn[:, 0].min() + 8]
        left, right = drawn[:, 1].min(), drawn[:, 1].max()
        assert abs(peak[:, 1].mean() - (left + (right - left) * worst / (layers - 1))) < 6


def test_histograms_are_as_wide_as_their_activations(tmp_path: Path) -> None:
    """On common axes; the original in the colour of what is worst, to its left or above."""
    reaches = {"original": 32, "rotated": 16, "offset removed": 4}
    stages = [
        Histogram(
            stage=stage,  # type: ignore[arg-type]
            bin_edges=[float(edge) for edge in range(-reach, reach + 1)],
            counts=[1000] * (2 * reach),
            max_magnitude=reach,
            rms=1.0,
            kurtosis=3.0,
        )
        for stage, reach in reaches.items()
    ]
    histograms = Histograms(layer="model.layers.1", site=SITES[0], stages=stages)
    changes = NOTHING_OPTIONAL | {"histograms": histograms}
    report = sample_report(**changes, output_error={}, signal_to_noise={})
    for width, shot in shoot(report_page(report), tmp_path).items():
        axis = 1 if width == DESK else 0  # along which the panels stand
        (original,), quantized = (panels(shot.where(c)) for c in (0xB4501E, 0x3B73A8))
        found = [np.ptp(panel[:, 1]) for panel in (original, *quantized)]
        assert found == pytest.approx([found[0] * r / 32 for r in reaches.values()], abs=3)
        places = [panel[:, axis].mean() for panel in (original, *quantized)]
        assert places == sorted(places)


def panels(places: np.ndarray) -> list[np.ndarray]:
    """Of places of a colour those that are apart from others and as high as a panel."""
    rows = [part for part in apart(places, 0) if np.ptp(part[:, 0]) > 60]
    return [panel for row in rows for panel in apart(row, 1)]


def apart(places: np.ndarray, axis: int) -> list[np.ndarray]:
    places = places[places[:, axis].argsort()]
    return np.split(places, np.flatnonzero(np.diff(places[:, axis]) > 15) + 1)
