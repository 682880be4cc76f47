"""A server whose processes are killed tells its clients, ends, leaves nothing, and starts again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from openai import OpenAI
from vllm_server import serve_tiny

from serving.server import Server

pytestmark = pytest.mark.slow

OPTIONS = ["--dtype", "float32", "--enforce-eager"]
ENDING = 60
"""Seconds that clients and the server may take to notice."""


def ask(server: Server, max_tokens: int) -> str:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ENDING)
    reply = client.completions.create(
        model="tiny",
        prompt="The quick brown fox",
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return reply.choices[0].text


def stream(server: Server, max_tokens: int) -> Iterator[str]:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ENDING)
    for part in client.completions.create(
        model="tiny",
        prompt="The quick brown fox",
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        yield part.choices[0].text


def kill_in_mid_request(server: Server, title: str) -> None:
    """One request is answered in parts then, another in one piece."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    (victim,) = (process for process in below if title in " ".join(process.cmdline()))
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, server, 900)
        parts = stream(server, 900)
        next(parts)
        victim.kill()
        with pytest.raises(openai.APIError) as of_parts:
            list(parts)
        with pytest.raises(openai.APIError) as of_whole:
            whole.result()
    assert not isinstance(of_parts.value, openai.APITimeoutError)
    assert not isinstance(of_whole.value, openai.APITimeoutError)
    server.process.wait(ENDING)  # with exit code 0: vLLM 0.32 does not tell this from SIGTERM
    assert psutil.wait_procs(below, ENDING)[1] == [], "processes are left, and their memory"


def test_killed_server_says_so_and_another_one_serves(checkpoint: Path, tmp_path: Path) -> None:
    """The engine is killed first; then, in the second server, the worker that holds the model."""
    with serve_tiny(checkpoint, tmp_path, *OPTIONS) as server:
        expected = ask(server, 16)
        kill_in_mid_request(server, "EngineCore")
    with serve_tiny(checkpoint, tmp_path, *OPTIONS) as server:
        assert ask(server, 16) == expected
        kill_in_mid_request(server, "Worker")
