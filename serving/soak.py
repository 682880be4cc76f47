"""`python -m serving.soak`: a server under mixed load for a long time, and whether it bears that.

Many clients ask at once: short and long prompts, shared prefixes, replies in parts and in one
piece; some leave in the middle, some make mistakes. Every good request must be answered in full,
every mistake refused, fixed prompts answered as the quiet server answered them, and the server's
memory must not grow.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from serving.command import command, wide_console
from serving.contenders import CACHE, FOLDER, check_files, default_profile
from serving.endpoint import Endpoint
from serving.gauges import read, watch
from serving.memory import watch_memory
from serving.probe import Probe, WrongAnswerError
from serving.server import ServerError, serve
from serving.soaked import Soak, describe, summarize, tabulate
from serving.traffic import KINDS, SMALLEST_CONTEXT, Client
from vllm_offq.errors import UserError

WORK = Path("build/soak")  # the server's log
TIMEOUT = 300  # seconds without a byte, after which a request hangs
IDLE_TIMEOUT = 60  # seconds for the engine to notice that everybody has gone
MAX_FAILURES = 20  # then the soak ends early
PROBE_LENGTHS = (1, 7, 32, 33, 64, 100, 128, 200)
"""Tokens of the fixed prompts: less than a block of the cache, whole blocks, more."""


def fixed_prompts(client: httpx.Client, endpoint: Endpoint, text: Sequence[int]) -> list[Probe]:
    """Asked one after the other of a server that has nothing else to do."""
    lengths = [n for n in PROBE_LENGTHS if n <= min(endpoint.max_model_len // 2, len(text))]
    starts = range(0, len(text), max(1, len(text) // len(lengths)))
    return [
        Probe.ask(client, endpoint.model, [*text, *text][start : start + length])
        for start, length in zip(starts, lengths, strict=False)
    ]


def tokenize(client: httpx.Client, model: str, text: str) -> list[int]:
    """By the server, so that the tokens are those of its model."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    tokens: list[int] = client.post("/tokenize", json=body).raise_for_status().json()["tokens"]
    return tokens


