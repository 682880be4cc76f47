"""What `offq quantize` costs: time and memory a block, on models of random weights; or of a model.

    python -m benchmarks.calibration                      # is memory independent of the depth?
    python -m benchmarks.calibration --shape llama-3-8b   # what would 8B and 70B cost here?
    python -m benchmarks.calibration --model MODEL --calibration TEXT --samples 128 \\
        --sequence-length 1024

Each run is a process of its own, whose peak of resident memory the kernel reports.
"""

import argparse
import cProfile
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.calibration_model import H100, block_work, matrix_bytes, this_machine
from benchmarks.calibration_profile import seconds_by_part
from benchmarks.calibration_profile import table as profile_table
from benchmarks.machine import describe_machine
from calibration.memory import map_large_tensors
from calibration.pipeline import quantize
from calibration.settings import Settings
from vllm_offq.errors import UserError

SHAPES = {
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama-3-70b": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
DEPTH = {"llama-3-8b": 32, "llama-3-70b": 80}


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    layers: int
    peak_bytes: int
    """Resident memory at most; after the imports it was `base_bytes`."""
    base_bytes: int
    seconds: dict[str, float]
    """By stage."""
    parts: dict[str, float]
    """Seconds of benchmarks.calibration_profile.PARTS in all stages; empty if not profiled."""


def make_model(folder: Path, shape: LlamaConfig, layers: int) -> Path:
    """Random bfloat16 weights, a shard a block, and a tokenizer of words."""
    config = LlamaConfig(**shape.to_dict() | {"num_hidden_layers": layers})
    config.architectures = ["LlamaForCausalLM"]
    config.tie_word_embeddings = False
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in skeleton.named_parameters():
        shard = ".".join(name.split(".")[:3]) if ".layers." in name else name
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 2:
            tensor.normal_(0, 0.02, generator=generator)
        shards.setdefault(shard, {})[name] = tensor
        if ".layers." not in name or name.endswith("post_attention_layernorm.weight"):
            save_file(shards[shard], folder / f"{shard}.safetensors", metadata={"format": "pt"})
            shards[shard] = dict.fromkeys(shards[shard], torch.empty(0))
    weight_map = {
        name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def write_text(folder: Path, shape: LlamaConfig, num_tokens: int) -> Path:
    """Random words of the tokenizer's."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(1, shape.vocab_size, (num_tokens,), generator=generator)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
    return text


def measure(model: Path, settings: Settings, profile: bool = False) -> Cost:
    """Quantize in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(model, settings, profile, sender))
    process.start()
    sender.close()
    try:
        found: Cost | UserError = receiver.recv()
        return found if isinstance(found, Cost) else sys.exit(f"benchmarks.calibration: {found}")
    except EOFError:
        sys.exit("a run ended without a result, most likely for want of memory")
    finally:
        process.join()


def _measure(model: Path, settings: Settings, profile: bool, sender: object) -> None:
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
        start = time.perf_counter()
        yield lambda steps=1: None
        seconds[description] = time.perf_counter() - start

    map_large_tensors()
    base = _peak_bytes()
    found: Cost | UserError
    profiler = cProfile.Profile()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if profile:
                profiler.enable()
            report = quantize(str(model), Path(folder) / "out", settings, progress=timed)
            profiler.disable()
        layers = max(map(len, report.signal_to_noise.values()))
        parts = seconds_by_part(profiler) if profile else {}
        found = Cost(layers, _peak_bytes(), base, seconds, parts)
    except UserError as error:
        found = error
    sender.send(found)  # type: ignore[attr-defined]


def _peak_bytes() -> int:
    # Of this program alone: getrusage also counts what the process was before it became that.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run(shape: str, depths: list[int], settings: Settings) -> list[Cost]:
    """One cost for each depth. settings: all but the text."""
    costs = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(Path(folder), SHAPES[shape], layers)
            text = write_text(model, SHAPES[shape], settings.samples * settings.sequence_length)
            costs.append(measure(model, replace(settings, calibration=(str(text),))))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, default="small")
    what.add_argument("--model", type=Path, help="a real one, in a Hugging Face folder")
    parser.add_argument("--calibration", action="append", help="its text, as of `offq quantize`")
    parser.add_argument("--refine", type=int, default=0, metavar="STEPS")
    parser.add_argument("--layers", type=int, nargs="+", help="default: 4 8, of 8B and 70B 1 2")
    parser.add_argument("--profile", action="store_true", help="of --model: what takes the time")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.calibration):
        parser.error("--model and --calibration go together")
    if arguments.profile and not arguments.model:
        parser.error("--profile is of a real model; give --model")
    if arguments.model and arguments.layers:
        parser.error("--layers is of models of random weights; leave it out with --model")
    try:
        settings = Settings(
            calibration=tuple(arguments.calibration or Settings.calibration),
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
            refine=arguments.refine,
        )
    except UserError as error:
        parser.error(str(error))
    if arguments.model:
        costs = [measure(arguments.model, settings, arguments.profile)]
        name = arguments.model.name
    else:
        depths = arguments.layers or ([1, 2] if arguments.shape in DEPTH else [4, 8])
        costs, name = run(arguments.shape, depths, settings), f"blocks of {arguments.shape}"
    tokens = f"{arguments.samples} x {arguments.sequence_length} tokens"
    console = Console(width=140)
    table = Table(title=f"offq quantize, {name}, {tokens}")
    stages = list(costs[0].seconds)
    for column in ("blocks", "peak MB", "of it imports", *(f"{x}, s" for x in stages), "all, s"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.layers),
            f"{cost.peak_bytes / 1e6:.0f}",
            f"{cost.base_bytes / 1e6:.0f}",
            *(f"{cost.seconds[stage]:.1f}" for stage in stages),
            f"{sum(cost.seconds.values()):.0f}",
        )
    console.print(table)
    if arguments.profile:
        console.print(profile_table(costs[0].parts, sum(costs[0].seconds.values())))
    if len(costs) > 1:
        console.print(by_depth(costs[0], costs[-1]))
        if arguments.shape in DEPTH:
            workload = (arguments.samples, arguments.sequence_length)
            console.print(elsewhere(arguments.shape, costs[0], costs[-1], *workload))
    console.print(describe_machine())


