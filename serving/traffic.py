"""What one of many clients asks of a server, a request at a time: sensible things and others."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from serving.probe import Probe, WrongAnswerError

COMPLETIONS = "/v1/completions"
SHORT = 32
"""Tokens of a short prompt at most; half as many are those of a short reply."""
LONG = 1024
LONG_REPLY = 64
SMALLEST_CONTEXT = 4 * SHORT


@dataclass(frozen=True)
class Client:
    """One of those who ask at the same time.

    All methods raise WrongAnswerError or httpx.HTTPError.
    """

    http: httpx.Client
    model: str
    context: int
    """Tokens of a prompt and its reply together."""
    text: Sequence[int]
    """Token ids to cut prompts from."""
    probes: Sequence[Probe]
    near_tie: float
    """Nats; a fixed prompt's answer may part where the quiet server was less sure than this."""
    dice: random.Random

    def asks(self) -> None:
        """A short prompt, a short reply, in one piece."""
        self._complete(self._cut(SHORT), self.dice.randint(1, SHORT // 2))

    def asks_much(self) -> None:
        """A long prompt, which takes several steps."""
        longest = min(self.context // 2, LONG)
        self._complete(self._cut(longest, at_least=longest // 2), SHORT // 2)

    def shares_prefix(self) -> None:
        """A prompt that begins as many others do."""
        prefix = self.text[: min(self.context // 4, LONG // 4)]
        self._complete([*prefix, *self._cut(SHORT)], self.dice.randint(1, SHORT // 2))

    def streams(self) -> None:
        """A reply in parts, read to the end."""
        length = min(self.context // 4, LONG_REPLY)
        body = self._body(self._cut(SHORT), length, stream_options={"include_usage": True})
        with self._stream(body) as parts:
            received = list(parts)
        if received[-1:] != ["[DONE]"]:
            raise WrongAnswerError("a stream stopped before its end")
        self._check_length(json.loads(received[-2]), length)

    def leaves_stream(self) -> None:
        """Closes the connection after some parts of a reply."""
        length = min(self.context // 2, LONG)
        with self._stream(self._body(self._cut(SHORT), length)) as parts:
            for _ in range(self.dice.randint(1, 8)):
                next(parts, None)

    def leaves_early(self) -> None:
        """Waits a moment for a long reply and then no longer."""
        body = self._body(self._cut(SHORT), min(self.context // 2, LONG))
        try:
            self._ok(self.http.post(COMPLETIONS, json=body, timeout=self.dice.uniform(0.02, 1)))
        except httpx.TimeoutException:
            return

    def makes_mistake(self) -> None:
        """What the server must refuse, and survive."""
        good = self._body(self._cut(SHORT), 4)
        too_long = list(self.text) * (self.context // len(self.text) + 1)
        mistake: dict[str, Any] = self.dice.choice(
            [
                {"prompt": too_long[: self.context + 1]},
                {"prompt": [2**31 - 1]},  # no such token
                {"max_tokens": -1},
                {"temperature": "hot"},
                {"model": "no such model"},
            ]
        )
        code = self.http.post(COMPLETIONS, json=good | mistake).status_code
        if not 400 <= code < 500:
            raise WrongAnswerError(
                f"a request with a wrong {next(iter(mistake))} got status {code}"
            )

    def repeats(self) -> float | None:
        """A fixed prompt. Returns: nats, if its answer parts from the quiet one's at a near tie."""
        return self.dice.choice(self.probes).repeat(self.http, self.model, self.near_tie)

    def _cut(self, at_most: int, at_least: int = 1) -> list[int]:
        length = min(self.dice.randint(at_least, at_most), len(self.text))
        start = self.dice.randint(0, len(self.text) - length)
        return list(self.text[start : start + length])

    def _body(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": self.dice.choice([0, 0.8]),
            **more,
        }

    def _complete(self, prompt: Sequence[int], max_tokens: int) -> None:
        reply = self.http.post(COMPLETIONS, json=self._body(prompt, max_tokens))
        self._check_length(self._ok(reply).json(), max_tokens)

    @contextmanager
    def _stream(self, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """The data of a reply's parts; leaving the block closes the connection."""
        with self.http.stream("POST", COMPLETIONS, json=body | {"stream": True}) as reply:
            self._ok(reply)
            yield self._data(reply)

    @staticmethod
    def _data(reply: httpx.Response) -> Iterator[str]:
        for line in reply.iter_lines():
            if line.startswith('data: {"error"'):
                raise WrongAnswerError(f"a stream had an error: {line}")
            if line.startswith("data: "):
                yield line.removeprefix("data: ")

    @staticmethod
    def _ok(reply: httpx.Response) -> httpx.Response:
        if reply.status_code != 200:
            raise WrongAnswerError(f"a good request got status {reply.status_code}")
        return reply

    @staticmethod
    def _check_length(reply: dict[str, Any], max_tokens: int) -> None:
        tokens = reply["usage"]["completion_tokens"]
        if tokens != max_tokens:
            raise WrongAnswerError(f"a reply had {tokens} tokens and not {max_tokens}")


Kind = Callable[[Client], float | None]
KINDS: dict[str, tuple[Kind, int]] = {
    "short prompt": (Client.asks, 4),
    "long prompt": (Client.asks_much, 1),
    "shared prefix": (Client.shares_prefix, 3),
    "stream": (Client.streams, 3),
    "stream, left": (Client.leaves_stream, 2),
    "reply, not waited for": (Client.leaves_early, 1),
    "mistake": (Client.makes_mistake, 1),
    "fixed prompt": (Client.repeats, 4),
}
"""By name: what is done, and how often in relation to the others."""