def put_load(
    endpoint: Endpoint,
    text: Sequence[int],
    probes: Sequence[Probe],
    arguments: argparse.Namespace,
    found: Soak,
    console: Console,
) -> None:
    """Ask for the given time from all clients at once."""
    deadline = time.monotonic() + 60 * arguments.minutes
    finished = threading.Event()
    names, weights = zip(*((name, weight) for name, (_, weight) in KINDS.items()), strict=True)

    def keep_asking(seed: int) -> None:
        dice = random.Random(seed)
        with httpx.Client(base_url=endpoint.url, timeout=TIMEOUT) as http:
            client = Client(
                http,
                endpoint.model,
                endpoint.max_model_len,
                text,
                probes,
                arguments.near_tie,
                dice,
            )
            while not finished.is_set():
                (name,) = dice.choices(names, weights)
                began = time.monotonic()
                try:
                    found.note(KINDS[name][0](client))
                except (WrongAnswerError, httpx.HTTPError) as error:
                    found.failures.append(f"{name}: {error or type(error).__name__}")
                    if len(found.failures) >= MAX_FAILURES:
                        finished.set()
                found.requests.append((name, time.monotonic() - began))

    columns = (
        TextColumn("soaking"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[done]}"),
    )
    with (
        ThreadPoolExecutor(arguments.clients) as pool,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        try:
            asking = pool.map(
                keep_asking, range(arguments.seed, arguments.seed + arguments.clients)
            )
            task = progress.add_task("", total=60 * arguments.minutes, done="")
            began = time.monotonic()
            while not finished.wait(min(1, max(0, deadline - time.monotonic()))):
                done = f"{len(found.requests)} requests, {len(found.failures)} failures"
                progress.update(task, completed=time.monotonic() - began, done=done)
                if time.monotonic() >= deadline:
                    break
        finally:
            finished.set()
        list(asking)  # raises what a client did not expect
    found.seconds = time.monotonic() - began


def wait_until_idle(url: str) -> None:
    """Raises: WrongAnswerError if the engine goes on with what nobody waits for."""
    deadline = time.monotonic() + IDLE_TIMEOUT
    while True:
        text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
        running = read(text, "vllm:num_requests_running") + read(text, "vllm:num_requests_waiting")
        usage = read(text, "vllm:kv_cache_usage_perc")
        if running == 0 and usage == 0:
            return
        if time.monotonic() > deadline:
            raise WrongAnswerError(
                f"{IDLE_TIMEOUT} s after the last client left, {running:.0f} requests run or wait "
                f"and {usage:.1%} of the KV cache is in use"
            )
        time.sleep(0.5)


def soak(
    endpoint: Endpoint, pid: int | None, arguments: argparse.Namespace, console: Console
) -> Soak:
    """Ask the quiet server, put the load on it, ask it again.

    pid: of the server's process, whose memory is watched; None: it is not.
    Raises: UserError if the quiet server cannot be asked.
    """
    found = Soak()
    with httpx.Client(base_url=endpoint.url, timeout=TIMEOUT) as client:
        try:
            text = tokenize(client, endpoint.model, (FOLDER / "demo_text.txt").read_text())
            probes = fixed_prompts(client, endpoint, text)
        except httpx.HTTPError as error:
            raise UserError(f"the server at {endpoint.url} does not answer: {error}") from error
        memory = nullcontext() if pid is None else watch_memory(pid, 60 * arguments.minutes)
        try:
            with memory as found.memory, watch(endpoint.url) as found.seen:
                put_load(endpoint, text, probes, arguments, found, console)
                wait_until_idle(endpoint.url)
            for probe in probes:
                found.note(probe.repeat(client, endpoint.model, arguments.near_tie))
        except (WrongAnswerError, ServerError, httpx.HTTPError) as error:
            found.failures.append(f"after the load: {error or type(error).__name__}")
    if found.memory is not None and found.memory.growth > arguments.max_growth:
        found.failures.append(f"memory grew by {found.memory.growth:.0f} MiB in the second half")
    return found


@contextmanager
def served(arguments: argparse.Namespace) -> Iterator[tuple[Endpoint, int | None]]:
    """The server, and its process where that is known; one of our own ends with the block."""
    if arguments.url is not None:
        yield Endpoint.connect(arguments.url), arguments.pid
        return
    check_files(arguments.config, arguments.model)
    WORK.mkdir(parents=True, exist_ok=True)
    # The cache's size is the profile's matter, where the user sets no variable.
    environment = {CACHE: os.environ.get(CACHE)}
    profile = ("--config", str(arguments.config))
    with serve(arguments.model, WORK / "server.log", *profile, environment=environment) as server:
        yield Endpoint.connect(server.url), server.process.pid


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(prog="python -m serving.soak", description=__doc__)
    which = found.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of a model, which is served for it")
    which.add_argument("--url", help="of a server that runs already")
    found.add_argument("--pid", type=int, help="process of the server at --url: watch its memory")
    found.add_argument(
        "--config",
        type=Path,
        default=default_profile(),
        help="options of `vllm serve` for --model (default: %(default)s)",
    )
    found.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    found.add_argument("--clients", type=int, default=8, help="at once (default: %(default)s)")
    found.add_argument("--seed", type=int, default=0, help="of what clients ask")
    found.add_argument(
        "--near-tie",
        type=float,
        default=0.0,
        metavar="NATS",
        help="an answer may part from the quiet server's where that preferred its own token by "
        "less than this (default: %(default)s, it may not)",
    )
    found.add_argument(
        "--max-growth",
        type=float,
        default=32,
        metavar="MIB",
        help="of the server's memory in the second half (default: %(default)s)",
    )
    found.add_argument("--output", type=Path, help="JSON file for the results")
    return found


def run(arguments: argparse.Namespace, console: Console) -> Soak:
    """Soak a server, show the table, write the file."""
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise UserError(f"the folder of {arguments.output} does not exist; make it first")
    if arguments.minutes <= 0 or arguments.clients < 1:
        raise UserError("--minutes must be more than 0, and --clients 1 or more")
    with served(arguments) as (endpoint, pid):
        if endpoint.max_model_len < SMALLEST_CONTEXT:
            raise UserError(
                f"the server allows {endpoint.max_model_len} tokens of prompt and reply; a soak "
                f"needs {SMALLEST_CONTEXT} or more"
            )
        endpoint.warm_up()
        found = soak(endpoint, pid, arguments, console)
    console.print(tabulate(found))
    console.print(describe(found.memory))
    for failure in found.failures:
        console.print(failure, style="red")
    if arguments.output:
        record = {
            "server": arguments.url or str(arguments.model),
            "clients": arguments.clients,
            **summarize(found),
        }
        text = json.dumps(record, indent=2) + "\n"
        arguments.output.write_text(text, encoding="utf-8")
    return found


def main(words: Sequence[str] | None = None) -> None:
    """The command; without words, those of the command line. Exit code 1 after a failure."""
    arguments = parser().parse_args(words)
    with command("soak"):
        if run(arguments, wide_console()).failures:
            sys.exit(1)


if __name__ == "__main__":
    main()
