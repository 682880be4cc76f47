"""`--device`: the work is done there, nothing is mixed, and the result is as good as the CPU's."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_experts import make_tiny_experts
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from calibration.data_sources import SELF
from calibration.loader import usable_device
from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import validate_checkpoint
from vllm_offq.errors import UserError

SCRIPT = Path(__file__).with_name("quantize_elsewhere.py")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "--device gpu is not supported; choose cpu, cuda or cuda:N"),
        ("xpu", "--device xpu is not supported"),
        ("cuda:99", r"--device cuda:99: PyTorch .* sees \d+ GPUs here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        usable_device(name)


def make(folder: Path) -> list[tuple[str, str, Settings]]:
    """Models, outputs and settings that meet every branch of the calculation."""
    text = folder / "text.txt"
    text.write_text("".join(f"In {n} a lamp was lit on rock {n % 7}.\n" for n in range(300)))
    small = Settings(samples=2, sequence_length=64, calibration=(str(text),))
    runs = {
        "Qwen2": replace(small, gptq_inputs="corrected", refine=2),
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


@torch.no_grad()
def test_a_device_computes_as_well_as_the_cpu(tmp_path: Path) -> None:
    runs = make(tmp_path)
    asked = json.dumps([(model, out, asdict(settings)) for model, out, settings in runs])
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    subprocess.run([sys.executable, SCRIPT, asked], check=True, env=environment)
    assert_as_good(runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
@torch.no_grad()
def test_a_gpu_computes_as_well_as_the_cpu(tmp_path: Path) -> None:
    runs = make(tmp_path)
    for model, out, settings in runs:
        quantize(model, out, settings, device="cuda")
    assert_as_good(runs)
