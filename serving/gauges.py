"""What a vLLM server says of itself at /metrics."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from serving.beside import beside
from serving.server import ServerError

PERIOD = 0.25  # seconds between two looks at what is not counted up


def read(text: str, name: str) -> float:
    """The sum of a metric's values over its labels, from Prometheus's text format."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(maxsplit=1)[1]) for line in lines)


@dataclass
class Watch:
    """What happened while a server was watched; complete after the `with` block."""

    kv_cache_peak: float = 0.0
    """Largest share of the cache in use."""
    preemptions: float = 0.0
    """Requests that had to give their cache back and were calculated anew."""
    prefix_queries: float = 0.0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: float = 0.0


COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}


@contextmanager
def watch(url: str) -> Iterator[Watch]:
    """Look at a server's metrics before, during and after the block.

    Raises: ServerError if there are none before or after it.
    """
    with httpx.Client(base_url=url, timeout=30) as client:
        found = Watch()

        def scrape() -> str:
            try:
                text = client.get("/metrics").raise_for_status().text
            except httpx.HTTPError as error:
                raise ServerError(f"the server at {url} has no /metrics: {error}") from error
            found.kv_cache_peak = max(found.kv_cache_peak, read(text, "vllm:kv_cache_usage_perc"))
            return text

        def look() -> None:
            with suppress(ServerError):  # of a server that has died, the block knows more
                scrape()

        before = scrape()
        with beside(look, PERIOD):
            yield found
        after = scrape()
        for name, metric in COUNTERS.items():
            setattr(found, name, read(after, metric) - read(before, metric))
