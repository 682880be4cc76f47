"""Fixed prompts whose greedy answers a server must give again, however busy it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

MAX_TOKENS = 16


class WrongAnswerError(Exception):
    """The server did not do what it should; the message says what it did."""


@dataclass(frozen=True)
class Probe:
    """A prompt and a greedy answer, both in token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    margins: tuple[float, ...]
    """Nats by which each token of the answer was likelier than the second best."""

    @classmethod
    def ask(cls, client: httpx.Client, model: str, prompt: Sequence[int]) -> "Probe":
        """Raises: httpx.HTTPError if there is no answer."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        reply = client.post("/v1/completions", json=body).raise_for_status().json()
        choice: dict[str, Any] = reply["choices"][0]
        margins = []
        for candidates in choice["logprobs"]["top_logprobs"]:
            best, second = sorted(candidates.values(), reverse=True)[:2]
            margins.append(best - second)
        return cls(tuple(prompt), tuple(choice["token_ids"]), tuple(margins))

    def repeat(self, client: httpx.Client, model: str, near_tie: float) -> float | None:
        """Ask again. Returns: None after the same answer; else the margin where the two part.

        Raises: WrongAnswerError if that margin is not below near_tie; httpx.HTTPError.
        """
        again = self.ask(client, model, self.prompt)
        pairs = zip(self.answer, again.answer, self.margins, strict=True)
        parted = next((margin for mine, other, margin in pairs if mine != other), None)
        if parted is not None and parted >= near_tie:
            raise WrongAnswerError(
                f"a fixed prompt of {len(self.prompt)} tokens got another answer than of the quiet "
                f"server, which preferred its own by {parted:.3g} nats"
            )
        return parted
