"""Checkpoints by one process and by several that share each, one after the other.

Usage: python serve_in_parallel.py PROMPTS.json FOUND.json CHECKPOINT=RANKS...
PROMPTS is a list of token ids a prompt. FOUND has under `tokens`, by checkpoint, the token ids of
the answers of one process and of that many ranks; under `stages`, of the first checkpoint as a
pipeline of two, the names of each stage's parameters.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from serve_in_turn import answers
from vllm_server import ENVIRONMENT

MAX_TOKENS = 16


def tokens(checkpoint: str, prompts: list[list[int]], ranks: int) -> list[list[int]]:
    found = answers(checkpoint, prompts, MAX_TOKENS, tensor_parallel_size=ranks)
    return [answer["tokens"] for answer in found]


def parameter_names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def stages(checkpoint: str) -> list[list[str]]:
    """Of a pipeline that is loaded and answers nothing, which vLLM 0.32 does on GPUs alone."""
    from vllm import LLM

    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        pipeline_parallel_size=2,
    )
    found = llm.apply_model(parameter_names)
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    os.environ.update(
        ENVIRONMENT,
        OMP_NUM_THREADS="1",  # ranks are as many as cores, or more
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # parameter_names is sent to the workers
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    prompts = json.loads(Path(sys.argv[1]).read_text())
    ranks = dict(word.rsplit("=", 1) for word in sys.argv[3:])
    found = {
        "tokens": {
            checkpoint: [tokens(checkpoint, prompts, 1), tokens(checkpoint, prompts, int(several))]
            for checkpoint, several in ranks.items()
        },
        "stages": stages(next(iter(ranks))),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))
