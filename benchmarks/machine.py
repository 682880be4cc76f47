"""What the machine is, and the limits that no kernel on it can pass."""

import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from vllm_offq.kernels.cpu import library

SOURCE = Path(__file__).with_name("peak.cpp")
KERNELS = Path(library.__file__).with_name("src")
FLAGS = {
    "avx512_vnni": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    "avx_vnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "neon_dotprod": ["-march=armv8.2-a+dotprod+fp16"],
}
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp")


def describe_machine() -> str:
    """Processor, its instruction sets that matter here, cores that this process may use, GPU."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    model = fields.get("model name", "unknown processor")
    isas = " ".join(flag for flag in ISA_FLAGS if flag in flags)
    gpus = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([model, f"{len(os.sched_getaffinity(0))} cores", isas, *gpus])


@cache
def compile_limits(isa: str) -> ctypes.CDLL:
    """peak.cpp for an instruction set."""
    if not shutil.which("g++"):
        sys.exit("The machine's limits are measured in C++: install g++ 11 or newer.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        options = ["-std=c++17", "-O3", "-fPIC", "-shared", "-w", f"-I{KERNELS}", *FLAGS[isa]]
        command = ["g++", *options, f"-DPEAK_{isa.upper()}", str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True)
        limits = ctypes.CDLL(str(path))
    limits.peak.restype = ctypes.c_double
    limits.read_all.restype = ctypes.c_float
    return limits


def median_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(isa: str, size: int) -> float:
    """Bytes a second that one thread reads, again and again, from `size` bytes of memory."""
    data = torch.ones(size // 1024 * 256)
    limits, pointer = compile_limits(isa), ctypes.c_void_p(data.data_ptr())
    count = ctypes.c_int64(data.numel())
    return data.nbytes / median_seconds(lambda: limits.read_all(pointer, count))


def multiply_add_peak(isa: str) -> float:
    """Multiply-adds a second of the kernels' inner loop on data in the first-level cache."""
    limits, repeats = compile_limits(isa), ctypes.c_int64(50_000)
    multiply_adds: float = limits.peak(repeats)
    return multiply_adds / median_seconds(lambda: limits.peak(repeats))
