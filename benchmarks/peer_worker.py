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
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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


def load(folder: str, arguments: dict[str, Any], unpacked: Path) -> Any:
    """The model in float32. unpacked: where a GGUF file's goes first.

    For llm-compressor looks for configuration and tokenizer in the model's folder.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if "gguf_file" not in arguments:
        return AutoModelForCausalLM.from_pretrained(folder, **options, **arguments)
    options["quantization_config"] = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options, **arguments)
    model.save_pretrained(unpacked)
    AutoTokenizer.from_pretrained(folder, **arguments).save_pretrained(unpacked)
    return AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32)


def main(task: dict[str, Any]) -> None:
    """Quantize, and score each mode."""
    tokens = load_file(task["tokens"])
    model = load(task["folder"], task["arguments"], Path(task["out"]).with_name("model"))
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
