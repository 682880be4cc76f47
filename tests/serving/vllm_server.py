"""The project's `vllm serve`, as the tests want it: a small cache, its own compilation cache."""

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from serving.server import Server, serve

KV_CACHE_GIB = 1
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def serve_tiny(
    model: Path, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run `vllm serve MODEL OPTIONS` under the name `tiny`; log and compilation cache in folder."""
    environment = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache"), **(environment or {})}
    arguments = [*options, "--served-model-name", "tiny"]
    with serve(model, folder / "server.log", *arguments, environment=environment) as server:
        yield server


def metric(server: Server, name: str) -> float:
    """The sum of a Prometheus metric's values."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))
