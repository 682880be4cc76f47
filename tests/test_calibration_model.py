"""What `offq quantize` costs: memory by depth, and the counts of benchmarks.calibration_model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.calibration import make_model, measure, write_text
from benchmarks.calibration_model import (
    H100,
    STEP_OPERATIONS,
    block_work,
    linears,
    matrix_bytes,
    this_machine,
)
from calibration.gptq import gptq
from calibration.pipeline import quantize
from calibration.settings import Settings

SHAPE = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1536,
    num_attention_heads=8,
    num_key_value_heads=2,
)
SAMPLES, SEQUENCE_LENGTH = 8, 128
aten = torch.ops.aten


def in_place(out: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Of out += a @ b."""
    return 2 * a[0] * a[1] * b[1]


def cubed(share: float) -> Callable[..., int]:
    return lambda a, *args, **kwargs: int(share * a[0] ** 3)


FORMULAS: dict[Any, Any] = {
    aten.addmm_: in_place,
    aten.linalg_cholesky_ex: cubed(1 / 3),
    aten.linalg_solve_triangular: cubed(1),
}


class Launches(TorchDispatchMode):
    """Counts operations that compute, views not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_floating_point_operations_of_a_block(tmp_path: Path) -> None:
    counts = []
    for layers in (1, 2):
        folder = tmp_path / str(layers)
        folder.mkdir()
        model = make_model(folder, SHAPE, layers)
        text = write_text(folder, SHAPE, SAMPLES * SEQUENCE_LENGTH)
        settings = Settings(
            calibration=(str(text),), samples=SAMPLES, sequence_length=SEQUENCE_LENGTH
        )
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            quantize(str(model), folder / "out", settings)
        counts.append(counter.get_total_flops())
    work = block_work(SHAPE, SAMPLES, SEQUENCE_LENGTH)
    assert work.flops + work.double_flops == pytest.approx(counts[1] - counts[0], rel=0.1)


def test_operations_of_a_rounded_channel() -> None:
    counts = []
    for channels in (256, 512):
        with Launches() as launches:
            gptq(torch.randn(8, channels), torch.eye(channels), None, refits=1)
        counts.append(launches.count)
    assert counts[1] - counts[0] == pytest.approx(256 * STEP_OPERATIONS, rel=0.1)


def test_a_larger_model_costs_more_and_a_gpu_less() -> None:
    here, work = this_machine(), block_work(SHAPE, SAMPLES, SEQUENCE_LENGTH)
    wide = LlamaConfig(**SHAPE.to_dict() | {"hidden_size": 1024, "intermediate_size": 3072})
    assert here.seconds(block_work(wide, SAMPLES, SEQUENCE_LENGTH)) > 3 * here.seconds(work)
    assert H100.seconds(block_work(wide, 128, 2048)) < here.seconds(block_work(wide, 128, 2048))
    assert matrix_bytes(wide) > 3 * matrix_bytes(SHAPE)


def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads differ in what they hold at a time
    shape = LlamaConfig(**SHAPE.to_dict() | {"hidden_size": 1024, "intermediate_size": 3072})
    costs = []
    for layers in (2, 5):
        folder = tmp_path / str(layers)
        folder.mkdir()
        model, text = make_model(folder, shape, layers), write_text(folder, shape, 2 * 128)
        settings = Settings(calibration=(str(text),), samples=2, sequence_length=128)
        costs.append(measure(model, settings))
    few, many = (cost.peak_bytes for cost in costs)
    of_a_block = 4 * sum(channels * rows for channels, rows in linears(shape))
    assert many - few < 3 * of_a_block / 2


def test_a_profile_finds_all_parts(tmp_path: Path) -> None:
    """They are named by functions, which a change might rename or leave unused."""
    model = make_model(tmp_path, SHAPE, 1)
    text = write_text(tmp_path, SHAPE, SAMPLES * SEQUENCE_LENGTH)
    settings = Settings(calibration=(str(text),), samples=SAMPLES, sequence_length=SEQUENCE_LENGTH)
    cost = measure(model, settings, profile=True)
    assert all(seconds > 0 for seconds in cost.parts.values())
    assert sum(cost.parts.values()) < sum(cost.seconds.values())
