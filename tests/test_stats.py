"""OffQ's facts in the log and in Prometheus, without an engine."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_checkpoint import HEAD_DIM, KV_HEADS, quantization_config

pytest.importorskip("vllm")

from prometheus_client import generate_latest
from vllm.platforms.interface import DeviceCapability

from vllm_offq import stats
from vllm_offq.config import OffQConfig
from vllm_offq.kernels import OVERRIDE
from vllm_offq.stats import OffQStatLogger

LAYERS = 2


def vllm_config(quant_config: object, name: str) -> Any:
    model = SimpleNamespace(
        served_model_name=name,
        get_head_size=lambda: HEAD_DIM,
        get_total_num_kv_heads=lambda: KV_HEADS,
        get_total_num_hidden_layers=lambda: LAYERS,
    )
    cache = SimpleNamespace(num_gpu_blocks=77, block_size=16)
    return SimpleNamespace(quant_config=quant_config, model_config=model, cache_config=cache)


def start(quant_config: object, name: str, engines: tuple[int, ...] = (0,)) -> list[str]:
    """Lines that Prometheus is given for a model of this name."""
    OffQStatLogger(vllm_config(quant_config, name), list(engines)).log_engine_initialized()
    lines = generate_latest().decode().splitlines()
    return [line for line in lines if line.startswith("offq:info{") and f'"{name}"' in line]


def test_what_is_served_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_offq.stats")
    config = OffQConfig.from_config(quantization_config(embedding={"bits": 8}))
    lines = start(config, "first", engines=(0, 1))
    assert [line.endswith(" 1.0") for line in lines] == [True, True]
    group_size = quantization_config()["kv_cache"]["group_size"]
    # Codes of a key and a value fill a byte; a group of each has two numbers of 16 bits.
    kv_bytes = LAYERS * KV_HEADS * (HEAD_DIM + HEAD_DIM // group_size * 8)
    for label in (
        'engine="1"',
        'weight_bits="4"',
        'embedding_bits="8"',
        'kv_bits="4"',
        f'kv_bytes_per_token="{kv_bytes}"',
    ):
        assert label in lines[1]
    assert len(caplog.messages) == 1
    assert "kv_bits 4" in caplog.messages[0]
    assert "77 blocks of 16 tokens" in caplog.messages[0]


def test_a_second_engine_in_the_process() -> None:
    config = OffQConfig.from_config(quantization_config(kv_cache=None))
    (line,) = start(config, "second")
    assert 'kv_bits="16"' in line and 'kv_bytes_per_token=""' in line


def test_other_models_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_offq.stats")
    assert start(None, "third") == []
    assert not caplog.messages


def test_the_api_server_takes_none_of_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the engine has what there is: PyTorch, which would take some, is not asked."""
    pytest.importorskip("triton")
    platform = SimpleNamespace(
        is_cuda_alike=lambda: True, get_device_capability=lambda: DeviceCapability(9, 0)
    )
    monkeypatch.setattr(stats, "current_platform", platform)
    monkeypatch.delenv(OVERRIDE, raising=False)
    for name in ("get_device_capability", "get_device_properties", "is_available"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: pytest.fail("PyTorch was asked"))
    (line,) = start(OffQConfig.from_config(quantization_config()), "fourth")
    assert 'kernels="triton"' in line
