"""`python -m serving.soak`: what it takes for a failure, what it says, and a whole run.

OFFQ_SOAK_MINUTES makes the whole run longer.
"""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_server import ENVIRONMENT

from serving import soak
from serving.memory import Memory, watch_memory
from serving.probe import MAX_TOKENS, Probe, WrongAnswerError
from serving.traffic import KINDS, Client
from vllm_offq.errors import UserError

MINUTES = os.environ.get("OFFQ_SOAK_MINUTES", "0.7")


def completion(tokens: int, best: list[int], margin: float = 1.0) -> dict[str, Any]:
    logprobs = [{"a": -0.1, "b": -0.1 - margin}] * len(best)
    choice = {"token_ids": best, "logprobs": {"top_logprobs": logprobs}}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


def healthy(request: httpx.Request) -> httpx.Response:
    """As a sound server answers: mistakes are refused, all else has the length asked for."""
    body = json.loads(request.content)
    tokens = body["max_tokens"]
    wrong = body["model"] != "tiny" or tokens < 1 or body["temperature"] == "hot"
    if wrong or len(body["prompt"]) > 256 or max(body["prompt"]) > 511:
        return httpx.Response(400)
    if not body.get("stream"):
        return httpx.Response(200, json=completion(tokens, [1] * tokens))
    parts = [*[json.dumps({"n": n}) for n in range(tokens)], json.dumps(completion(tokens, []))]
    return httpx.Response(200, text="".join(f"data: {part}\n\n" for part in [*parts, "[DONE]"]))


@pytest.fixture
def client() -> Iterator[Callable[[Callable[[httpx.Request], httpx.Response]], Client]]:
    """Makes one of a server that answers so."""
    opened = []

    def make(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
        http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")
        opened.append(http)
        probe = Probe((1, 2), (1,) * MAX_TOKENS, (0.5,) * MAX_TOKENS)
        return Client(http, "tiny", 256, range(400), [probe], 0.0, random.Random(0))

    yield make
    for http in opened:
        http.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_server_fails_at_nothing(kind: str, client: Callable[..., Client]) -> None:
    asking = client(healthy)
    for _ in range(20):
        assert KINDS[kind][0](asking) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [500, 503])
def test_an_error_of_the_server_is_a_failure(
    kind: str, status: int, client: Callable[..., Client]
) -> None:
    with pytest.raises((WrongAnswerError, httpx.HTTPStatusError), match=str(status)):
        KINDS[kind][0](client(lambda request: httpx.Response(status)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_gone_is_a_failure(kind: str, client: Callable[..., Client]) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(httpx.ConnectError):
        KINDS[kind][0](client(gone))


def test_an_accepted_mistake_is_a_failure(client: Callable[..., Client]) -> None:
    with pytest.raises(WrongAnswerError, match="a request with a wrong"):
        client(lambda request: httpx.Response(200)).makes_mistake()


def test_a_short_reply_is_a_failure(client: Callable[..., Client]) -> None:
    with pytest.raises(WrongAnswerError, match="a reply had 0 tokens"):
        client(lambda request: httpx.Response(200, json=completion(0, []))).asks()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data: {"n": 1}\n\n', "stopped before its end"),
        ('data: {"error": {"code": 500}}\n\n', "had an error"),
    ],
)
def test_a_broken_stream_is_a_failure(
    text: str, message: str, client: Callable[..., Client]
) -> None:
    with pytest.raises(WrongAnswerError, match=message):
        client(lambda request: httpx.Response(200, text=text)).streams()


@pytest.mark.parametrize("near_tie", [0.0, 0.1, 0.5])
def test_another_answer_is_a_failure_unless_it_was_a_near_tie(near_tie: float) -> None:
    known = Probe((1, 2), (5,) * MAX_TOKENS, (2.0, 0.2, *[2.0] * (MAX_TOKENS - 2)))
    other = completion(MAX_TOKENS, [5, *[6] * (MAX_TOKENS - 1)])
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=other))
    with httpx.Client(transport=transport, base_url="http://server") as http:
        if near_tie > 0.2:
            assert known.repeat(http, "tiny", near_tie) == 0.2
        else:
            with pytest.raises(WrongAnswerError, match=r"by 0\.2 nats"):
                known.repeat(http, "tiny", near_tie)


def test_growth_is_that_of_the_second_half() -> None:
    filling = [(float(second), 10.0 * second) for second in range(100)]
    steady = [(float(second), 1000 + 0.5 * (second % 2)) for second in range(100, 201)]
    memory = Memory(1, filling + steady)
    assert abs(memory.growth) < 0.1
    assert Memory(1, filling[:1]).growth == 0
    leaking = Memory(1, [(float(second), 0.25 * second) for second in range(201)])
    assert leaking.slope == pytest.approx(900)
    assert leaking.growth == pytest.approx(25)


def test_memory_of_a_process_is_seen() -> None:
    with watch_memory(os.getpid(), 1) as found:
        pass
    assert found.processes >= 1
    assert found.samples[0][1] > 50  # torch is in this process


def test_a_process_that_is_not_there_is_named() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(UserError, match=str(ended.pid)), watch_memory(ended.pid, 1):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "missing"], "missing is not a model"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--model", "missing", "--minutes", "0"], "--minutes must be more than 0"),
        (["--model", "missing", "--output", "missing/out.json"], "does not exist; make it first"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        soak.main(words)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_whole_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache so small that requests wait for it."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    profile = {"dtype": "float32", "enforce-eager": True, "max-model-len": 256}
    profile |= {"block-size": 32, "num-gpu-blocks-override": 16, "max-num-batched-tokens": 64}
    Path("small.yaml").write_text(json.dumps(profile))
    words = ["--model", str(checkpoint), "--config", "small.yaml", "--minutes", MINUTES]
    soak.main([*words, "--output", "soak.json"])
    found = json.loads(Path("soak.json").read_text())
    assert found["failures"] == found["near_ties"] == []
    assert found["requests"].keys() == KINDS.keys()
    assert found["seen"]["kv_cache_peak"] > 0.9
    assert found["seen"]["prefix_hits"] > 0
    assert found["memory"]["processes"] >= 3  # API, engine, worker
    assert len(found["memory"]["samples"]) > 20
