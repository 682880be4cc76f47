"""What operators want to know of OffQ: one line in the log at start, one metric in Prometheus."""

import logging
from functools import cache
from typing import Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_offq.config import OffQConfig
from vllm_offq.kernels import backend_name
from vllm_offq.kernels.reference import kv_page_bytes

logger = logging.getLogger(__name__)

INFO = "offq:info"
"""A gauge that is always 1, its labels the facts, as vLLM's own cache_config_info is. The name must
not begin with `vllm:`: vLLM unregisters those."""


class OffQStatLogger(AggregateStatLoggerBase):
    """Says once what is served, where it is OffQ's; all that moves is in vLLM's own metrics.

    vLLM makes one in the process of the API server, for every model.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._vllm_config = vllm_config
        self._engine_indexes = engine_indexes

    def log_engine_initialized(self) -> None:
        """Called when the size of the cache is known."""
        config = self._vllm_config
        if not isinstance(config.quant_config, OffQConfig):
            return
        found = facts(config, config.quant_config)
        cache = config.cache_config
        logger.info(
            "OffQ serves %s; the KV cache has %s blocks of %s tokens",
            ", ".join(f"{key} {value}" for key, value in found.items()),
            cache.num_gpu_blocks,
            cache.block_size,
        )
        name = config.model_config.served_model_name
        for index in self._engine_indexes:
            _gauge(*found).labels(model_name=name, engine=str(index), **found).set(1)

    def record(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing of what is said changes while the server runs."""


def facts(vllm_config: VllmConfig, quant_config: OffQConfig) -> dict[str, str]:
    """Recipe, kernels, bits, and bytes that a token takes in the KV cache of all ranks."""
    checkpoint, model = quant_config.checkpoint, vllm_config.model_config
    kv_cache = checkpoint.kv_cache
    kv_bytes = ""  # a cache of vLLM's own: to Prometheus an empty label is none
    if kv_cache is not None:
        page = kv_page_bytes(model.get_head_size(), kv_cache.group_size)
        layers = model.get_total_num_hidden_layers()
        kv_bytes = str(page * model.get_total_num_kv_heads() * layers)
    return {
        "recipe": checkpoint.recipe,
        "kernels": backend_name(_gpu()),
        "weight_bits": str(checkpoint.weights.bits),
        "activation_bits": "/".join(sorted({str(s.bits) for s in checkpoint.sites.values()})),
        "head_bits": str(checkpoint.head.bits if checkpoint.head else 16),
        "embedding_bits": str(checkpoint.embedding.bits if checkpoint.embedding else 16),
        "kv_bits": str(kv_cache.bits if kv_cache else 16),
        "kv_bytes_per_token": kv_bytes,
    }


def _gpu() -> tuple[int, int] | None:
    # As vLLM finds it, by the driver's management library where there is one: PyTorch would start
    # CUDA in the API server's process, and take some hundred MB of the GPU, all of whose memory is
    # given by then.
    capability = (
        current_platform.get_device_capability() if current_platform.is_cuda_alike() else None
    )
    return None if capability is None else (capability.major, capability.minor)


@cache
def _gauge(*facts: str) -> Gauge:
    """One for all engines of this process: a name is registered once."""
    labels = ["model_name", "engine", *facts]
    return Gauge(INFO, "What OffQ serves", labels, multiprocess_mode="mostrecent")
