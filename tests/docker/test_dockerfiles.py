"""What can be said of the Dockerfiles without building them; test_image.py runs what they make."""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_readme import check_vllm

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]
by_name = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def instructions(dockerfile: Path, name: str) -> list[str]:
    """What follows an instruction's name, with its continued lines."""
    text = re.sub(r"^ *#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    text = text.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed")
@by_name
def test_lint(dockerfile: Path) -> None:
    command = [hadolint() or "", dockerfile]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@by_name
def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for arguments in instructions(dockerfile, "COPY"):
        *sources, _ = arguments.split()
        for source in sources:
            if arguments.startswith("--from="):
                continue
            assert (ROOT / source).exists()
            assert any(fnmatch(source, pattern) for pattern in kept), f"{source} is ignored"


@by_name
def test_vllm_takes_the_command(dockerfile: Path) -> None:
    (entrypoint,) = instructions(dockerfile, "ENTRYPOINT")
    program, *arguments = json.loads(entrypoint)  # a list: the form without a shell
    assert program == "vllm"
    check_vllm(*arguments)


@by_name
def test_user_is_a_number_other_than_roots(dockerfile: Path) -> None:
    (user,) = instructions(dockerfile, "USER")
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


def test_base_image_is_the_vllm_that_is_tested() -> None:
    setup = (ROOT / "scripts" / "setup_env.py").read_text()
    version = re.search(r'^VLLM = "(.+)"$', setup, re.MULTILINE)
    assert version
    assert f"BASE=vllm/vllm-openai:v{version[1]}" in instructions(DOCKERFILES[0], "ARG")
