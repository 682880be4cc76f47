"""A real `vllm serve` process, for as long as a `with` block lasts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT = 600  # seconds; 60 to 90 are usual on two cores
STOP_TIMEOUT = 20
KV_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
CAUSE = re.compile(r"(?:(?:Error|vllm serve: error): |Value error, )(?!\d+ validation error)(.+)")


class ServerError(Exception):
    """The server did not start, or did not answer; the message names the log that says more."""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes]
    """`vllm serve` itself; the engine's processes are its children."""

    def kv_capacity(self) -> int:
        """How many tokens the KV cache holds, as vLLM itself reports it."""
        found = KV_CAPACITY.search(self.log.read_text(errors="replace"))
        if found is None:
            raise ServerError(f"{self.log} does not say how large the KV cache is")
        return int(found[1].replace(",", ""))


@contextmanager
def serve(
    model: Path, log: Path, *arguments: str, environment: Mapping[str, str | None] | None = None
) -> Iterator[Server]:
    """Serve a model folder on a free local port, without reaching for the network.

    arguments: further ones of `vllm serve`. environment: overrides what is set here; None
    unsets.
    Raises: ServerError if it does not start.
    """
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *arguments,
    ]
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "INFO",  # the KV capacity is read from the log
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **(environment or {}),
    }
    with log.open("w") as output:
        # A session of its own: vLLM starts further processes, and all of them must end with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in variables.items() if value is not None},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: Server) -> None:
    process, deadline = server.process, time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            cause = cause_of_failure(server.log.read_text(errors="replace"))
            raise ServerError(
                f"vllm serve ended with exit code {process.returncode}"
                + (f" ({cause})" if cause else "")
                + f": {server.log}"
            )
        try:
            if httpx.get(f"{server.url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(1)
    raise ServerError(f"vllm serve did not start within {START_TIMEOUT} s: {server.log}")


def cause_of_failure(log: str) -> str:
    """The first error in a server's log; those after it are what came of it."""
    errors = (line for line in log.splitlines(keepends=True) if " WARNING " not in line)
    found = CAUSE.search("".join(errors))
    # pydantic puts all that it was given behind its sentence.
    return found[1].partition(" [type=")[0].strip() if found else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let vLLM end its processes by itself, then kill whatever is left of the group."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    finally:  # a second Ctrl-C ends the waiting, not the killing
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
