"""What decides the result of a run, in a form that can be kept and compared."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

import vllm_offq
from calibration.loader import Original
from calibration.settings import Settings

VOLATILE = ("_name_or_path", "transformers_version")
"""Of a configuration: where and by what it was read."""


def fingerprint(original: Original, settings: Settings) -> dict[str, Any]:
    """By names for the sentence that refuses a run which would go on as another one.

    original: as it was loaded; quantizing changes its configuration.
    """
    around = original.surroundings
    config = around.config if around else original.model.config
    return (
        asdict(settings)
        | {
            "model": original.name,
            "weights": original.weights.fingerprint(),
            "tokenizer": _tokenizer(original.tokenizer),
            "program": vllm_offq.__version__,
        }
        | _by_names("config", json.loads(config.to_json_string(use_diff=False)))
    )


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of its files, whatever kind it is."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _by_names(name: str, value: Any) -> dict[str, Any]:
    """Dotted ones for what is nested."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if key not in VOLATILE:
            found |= _by_names(f"{name}.{key}", inner)
    return found
