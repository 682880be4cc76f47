"""docker/compose.yaml: by its schema, and by what it refers to."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_readme import check_vllm

COMPOSE = Path(__file__).parents[2] / "docker" / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]

ENDING = 30
"""Seconds that vLLM's processes may take to end once the last request is answered."""


def defaults(text: str) -> str:
    """With ${NAME:-default} replaced by the default."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def test_schema() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, COMPOSE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_vllm_takes_the_options() -> None:
    check_vllm("serve", "/model", *map(defaults, SERVICES["server"]["command"]))


def test_docker_waits_longer_than_vllm() -> None:
    (timeout,) = (
        option.partition("=")[2]
        for option in SERVICES["server"]["command"]
        if option.startswith("--shutdown-timeout=")
    )
    assert int(SERVICES["server"]["stop_grace_period"].removesuffix("s")) >= int(timeout) + ENDING


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_files_exist(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (COMPOSE.parent / source).is_file()


@pytest.mark.parametrize("name", SERVICES)
def test_no_more_rights_than_needed(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