def by_depth(first: Cost, last: Cost) -> str:
    """What more blocks cost."""
    block, rest = seconds_of(first, last)
    most, least = (cost.peak_bytes - cost.base_bytes for cost in (last, first))
    return (
        f"{last.layers} blocks need {last.peak_bytes / first.peak_bytes:.2f} times the memory "
        f"of {first.layers}, beyond the imports {most / least:.2f} times; "
        f"a block takes {block:.1f} s, all else {rest:.1f} s"
    )


def seconds_of(first: Cost, last: Cost) -> tuple[float, float]:
    """Of a block, and of all else."""
    totals = [sum(cost.seconds.values()) for cost in (first, last)]
    block = (totals[1] - totals[0]) / (last.layers - first.layers)
    return block, totals[0] - first.layers * block


def elsewhere(shape: str, first: Cost, last: Cost, samples: int, sequence_length: int) -> Table:
    """Whole models on this CPU and on a GPU, from the run that was measured."""
    measured, rest = seconds_of(first, last)
    here = this_machine()
    predicted = here.seconds(block_work(SHAPES[shape], samples, sequence_length))
    table = Table(
        title="Extrapolated by counts of operations (benchmarks/calibration_model.py), not timed",
        caption=f"The model gives a measured block of {measured:.0f} s {predicted:.0f} s; times on "
        "this CPU are corrected by that. All else is scaled as the blocks are. Memory: the run's "
        "own, and what the widest block adds to it; on the GPU a block's part alone.",
    )
    for column in ("model", "where", "a block, s", "all, hours", "memory, GB"):
        table.add_column(column, justify="left" if column in ("model", "where") else "right")
    for name, depth in DEPTH.items():
        work = block_work(SHAPES[name], samples, sequence_length)
        matrices = matrix_bytes(SHAPES[name])
        besides = last.peak_bytes - matrix_bytes(SHAPES[shape])
        for machine, factor, extra in ((here, measured / predicted, besides), (H100, 1.0, 0)):
            block = machine.seconds(work) * factor
            hours = (depth + rest / measured) * block / 3600
            memory = (matrices + extra) / 1e9
            table.add_row(name, machine.name, f"{block:.1f}", f"{hours:.1f}", f"{memory:.0f}")
    return table


if __name__ == "__main__":
    main()
