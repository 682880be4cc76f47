"""The config files for `vllm serve --config`: every key is an option, and the CPU's one serves."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from vllm_server import serve_tiny

import serving

FOLDER = Path(serving.__file__).parent
READ_AS = {"2G": 2 * 2**30, "auto": -1}
PROFILES = sorted(FOLDER.glob("*.yaml"))


def parse(profile: Path, *options: str) -> Any:
    """As `vllm serve MODEL --config PROFILE` does."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for command in serve.cmd_init():
        command.subparser_init(subparsers)
    return parser.parse_args(["serve", "model", "--config", str(profile), *options])


def test_all_profiles_are_there() -> None:
    names = {profile.stem for profile in PROFILES}
    assert names == {"cpu", "gpu", "gpu-tp", "multi-node"}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_every_key_reaches_vllm(profile: Path) -> None:
    settings = yaml.safe_load(profile.read_text())
    parsed = vars(parse(profile))
    for key, value in settings.items():
        assert parsed[key.replace("-", "_")] == READ_AS.get(value, value), key


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_every_choice_is_explained(profile: Path) -> None:
    """A comment stands above each key, or above the block that it begins."""
    for block in profile.read_text().split("\n\n"):
        assert block.startswith("#"), block


def test_command_line_has_precedence() -> None:
    assert parse(FOLDER / "cpu.yaml", "--dtype", "bfloat16").dtype == "bfloat16"


@pytest.mark.slow
def test_cpu_profile_serves(checkpoint: Path, tmp_path: Path) -> None:
    with serve_tiny(checkpoint, tmp_path, "--config", str(FOLDER / "cpu.yaml")) as server:
        (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert model["max_model_len"] == 1024  # the tiny model's own
        body = {"model": "tiny", "prompt": "A cache", "max_tokens": 4, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
        assert reply["usage"]["completion_tokens"] == 4
