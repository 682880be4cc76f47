"""Triton's kernels without a GPU: tests/kernels/triton in a process whose Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton"


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted(module: str) -> None:
    pytest.importorskip("triton")
    # Many small products: threads would only wait for each other.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", FOLDER / module]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
