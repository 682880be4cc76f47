"""Calibration runs where vLLM is not installed."""

import subprocess
import sys


def test_calibration_never_imports_vllm() -> None:
    code = (
        "import sys, calibration.cli, calibration.pipeline, calibration.simulate;"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'vllm'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
