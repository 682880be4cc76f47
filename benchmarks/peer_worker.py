"""llm-compressor's part of `benchmarks.accuracy`, run by a Python that has llm-compressor.

Takes the path of a JSON file that says what to do, see benchmarks.peer, and writes what it measured
to another one. Of this project only benchmarks.scores can be imported here.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot  # type: ignore[import-not-found]
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from benchmarks.scores import score


def bits_per_weight(model: Any) -> float:
    """Of the quantized linears, with a weight's share of the 16-bit scales."""
    bits = weights = 0
    for linear in model.modules():
        if hasattr(linear, "weight_scale"):
            weights += linear.weight.numel()
            bits += 4 * linear.weight.numel() + 16 * linear.weight_scale.numel()
    return bits / weights


def set_mode(model: Any, mode: str) -> None:
    """Turn the quantization of keys and values, which compressed-tensors adds, on or off."""
    for attention in model.modules():
        if hasattr(attention, "kv_cache"):
            attention.quantization_enabled = "KV4" in mode


def main(task: dict[str, Any]) -> None:
    """Quantize, and score each mode."""
    tokens = load_file(task["tokens"])
    arguments = {"dtype": torch.float32} | task["arguments"]
    model: Any = AutoModelForCausalLM.from_pretrained(task["folder"], **arguments)
    samples: Any = [
        {"input_ids": sample, "attention_mask": torch.ones_like(sample)}
        for sample in tokens["calibration"]
    ]
    oneshot(model=model, dataset=DataLoader(samples), recipe=task["recipe"])
    bits = bits_per_weight(model)
    measured = []
    for mode in task["modes"]:
        set_mode(model, mode)
        scores = score(model, tokens["windows"], Path(task["references"]), tqdm)
        measured.append({"mode": mode, "scores": asdict(scores), "bits": bits})
    Path(task["out"]).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
