"""The CPU kernels against the strongest unquantized ones on this machine, side by side.

    python -m benchmarks.kernels [linear] [attention] [--threads 1] [--rounds 7] [--avx2]

Linear: activations to output in one call, against torch in float32 and bfloat16 and vLLM's oneDNN
path; attention: over 4-bit pages against vLLM's own CPU attention. Every contender walks through as
many copies of a layer as fill 64 MB in bfloat16: a served model does not find its weights in the
nearest caches either. Figures are medians over interleaved rounds. --avx2 holds every contender to
AVX2, to see on a newer machine what the older ones get.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from types import ModuleType
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.machine import describe_machine, multiply_add_peak, read_bandwidth
from vllm_offq.kernels import cpu
from vllm_offq.kernels.cpu import library
from vllm_offq.kernels.reference import kv_page_bytes

LAYERS = {
    "SmolLM2-135M qkv": (960, 576, 64),
    "SmolLM2-135M gate_up": (3072, 576, 64),
    "SmolLM2-135M down": (576, 1536, 64),
    "Qwen2.5-0.5B gate_up": (9728, 896, 128),
    "Qwen2.5-0.5B down": (896, 4864, 128),
    "Llama-3-8B qkv": (6144, 4096, 128),
    "Llama-3-8B down": (4096, 14336, 128),
}
"""[out_features, in_features, group_size]."""
TOKENS = (1, 2, 4, 8, 16, 64, 256)
CONTEXTS = (128, 512, 1024, 4096, 16384)
COPIES_BYTES = 64 << 20
"""Of a layer's copies in bfloat16; in 4 bits they have a quarter of it."""

AVX2 = {
    library.ISA_OVERRIDE: "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}

Call = Callable[[], object]
console = Console(width=110, highlight=False)


def hold_to_avx2() -> None:
    """Once more from the start if need be: libraries read the variables when they are loaded."""
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **AVX2})
    # vLLM has no setting: it asks torch which of its libraries to load.
    patch.object(torch.cpu, "_is_avx512_supported", return_value=False).start()


def selected_isa() -> str:
    usable = library.usable_isas()
    return next(name for name, number in usable.items() if number == library.isa())


