"""`vllm bench serve` against a running server."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.server import ServerError


@dataclass(frozen=True)
class Load:
    """What is asked of a server: random prompts of one length, replies of one length."""

    input_len: int
    """Tokens of a prompt that no other has."""
    output_len: int
    streams: int
    """Requests that are on their way at once."""
    requests: int
    shared_prefix: int = 0
    """Tokens before them, the same for all prompts."""
    seed: int = 0
    """Of the prompts: another one, and the prefix cache knows none of them."""
    warm_up: int = 0
    """Requests before the ones that count; they have the same prompts."""


def drive(url: str, model: str, tokenizer: Path, load: Load, result: Path) -> dict[str, Any]:
    """Put the load on a server; the numbers are those of `vllm bench serve`.

    result: file for the numbers; its log is written beside it.
    Raises: ServerError if not all requests were answered.
    """
    result.unlink(missing_ok=True)
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "vllm"),
        *("--base-url", url, "--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--seed", str(load.seed)),
        *("--temperature", "0", "--ignore-eos"),
        *("--random-input-len", str(load.input_len)),
        *("--random-output-len", str(load.output_len)),
        *("--random-prefix-len", str(load.shared_prefix)),
        *("--request-rate", "inf", "--max-concurrency", str(load.streams)),
        *("--num-prompts", str(load.requests), "--num-warmups", str(load.warm_up)),
        *("--ready-check-timeout-sec", "0"),  # it would send the first prompt an additional time
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
        *("--save-result", "--result-dir", result.parent, "--result-filename", result.name),
        "--disable-tqdm",
    ]
    log = result.with_suffix(".log")
    with log.open("w") as output:
        code = subprocess.call(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if code != 0 or not result.exists():
        raise ServerError(f"`vllm bench serve` ended with exit code {code}: {log}")
    numbers: dict[str, Any] = json.loads(result.read_text())
    if numbers["completed"] != load.requests:
        completed = f"only {numbers['completed']} of {load.requests} requests"
        raise ServerError(f"{completed} completed: {log}")
    return numbers
