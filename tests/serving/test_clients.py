"""What clients ask of a served checkpoint, and how the server takes what they should not do.

One small server for all: its cache has room to begin 16 long answers and to end six.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from test_readme import blocks
from transformers import AutoTokenizer
from vllm_server import metric, serve_tiny

from serving.server import STOP_TIMEOUT, Server

pytestmark = pytest.mark.slow

CONTEXT = 256
BLOCKS = 40
BLOCK_SIZE = 32
LONG_ANSWER = 5 * BLOCK_SIZE
QUESTION = [{"role": "user", "content": "What is a cache?"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def running() -> Iterator[ExitStack]:
    """What ends the server when it is closed."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def server(
    running: ExitStack, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT)]
    options += ["--num-gpu-blocks-override", str(BLOCKS), "--block-size", str(BLOCK_SIZE)]
    # Without a timeout vLLM 0.32 may kill its engine and then wait for the streams to end for ever.
    options += ["--max-num-seqs", "16", "--shutdown-timeout", "15"]
    # A random model would put spaces between the parts of an object for ever.
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    options += ["--structured-outputs-config", json.dumps(structured)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--tool-strict-level", "parameter"]
    return running.enter_context(
        serve_tiny(checkpoint, tmp_path_factory.mktemp("clients"), *options)
    )


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: OpenAI, prompt: str, max_tokens: int = 16) -> str:
    """A greedy completion."""
    reply = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return reply.choices[0].text


def assert_follows_schema(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"colour", "count"}
    assert found["colour"] in ("red", "blue")
    assert found["count"] in (1, 2, 3)


def test_answer_follows_a_json_schema(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}},
    )
    assert_follows_schema(reply.choices[0].message.content or "")


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "paint"}}],
    ids=["any", "named"],
)
def test_tool_is_called_as_its_schema_says(choice: Any, client: OpenAI, checkpoint: Path) -> None:
    """By a random model, which only the grammar keeps to the schema."""
    tool = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # It would put spaces between the parts of the arguments for ever; some are demanded.
    spaces = {str(token): -100 for token in tokenizer(" \n\t\r").input_ids}
    reply = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        tools=[tool],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=160,
        temperature=0,
        logit_bias=spaces,
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.function.name == "paint"
    assert_follows_schema(call.function.arguments)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 4}
    command = ["curl", "--silent", "--fail", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    assert json.loads(said)["usage"]["completion_tokens"] > 0


def test_langchain(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_tokens=4, temperature=0
    )
    assert chat.invoke("What is a cache?").usage_metadata["output_tokens"] > 0
    assert sum(1 for _ in chat.stream("What is a cache?")) > 1


@pytest.mark.parametrize("code", blocks("python", "docs/serve.md"))
def test_documented_code_runs(code: str, server: Server) -> None:
    if "langchain" in code:
        pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    here = code.replace("http://localhost:8000", server.url).replace("my-model", "tiny")
    exec(compile(here, "docs/serve.md", "exec"), {})


def test_prompt_beyond_the_context_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)) as refusal:
        complete(client, "A cache keeps what was computed once. " * 100)
    assert refusal.value.status_code == 400


def test_server_goes_on_after_an_aborted_stream(server: Server, client: OpenAI) -> None:
    expected = complete(client, "The quick brown fox")
    with client.completions.create(
        model="tiny",
        prompt="The quick brown fox",
        max_tokens=CONTEXT - 32,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 30
    while metric(server, "vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "the server goes on with what nobody reads"
        time.sleep(0.1)
    assert complete(client, "The quick brown fox") == expected


def test_more_requests_than_the_cache_holds(server: Server, client: OpenAI) -> None:
    """Some are preempted and calculated anew, and nobody notices by the answers."""
    prompts = [f"In {1960 + year} people flew to the moon" for year in range(16)]
    quiet = [complete(client, prompt, LONG_ANSWER) for prompt in prompts]
    before = metric(server, "vllm:num_preemptions_total")
    # One request, so that all come at once however slow the machine is.
    reply = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=LONG_ANSWER,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert metric(server, "vllm:num_preemptions_total") > before
    assert [choice.text for choice in reply.choices] == quiet


def test_sigterm_ends_a_server_that_streams(
    running: ExitStack, server: Server, client: OpenAI
) -> None:
    """The last test here: it ends the server of the others, which answers to the end first."""
    stream = client.completions.create(
        model="tiny",
        prompt="The quick brown fox",
        max_tokens=64,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    reasons: list[str | None] = []

    def read_on() -> None:
        reasons.extend(chunk.choices[0].finish_reason for chunk in stream if chunk.choices)

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < STOP_TIMEOUT, "it had to be killed"
    reader.join(5)
    assert reasons[-1] == "length"
    with pytest.raises(openai.APIConnectionError):
        complete(client, "The quick brown fox")
