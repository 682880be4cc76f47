"""A small checkpoint, and the metrics of vLLM, for tests of what surrounds the model."""

from pathlib import Path

import pytest
from tiny_models import make_tiny_llama

from calibration.pipeline import quantize
from calibration.settings import Settings

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
"""By kind, what Prometheus appends to the name of a metric."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, not quantized, whose groups two processes can share."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_llama(folder / "tiny", tied=False, intermediate=512)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Path) -> Path:
    out = tiny_model.parent / "tiny-offq"
    quantize(
        str(tiny_model),
        out,
        Settings(samples=4, sequence_length=64, dtype="float32"),
    )
    return out


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path) -> set[str]:
    """What vLLM registers with Prometheus when a server starts, and Prometheus' own `up`."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from prometheus_client import REGISTRY
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from vllm_offq.stats import OffQStatLogger

    config = EngineArgs(model=str(tiny_checkpoint), dtype="float32").create_engine_config()
    logger = PrometheusStatLogger(config)
    logger.log_metrics_info("cache_config", config.cache_config)
    OffQStatLogger(config, [0]).log_engine_initialized()
    app = FastAPI()
    attach_router(app)
    TestClient(app).get("/")  # metrics of requests are registered by the first one
    return {
        metric.name + suffix
        for metric in REGISTRY.collect()
        for suffix in SUFFIXES.get(metric.type, [])
    } | {"up"}
