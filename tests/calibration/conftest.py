"""A tiny model, a text, and what `quantize` makes of both."""

from pathlib import Path

import pytest
from tiny_models import make_tiny_llama

from calibration.pipeline import quantize
from calibration.report import Report
from calibration.settings import Settings


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        "".join(f"In {year} a lamp was lit on rock {year % 7}.\n" for year in range(900))
    )
    return path


@pytest.fixture(scope="session")
def quantized(
    original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("quantized") / "offq"
    return out, quantize(
        str(original), out, Settings(calibration=(str(text),), samples=4, sequence_length=64)
    )
