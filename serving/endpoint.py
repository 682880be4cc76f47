"""A running OpenAI-compatible server, whoever started it."""

from dataclasses import dataclass

import httpx

from vllm_offq.errors import UserError

PATIENCE = 600  # seconds for the first answer: kernels may be compiled before it


@dataclass(frozen=True)
class Endpoint:
    """What requests to a server need to know."""

    url: str
    model: str
    """The name that requests call it by."""
    max_model_len: int
    """Tokens of a prompt and its answer together."""

    @classmethod
    def connect(cls, url: str) -> "Endpoint":
        """Ask the server at url (without /v1) what it serves.

        Raises: UserError if there is no vLLM server.
        """
        url = url.rstrip("/").removesuffix("/v1")
        try:
            served = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]
            return cls(url, served["id"], served["max_model_len"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"no server answers at {url} ({error}); is it running?") from error
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"the server at {url} is not one of vLLM") from error

    def warm_up(self, prompt_len: int = 8) -> None:
        """Have it answer once, with log-probabilities: the first answer takes the longest."""
        body = {
            "model": self.model,
            "prompt": [1] * prompt_len,  # token ids
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
        }
        try:
            httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(f"the server at {self.url} does not answer: {error}") from error