def median_times(contenders: dict[str, Call], rounds: int, warm_up: int) -> dict[str, float]:
    """Seconds a call of each, median over rounds in which the contenders take turns."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(warm_up):
            call()
        start = time.perf_counter()
        call()
        calls[name] = max(1, min(200, round(0.02 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def linear_contenders(
    out_features: int, in_features: int, group_size: int, tokens: int, copies: int
) -> dict[str, Call]:
    from vllm import _custom_ops as vllm_ops

    x = torch.randn(tokens, in_features)
    packed = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
    scale = torch.full((out_features, 1), 0.01).half()
    weights = cycle([cpu.prepare_weight(packed, scale, group_size) for _ in range(copies)])
    settings = (None, out_features, group_size, 0, 0.95, False)
    contenders: dict[str, Call] = {"offq": lambda: cpu.linear(x, next(weights), *settings)}

    def torch_linear(rows: Tensor) -> Call:
        layers = cycle([torch.randn(out_features, in_features).to(rows) for _ in range(copies)])
        return lambda: functional.linear(rows, next(layers))

    def onednn_linear(rows: Tensor) -> Call:
        layers = [torch.randn(in_features, out_features).to(rows) for _ in range(copies)]
        handlers = cycle([vllm_ops.create_onednn_mm(layer, 32) for layer in layers])
        return lambda: vllm_ops.onednn_mm(next(handlers), rows, None)

    for dtype, rows in ("float32", x), ("bfloat16", x.bfloat16()):
        contenders[f"torch {dtype}"] = torch_linear(rows)
        if dtype == "float32" or torch.cpu._is_avx512_supported():  # oneDNN's needs it for bfloat16
            contenders[f"onednn {dtype}"] = onednn_linear(rows)
    return contenders


def benchmark_linear(rounds: int) -> None:
    isa = selected_isa()
    bandwidth, peak = read_bandwidth(isa, COPIES_BYTES // 4), multiply_add_peak(isa)
    console.print(
        f"linear: one thread reads {bandwidth / 1e9:.1f} GB/s of as many bytes; "
        f"the inner loop alone reaches {peak / 1e9:.0f} G multiply-adds/s"
    )
    table = Table(
        "layer", "tokens", "offq us", "best other", "its us", "speed-up", "share of limit"
    )
    for layer, (out_features, in_features, group_size) in LAYERS.items():
        copies = max(1, COPIES_BYTES // (2 * out_features * in_features))
        for tokens in TOKENS:
            contenders = linear_contenders(out_features, in_features, group_size, tokens, copies)
            times = median_times(contenders, rounds, copies + 2)
            offq = times.pop("offq")
            best = min(times, key=lambda name: times[name])
            work = out_features * in_features
            limit = work / 2 / offq / bandwidth if tokens == 1 else work * tokens / offq / peak
            table.add_row(
                layer,
                str(tokens),
                f"{offq * 1e6:.0f}",
                best,
                f"{times[best] * 1e6:.0f}",
                f"{times[best] / offq:.1f}",
                f"{limit:.0%} of {'bandwidth' if tokens == 1 else 'multiply-adds'}",
            )
        table.add_section()
    console.print(table)


class AttentionStep:
    """One request's new tokens over its full cache: 8 KV heads, 32 heads of 128."""

    heads, kv_heads, head_size, block_size = 32, 8, 128, 128

    def __init__(self, context: int, new_tokens: int = 1) -> None:
        self.blocks = -(-context // self.block_size)
        self.table = torch.randperm(self.blocks).int().view(1, -1)
        self.seq_lens = torch.tensor([context], dtype=torch.int32)
        self.query_start_loc = torch.tensor([0, new_tokens], dtype=torch.int32)
        self.query = torch.randn(new_tokens, self.heads, self.head_size)
        self.scale = 1 / math.sqrt(self.head_size)

    def offq(self, dtype: torch.dtype, kernels: ModuleType = cpu) -> Call:
        content = kv_page_bytes(self.head_size, self.head_size)
        cache = torch.zeros(self.blocks, self.kv_heads, self.block_size, content, dtype=torch.uint8)
        key = torch.randn(self.blocks * self.block_size, self.kv_heads, self.head_size)
        kernels.kv_store(key, key, cache, torch.arange(len(key)), self.head_size)
        query = self.query.to(dtype)
        output = torch.empty_like(query)
        return lambda: kernels.paged_attention(
            query,
            cache,
            self.table,
            self.seq_lens,
            self.query_start_loc,
            output,
            self.scale,
            self.head_size,
        )

    def vllm(self, dtype: torch.dtype) -> Call:
        from vllm import _custom_ops as vllm_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, self.block_size, self.head_size)
        shape = (self.blocks, self.kv_heads, 2 * self.block_size, self.head_size)
        key_cache, value_cache = torch.randn(shape).to(dtype).chunk(2, dim=2)
        query = self.query.to(dtype)
        output = torch.empty_like(query)
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            seq_lens=self.seq_lens,
            dtype=dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        return lambda: vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )


def benchmark_attention(rounds: int) -> None:
    table = Table("attention", "context", "offq us", "vLLM bf16 us", "vLLM fp32 us", "against bf16")
    for name, new_tokens in ("decode", 1), ("prefill 256", 256):
        for context in CONTEXTS:
            step = AttentionStep(max(context, new_tokens), new_tokens)
            times = median_times(
                {
                    "offq": step.offq(torch.bfloat16),
                    "bfloat16": step.vllm(torch.bfloat16),
                    "float32": step.vllm(torch.float32),
                },
                rounds,
                2,
            )
            table.add_row(
                name,
                str(context),
                *(f"{seconds * 1e6:.0f}" for seconds in times.values()),
                f"{times['bfloat16'] / times['offq']:.1f}",
            )
        table.add_section()
    console.print(table)


BENCHMARKS = {"linear": benchmark_linear, "attention": benchmark_attention}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(BENCHMARKS)}.")] = None,
    threads: int = 1,
    rounds: int = 7,
    avx2: Annotated[bool, typer.Option("--avx2", help="Hold all contenders to AVX2.")] = False,
) -> None:
    """Measure the CPU kernels against the strongest unquantized ones."""
    if avx2:
        hold_to_avx2()
    from vllm.platforms import current_platform

    unknown = set(names or ()) - BENCHMARKS.keys()
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    obstacle = library.why_not_usable()
    if obstacle:
        sys.exit(f"Nothing to measure: the CPU kernels {obstacle}.")
    current_platform.import_kernels()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    isa = selected_isa()
    console.print(f"{describe_machine()}; {threads} thread(s), kernels for {isa}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name](rounds)


if __name__ == "__main__":
    typer.run(main)
