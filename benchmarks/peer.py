"""The peer of `benchmarks.accuracy`: rotations and GPTQ of llm-compressor.

Its requirements do not agree with this project's, so it lives in an environment of its own, whose
Python runs `benchmarks.peer_worker`:

    python scripts/setup_peer.py
    python -m benchmarks.accuracy ... --peer-python build/peer/bin/python
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from benchmarks.accuracy_recipes import Measured, Workload, calibration, group_sizes
from benchmarks.scores import Scores
from calibration.architectures import Architecture
from calibration.settings import Settings
from calibration.source import locate
from vllm_offq.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ADVICE = "make an environment with `python scripts/setup_peer.py` and name its Python"
MODES = ("W4A4KV4", "W4A4")
"""Those of benchmarks.accuracy that the peer is measured in."""
ROTATION = {"transform_type": "random-hadamard", "precision": "float32"}
"""Of any size, not powers of two alone; those at run time in float32, as the model."""
# Without R3, which rotates keys: compressed-tensors would then quantize the queries as well.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "llm-compressor: SpinQuant + GPTQ": {
        "SpinQuantModifier": {"rotations": ["R1", "R2", "R4"], **ROTATION}
    },
    "llm-compressor: QuIP + GPTQ": {"QuIPModifier": {"rotations": ["v"], **ROTATION}},
}


def settings_of(name: str, version: str, workload: Workload) -> dict[str, Any]:
    """All that decides a row of the peer besides model and windows, `recipe` in its own terms."""
    group_size, head_size = group_sizes(workload, Settings())
    dynamic = {"num_bits": 4, "type": "int", "dynamic": True}
    gptq = {
        "ignore": ["lm_head"],
        "config_groups": {
            "linears": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": group_size,
                    "observer": "memoryless_mse",
                },
                "input_activations": dynamic | {"strategy": "token", "symmetric": False},
            }
        },
        # A group is a head of one token: "token" would be a head of all tokens together.
        "kv_cache_scheme": dynamic
        | {"strategy": "group", "group_size": head_size, "symmetric": False},
    }
    modifiers = TRANSFORMS[name] | {"GPTQModifier": gptq}
    return {
        "llmcompressor": version,
        "recipe": {"default_stage": {"default_modifiers": modifiers}},
        "calibration": workload.calibration,
        "samples": workload.samples,
        "sequence_length": workload.sequence_length,
        "seed": Settings.seed,
    }


def refusal(name: str, architecture: Architecture) -> str | None:
    """Why a transform cannot be applied to a family of models, if it cannot."""
    rotations = TRANSFORMS[name].get("SpinQuantModifier", {}).get("rotations", ())
    if "R1" in rotations and not architecture.rotates_stream:
        # llm-compressor takes all norms for Llama's, and fails on Gemma with a traceback.
        return f"R1 cannot pass the norms of {architecture.name} after attention and MLP"
    return None


def version(python: Path) -> str:
    """Of llm-compressor in a Python's environment. Raises: UserError if it has none."""
    query = "from importlib.metadata import version; print(version('llmcompressor'))"
    try:
        found = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    except OSError as error:
        raise UserError(f"{python} cannot be run ({error.strerror}); {ADVICE}") from None
    except subprocess.CalledProcessError:
        raise UserError(f"{python} has no llmcompressor; {ADVICE}") from None
    return found.stdout.strip()


def measure(
    python: Path, log: Path, settings: dict[str, Any], workload: Workload, modes: list[str]
) -> Iterator[Measured]:
    """Have the peer quantize and score itself.

    log: what it prints goes there. Raises: UserError if it fails.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokens, task, out = folder / "tokens.safetensors", folder / "task.json", folder / "out.json"
        save_file({"calibration": calibration(workload), "windows": workload.windows}, tokens)
        model, arguments = locate(workload.model)
        content = {
            "folder": model,
            "arguments": arguments,
            "tokens": str(tokens),
            "references": str(workload.references),
            "recipe": json.dumps(settings["recipe"]),
            "modes": modes,
            "out": str(out),
        }
        task.write_text(json.dumps(content), encoding="utf-8")
        with log.open("w") as output:
            code = subprocess.call(
                [python, "-m", "benchmarks.peer_worker", task],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if code != 0:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"the peer failed ({last}); all that it said is in {log}")
        for measured in json.loads(out.read_text(encoding="utf-8")):
            yield measured["mode"], Scores(**measured["scores"]), measured["bits"]
