"""llama.cpp's part of `benchmarks.llama_cpp`, run by a Python that has llama-cpp-python.

Takes what to do as a JSON object on the command line, prints what it measured as another one.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np

CACHES = {"q4_0": llama.GGML_TYPE_Q4_0, "f16": llama.GGML_TYPE_F16}
FLASH_ATTENTION = {"q4_0": 1, "f16": 0}
"""llama.cpp's enum: q4_0 values need it; with f16 ones decoding is faster without."""


def quantize(source: Path, target: Path, threads: int) -> None:
    """To q4_0, as llama.cpp's own `llama-quantize` does it."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.nthread = threads
    failed = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if failed:
        sys.exit(f"llama.cpp could not quantize {source}")


class Session:
    """A model with a KV cache for one sequence."""

    def __init__(self, gguf: Path, cache: str, length: int, threads: int) -> None:
        self.model = llama.llama_model_load_from_file(
            str(gguf).encode(), llama.llama_model_default_params()
        )
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHES[cache]
        parameters.flash_attn_type = FLASH_ATTENTION[cache]
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            sys.exit(f"llama.cpp refused {gguf}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int]) -> int:
        """Run the next tokens; return the likeliest one to follow."""
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(self.context, llama.llama_batch_get_one(array, len(tokens))):
            sys.exit("llama_decode failed")
        logits = llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def generate(session: Session, input_len: int, output_len: int) -> tuple[float, float]:
    """Seconds for the prompt with its first token, and for the tokens after that."""
    prompt = np.random.default_rng(0).integers(session.vocabulary, size=input_len).tolist()
    session.clear()
    began = time.perf_counter()
    token = session.decode(prompt)
    first = time.perf_counter()
    for _ in range(output_len - 1):
        token = session.decode([token])
    return first - began, time.perf_counter() - first


def main(task: dict[str, Any]) -> None:
    cores, gguf = task["cores"], Path(task["gguf"])
    input_len, output_len = task["input_len"], task["output_len"]
    os.sched_setaffinity(0, cores)
    if not gguf.exists():
        quantize(Path(task["source"]), gguf, len(cores))
    llama.llama_backend_init()
    measured = []
    for cache in CACHES:
        session = Session(gguf, cache, input_len + output_len, len(cores))
        generate(session, input_len, 2)  # warms up
        prefill, decode = generate(session, input_len, output_len)
        measured.append(
            {
                "engine": f"llama.cpp q4_0, KV cache {cache}",
                "weights_mb": llama.llama_model_size(session.model) / 1e6,
                "prefill_tokens_s": input_len / prefill,
                "decode_tokens_s": (output_len - 1) / decode,
            }
        )
    print(json.dumps(measured))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
