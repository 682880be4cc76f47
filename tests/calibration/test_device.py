"""`--device`: the work is done there, nothing is mixed, and the result is as good as the CPU's.

Two devices that only pretend share the whole model where it is needed.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_experts import make_tiny_experts
from tiny_models import make_tiny
from torch.utils.cpp_extension import include_paths, library_paths
from transformers import AutoModelForCausalLM

from calibration.data_sources import SELF
from calibration.devices import usable_devices
from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import validate_checkpoint
from vllm_offq.errors import UserError

SCRIPT = Path(__file__).with_name("quantize_elsewhere.py")
GUARD = Path(__file__).with_name("pretend_guard.cpp")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "--device gpu is not supported; choose cpu, cuda, cuda:N or auto"),
        ("xpu", "--device xpu is not supported"),
        ("cuda:99", r"--device cuda:99: PyTorch .* sees \d+ GPUs here"),
        ("auto", "--device auto: PyTorch .* sees 0 GPUs here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=says):
        usable_devices(name)


def test_auto_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert usable_devices("auto") == tuple(torch.device("cuda", index) for index in range(3))
    assert usable_devices("cuda:2") == (torch.device("cuda:2"),)


def make(folder: Path) -> list[tuple[str, str, Settings]]:
    """Models, outputs and settings that meet every branch of the calculation."""
    text = folder / "text.txt"
    text.write_text("".join(f"In {n} a lamp was lit on rock {n % 7}.\n" for n in range(300)))
    small = Settings(samples=2, sequence_length=64, calibration=(str(text),))
    runs = {
        "Qwen2": replace(small, gptq_inputs="corrected", refine=2),
        "Gemma2": replace(small, refine=1),  # whose head is its embedding
        "Gemma3": replace(small, head_bits="4", embedding_bits="4"),
        "Mixtral": replace(small, recipe="quarot", calibration=(SELF,)),
    }
    for family in runs:
        maker = make_tiny_experts if family == "Mixtral" else make_tiny
        maker(folder / family, family)
    return [
        (str(folder / family), str(folder / f"{family} elsewhere"), settings)
        for family, settings in runs.items()
    ]


def assert_as_good(runs: list[tuple[str, str, Settings]]) -> None:
    """What was made elsewhere is a checkpoint, no further from the original than the CPU's.

    The two differ: another order of additions moves codes, and those all that come after.
    """
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    for model, out, settings in runs:
        validate_checkpoint(Path(out))
        quantize(model, f"{out} here", settings)
        wanted = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
        elsewhere, here = (
            (load_simulated(path)[0](tokens).logits - wanted).norm()
            for path in (out, f"{out} here")
        )
        assert elsewhere < 1.1 * here, model


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine, and the pretended devices need it")
    library = tmp_path / "guard.so"
    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", GUARD, *folders, "-lc10", "-o", library]
    subprocess.run(command, check=True)
    return library


@torch.no_grad()
def test_devices_compute_as_well_as_the_cpu(tmp_path: Path, guard: Path) -> None:
    runs = make(tmp_path)
    asked = json.dumps([(model, out, asdict(settings)) for model, out, settings in runs])
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    subprocess.run([sys.executable, SCRIPT, guard, asked], check=True, env=environment)
    assert_as_good(runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
@torch.no_grad()
def test_gpus_compute_as_well_as_the_cpu(tmp_path: Path) -> None:
    runs = make(tmp_path)
    for model, out, settings in runs:
        quantize(model, out, settings, device="auto")
    assert_as_good(runs)
