"""The image of docker/Dockerfile.cpu, run as docs/operate.md says: not root, nothing writable.

Build it, and name it in OFFQ_TEST_IMAGE. OFFQ_TEST_ENGINE is the command of the engine where it is
neither `docker` nor `podman`, or needs options; OFFQ_TEST_RUN has further options of its `run`.
The containers have no network: requests are made inside them.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

IMAGE = os.environ.get("OFFQ_TEST_IMAGE", "")
ENGINE = shlex.split(
    os.environ.get("OFFQ_TEST_ENGINE")
    or next((name for name in ("docker", "podman") if shutil.which(name)), "")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="OFFQ_TEST_IMAGE does not name an image to test"),
    pytest.mark.skipif(not ENGINE, reason="neither docker nor podman is installed"),
]

HARDENED = ["--init", "--read-only", "--tmpfs", "/tmp", "--shm-size", "512m", "--network", "none"]
HARDENED += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
START_TIMEOUT = 600
REQUEST = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


def engine(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*ENGINE, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def inspect(name: str) -> Any:
    return json.loads(engine("inspect", name).stdout)[0]


class Container:
    def __init__(self, model: Path) -> None:
        options = shlex.split(os.environ.get("OFFQ_TEST_RUN", ""))
        options += [*HARDENED, "--volume", f"{model}:/model:ro"]
        serving = ["--served-model-name", "model", "--dtype", "float32", "--max-model-len", "512"]
        started = engine("run", "--detach", *options, IMAGE, *serving)
        self.name = started.stdout.strip().splitlines()[-1]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return engine("exec", self.name, *command, check=check)

    def log(self) -> str:
        done = engine("logs", self.name)
        return done.stdout + done.stderr

    def wait_until_healthy(self, healthcheck: Sequence[str]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self.run(*healthcheck, check=False).returncode:
            assert inspect(self.name)["State"]["Running"], self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(2)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"http://127.0.0.1:8000{path}"
        return json.loads(self.run("python3", "-c", REQUEST, url, json.dumps(body)).stdout)

    def stop(self) -> tuple[int, float]:
        """By SIGTERM. Returns: the exit code, and the seconds that it took."""
        began = time.monotonic()
        engine("stop", "-t", "60", self.name)
        return inspect(self.name)["State"]["ExitCode"], time.monotonic() - began

    def remove(self) -> None:
        engine("rm", "--force", self.name, check=False)


@pytest.fixture(scope="module")
def healthcheck() -> list[str]:
    """The image's own."""
    image = inspect(IMAGE)
    test = (image["Config"].get("Healthcheck") or image["Healthcheck"])["Test"]
    assert test[0] == "CMD"
    return list(test[1:])


@pytest.fixture(scope="module")
def container(tiny_checkpoint: Path, healthcheck: list[str]) -> Iterator[Container]:
    container = Container(tiny_checkpoint)
    try:
        container.wait_until_healthy(healthcheck)
        yield container
    finally:
        container.remove()


def test_answers(container: Container) -> None:
    body = {"model": "model", "prompt": "The quick brown fox", "max_tokens": 8, "ignore_eos": True}
    answer = container.post("/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 8


def test_answers_in_a_structure(container: Container) -> None:
    """By xgrammar, whose requirement Triton is not in the image."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": "The lazy dog"}],
        "structured_outputs": {"choice": ["fox", "dog"]},
    }
    answer = container.post("/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] in {"fox", "dog"}


def test_compiled_kernels_serve(container: Container) -> None:
    assert re.search(r"OffQ uses the cpu kernels", container.log())


def test_is_not_root_and_writes_to_tmp_alone(container: Container) -> None:
    assert container.run("id", "-u").stdout.strip() == "10001"
    assert container.run("touch", "/tmp/file").returncode == 0
    for folder in ("/", "/opt/vllm_offq", "/model", "/home"):
        assert container.run("touch", f"{folder}/file", check=False).returncode, folder


def test_has_no_compiler(container: Container) -> None:
    for program in ("cc", "gcc", "g++"):
        assert container.run("sh", "-c", f"command -v {program}", check=False).returncode


def test_sigterm_ends_it(container: Container) -> None:
    """The last test of this container."""
    code, seconds = container.stop()
    assert code == 0, container.log()
    assert seconds < 30


def test_sigterm_ends_it_while_it_starts(tiny_checkpoint: Path) -> None:
    container = Container(tiny_checkpoint)
    try:
        time.sleep(3)
        _, seconds = container.stop()
        assert seconds < 30
    finally:
        container.remove()
