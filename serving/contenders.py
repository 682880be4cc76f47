"""The original and its OffQ checkpoint: served in turn with the same options, or served already."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from serving.endpoint import Endpoint
from serving.server import serve
from vllm_offq.errors import UserError

FOLDER = Path(__file__).parent
CACHE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class Contender:
    """One of the two models."""

    name: str
    model: Path
    """Hugging Face folder: weights and tokenizer."""
    url: str | None
    """Of the server that serves it already; None: we start one."""

    @contextmanager
    def served(
        self, profile: Path, log: Path, defaults: Mapping[str, str] | None = None
    ) -> Iterator[Endpoint]:
        """Its server, warmed up; one of our own lasts as long as the `with` block.

        profile: options of `vllm serve`. log: where a server of our own writes. defaults:
        variables of its environment, where the user's does not set them.
        """
        if self.url is not None:
            endpoint = Endpoint.connect(self.url)
            endpoint.warm_up()
            yield endpoint
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        # The cache's size is the profile's matter, where the user sets no variable.
        given: dict[str, str | None] = {CACHE: None, **(defaults or {})}
        environment = {name: os.environ.get(name, value) for name, value in given.items()}
        with serve(self.model, log, "--config", str(profile), environment=environment) as server:
            endpoint = Endpoint.connect(server.url)
            endpoint.warm_up()
            yield endpoint


def default_profile() -> Path:
    """Options of `vllm serve` for this machine."""
    return FOLDER / ("gpu.yaml" if torch.cuda.is_available() else "cpu.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and how it is served."""
    parser.add_argument("offq_model", type=Path, help="OffQ checkpoint, a folder")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="ORIGINAL", help="its original, a folder"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=default_profile(),
        help="options of `vllm serve` for both models (default: %(default)s)",
    )
    parser.add_argument("--server-url", help="of a running server of OFFQ_MODEL; starts none")
    parser.add_argument("--against-url", help="of a running server of ORIGINAL; starts none")


def contenders(arguments: argparse.Namespace) -> tuple[Contender, Contender]:
    """The original and the OffQ checkpoint.

    Raises: UserError if one is missing or not what it should be.
    """
    check_files(arguments.config, arguments.against, arguments.offq_model)
    if _method(arguments.against) == "offq":
        raise UserError(f"{arguments.against} is an OffQ checkpoint itself, not an original")
    if _method(arguments.offq_model) != "offq":
        raise UserError(f"{arguments.offq_model} is no OffQ checkpoint; `offq quantize` makes one")
    return (
        Contender("original", arguments.against, arguments.against_url),
        Contender("OffQ", arguments.offq_model, arguments.server_url),
    )


def check_files(config: Path, *models: Path) -> None:
    """Raises: UserError if the config file or a model is missing."""
    if not config.is_file():
        raise UserError(f"the config file {config} does not exist")
    for model in models:
        if not (model / "config.json").is_file():
            raise UserError(
                f"{model} is not a model: it has no config.json; a model of the Hugging Face hub "
                "is brought here by `hf download NAME --local-dir FOLDER`"
            )


def _method(model: Path) -> str | None:
    """How a model is quantized."""
    config = json.loads((model / "config.json").read_text())
    quantization = config.get("quantization_config") or {}
    method: str | None = quantization.get("quant_method")
    return method
