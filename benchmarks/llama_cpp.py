"""Set vLLM with OffQ beside llama.cpp: one stream, the same model, the same cores.

llama.cpp runs inside a Python process, without a server, on q4_0 weights; its KV cache is first
q4_0, about as small as OffQ's, then f16, with which it is faster. vLLM is asked over HTTP, as
people use it, so its numbers bear the server's share.
"""

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.gguf_model import write_gguf
from benchmarks.serving import (
    WORK,
    Cores,
    DTypes,
    InputLen,
    JsonPath,
    Kernels,
    OffQ,
    Original,
    OutputLen,
    Run,
    Workload,
    configurations,
    console,
    describe,
    environment,
    measure,
)

REQUESTS = 3  # to vLLM in every round, one after the other
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python'


@dataclass(frozen=True)
class Speed:
    engine: str
    weights_mb: float
    prefill_tokens_s: float
    decode_tokens_s: float


def of_vllm(run: Run, input_len: int) -> Speed:
    speed = run.speeds[1]
    return Speed(
        f"vLLM {run.configuration}",
        run.checkpoint_mb,
        1000 * input_len / speed.median_ttft_ms,
        1000 / speed.median_tpot_ms,
    )


def require_llama_cpp(python: Path) -> None:
    if subprocess.call([python, "-c", "import llama_cpp"], stderr=subprocess.DEVNULL) != 0:
        sys.exit(
            f"{python} has no llama_cpp: run `{INSTALL}` in an environment (it compiles for ten "
            "minutes) and name its Python with --llama-python."
        )


def of_llama_cpp(python: Path, task: dict[str, object]) -> list[Speed]:
    command = [str(python), "-m", "benchmarks.llama_worker", json.dumps(task)]
    log = WORK / "llama_cpp.log"
    with log.open("w") as output:
        worker = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=output)
    if worker.returncode != 0:
        raise RuntimeError(f"llama.cpp ended with exit code {worker.returncode}: {log}")
    return [Speed(**measured) for measured in json.loads(worker.stdout)]


def tabulate(speeds: Sequence[Speed], title: str) -> Table:
    table = Table(title=title)
    table.add_column("engine")
    for heading in ("weights, MB", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    for engine in dict.fromkeys(speed.engine for speed in speeds):
        own = [speed for speed in speeds if speed.engine == engine]
        medians = (
            statistics.median(column)
            for column in zip(
                *((x.weights_mb, x.prefill_tokens_s, x.decode_tokens_s) for x in own), strict=True
            )
        )
        table.add_row(engine, *(f"{median:.1f}" for median in medians))
    return table


def main(
    original: Original,
    offq: OffQ = None,
    llama_python: Annotated[Path, typer.Option(help="A Python that has llama-cpp-python.")] = Path(
        sys.executable
    ),
    dtypes: DTypes = "float32,bfloat16",
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    rounds: Annotated[int, typer.Option(help="Starts of each engine.")] = 3,
    cores: Cores = "auto",
    kernels: Kernels = None,
    json_path: JsonPath = None,
) -> None:
    """Prefill and decode speed of llama.cpp and of vLLM serving ORIGINAL and OFFQ, one stream."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with us
    require_llama_cpp(llama_python)
    workload = Workload(original, input_len, output_len, REQUESTS)
    runs, speeds = [], []
    with TemporaryDirectory() as folder:
        source = Path(folder) / "f16.gguf"
        write_gguf(original, source)
        for number in range(1, rounds + 1):
            for configuration in configurations(original, offq, dtypes):
                console.print(f"round {number} of {rounds}: {configuration.name}", style="dim")
                runs.append(measure(configuration, workload, [1], environment(cores, kernels)))
                speeds.append(of_vllm(runs[-1], input_len))
            console.print(f"round {number} of {rounds}: llama.cpp", style="dim")
            task: dict[str, object] = {
                "source": str(source),
                "gguf": str(source.with_name("q4_0.gguf")),
                "cores": runs[-1].cores,
                "input_len": input_len,
                "output_len": output_len,
            }
            speeds.extend(of_llama_cpp(llama_python, task))
    setting = describe(runs, cores) + "; llama.cpp on the same cores"
    console.print(setting, soft_wrap=True)
    title = f"One stream, {input_len} tokens in, {output_len} out; medians of {rounds} rounds"
    console.print(tabulate(speeds, title))
    if json_path:
        record = {"setting": setting, "speeds": [asdict(speed) for speed in speeds]}
        json_path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
