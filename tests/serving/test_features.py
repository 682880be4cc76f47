"""What vLLM offers beyond an answer, with an OffQ checkpoint; docs/compatibility.md lists it."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from compatibility import refusals
from openai import OpenAI
from test_served import SENTENCES
from tiny_models import make_tiny_llama
from vllm_server import metric, serve_tiny

from calibration.pipeline import quantize
from calibration.settings import Settings
from serving.server import Server, ServerError

pytestmark = pytest.mark.slow

SERVERS = {"eager": "float32_server", "compiled": "bfloat16_server", "triton": "triton_server"}
QUESTION = [{"role": "user", "content": "What is a cache?"}]


@pytest.fixture(params=SERVERS)
def client(request: pytest.FixtureRequest) -> OpenAI:
    """Of each server in turn."""
    return connect(request.getfixturevalue(SERVERS[request.param]))


def connect(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_stream(client: OpenAI) -> None:
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    stream = client.chat.completions.create(**options, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 2
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert "".join(parts) == whole


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
        extra_body={"ignore_eos": True},
    )
    assert reply.choices[0].logprobs is not None
    tokens = reply.choices[0].logprobs.content or []
    assert len(tokens) == 3
    for token in tokens:
        logprobs = [other.logprob for other in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert token.logprob == logprobs[0] <= 0


def test_structured_output(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=16,
        extra_body={"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}},
    )
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", reply.choices[0].message.content or "")


def test_several_answers(client: OpenAI) -> None:
    """Of one prompt, whose pages they share; the same seed gives the same ones."""
    options = {"model": "tiny", "prompt": SENTENCES[1], "max_tokens": 6, "n": 3, "seed": 1}
    first, again = (client.completions.create(**options).choices for _ in range(2))
    assert len({choice.text for choice in first}) > 1
    assert [choice.text for choice in first] == [choice.text for choice in again]


@pytest.fixture(scope="module")
def special_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As float32_server, but it speculates, keeps no prefixes, and lets weights be reloaded."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3}
    speculation |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    options = ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
    options += ["--speculative-config", json.dumps(speculation)]
    folder = tmp_path_factory.mktemp("special")
    with serve_tiny(
        checkpoint, folder, *options, environment={"VLLM_SERVER_DEV_MODE": "1"}
    ) as server:
        yield server


def complete(server: Server, prompt: str, **options: Any) -> str:
    reply = connect(server).completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True} | options,
    )
    return reply.choices[0].text


def test_ngram_speculation_changes_no_token(float32_server: Server, special_server: Server) -> None:
    for prompt in SENTENCES:
        assert complete(special_server, prompt) == complete(float32_server, prompt)
    # Random weights need not repeat themselves: of two tokens, drafts must come true.
    two = {"allowed_token_ids": [40, 41]}
    assert complete(special_server, SENTENCES[2], **two) == complete(
        float32_server, SENTENCES[2], **two
    )
    assert metric(special_server, "vllm:spec_decode_num_accepted_tokens_total") > 0
    assert metric(special_server, "vllm:prefix_cache_queries_total") == 0


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    make_tiny_llama(folder / "other", tied=False, seed=1)
    settings = Settings(samples=2, sequence_length=32, basis="top-1", refits=0)
    quantize(str(folder / "other"), folder / "other-offq", settings)
    return folder / "other-offq"


@pytest.mark.parametrize("kernels", ["special_server", "triton_server"])
def test_weights_are_reloaded(
    kernels: str, checkpoint: Path, other_checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    """As after training: those of another checkpoint, then the first ones again."""
    server: Server = request.getfixturevalue(kernels)
    before = complete(server, SENTENCES[1])
    try:
        reload(server, other_checkpoint)
        assert complete(server, SENTENCES[1]) != before
    finally:  # other tests ask this server, too
        reload(server, checkpoint)
    assert complete(server, SENTENCES[1]) == before


def reload(server: Server, model: Path) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
    httpx.post(f"{server.url}/collective_rpc", json=body, timeout=60).raise_for_status()
    assert httpx.post(f"{server.url}/reset_prefix_cache", timeout=60).json()["success"]


@pytest.fixture(scope="module")
def endings(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How `vllm serve` ends with each of the options that are refused; two at a time."""

    def serve(options: list[str]) -> str:
        given = [option.replace("my-model", str(checkpoint)) for option in options]
        folder = tmp_path_factory.mktemp("refused")
        with (
            pytest.raises(ServerError) as refused,
            serve_tiny(checkpoint, folder, "--dtype", "float32", "--enforce-eager", *given),
        ):
            pass
        return str(refused.value)

    with ThreadPoolExecutor(2) as pool:
        said = pool.map(serve, (options for options, _ in refusals().values()))
        return dict(zip(refusals(), said, strict=True))


@pytest.mark.parametrize("feature", refusals())
def test_refusal_is_one_sentence(feature: str, endings: dict[str, str]) -> None:
    _, sentence = refusals()[feature]
    assert endings[feature].startswith(f"vllm serve ended with exit code 1 ({sentence}): ")
