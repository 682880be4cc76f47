"""Several checkpoints, one `LLM(...)` after the other in this one process: that takes seconds each.

Usage: python serve_in_turn.py PROMPTS.json ANSWERS.json CHECKPOINT...
PROMPTS is a list of token ids a prompt; ANSWERS gives by checkpoint, for each prompt, its token
ids, those of the answer and the log-probabilities of all tokens from the prompt's second on.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_server import ENVIRONMENT

MAX_TOKENS = 4
CHUNK = 48
"""Tokens a step, so that long prompts take several."""


def answers(
    checkpoint: str, prompts: list[Any], max_tokens: int = MAX_TOKENS, **options: Any
) -> list[dict[str, Any]]:
    """Greedy answers in float32. prompts: as LLM.generate takes them; options: of LLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        block_size=32,
        **options,
    )
    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    result = []
    for output in llm.generate(prompts, parameters):
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        tokens = [*prompt, *completion.token_ids][1:]
        entries = [*output.prompt_logprobs[1:], *completion.logprobs]
        logprobs = [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]
        found = {"prompt": prompt, "tokens": list(completion.token_ids), "logprobs": logprobs}
        result.append(found)
    llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(Path(sys.argv[1]).read_text())]
    found = {checkpoint: answers(checkpoint, prompts) for checkpoint in sys.argv[3:]}
    Path(sys.argv[2]).write_text(json.dumps(found))
