"""Start and stop a real `vllm serve`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_TIMEOUT = 300
KV_CACHE_GIB = 1
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Server:
    """A running `vllm serve`."""

    url: str
    log: Path

    def kv_cache_tokens(self) -> int:
        """The capacity that vLLM reports in its log."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text())
        assert found, "vLLM did not report its KV cache size"
        return int(found[1].replace(",", ""))

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric's values."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


@contextmanager
def serve(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Run `vllm serve MODEL OPTIONS`, log and compilation cache in folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    environment = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder / "cache")}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(f"{url}/health", process, log)
        yield Server(url, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-4000:]}")
