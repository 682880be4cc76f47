"""Make `build/peer`: PyTorch's CPU build and llm-compressor, for `benchmarks.accuracy`.

Needs nothing but Python, takes 1.3 GB on disk, and may be repeated, as setup_env.py.
"""

from setup_env import ROOT, install_torch, make_venv, need, pip, run, start, step

VENV = ROOT / "build" / "peer"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "benchmarks" / "peer-requirements.txt"


def main() -> None:
    start()
    make_venv(VENV)
    install_torch(PYTHON)
    step(f"installing {REQUIREMENTS.relative_to(ROOT)}")
    need(pip("-r", REQUIREMENTS, python=PYTHON), "installing llm-compressor")
    need(run(PYTHON, "-c", "import llmcompressor"), "`import llmcompressor`")
    step(f"done: --peer-python {PYTHON.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
