"""docs/operate.md: its files, variables, metrics and options exist, its commands are those tested.

Not whether they work: test_image.py and test_monitoring.py run what can be run here.
"""

import re
import shlex
from itertools import dropwhile
from pathlib import Path

import pytest
import yaml
from test_image import HARDENED
from test_readme import check_vllm

from serving import soak

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operate.md").read_text()
OF_THE_TESTS = ["--network", "none"]
"""Of test_image.py, which reaches its servers without."""


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    # Variables may be set for one command.
    return [
        list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(line)))
        for line in lines
    ]


def check_docker(name: str, *arguments: str) -> None:
    if name == "build":
        file, context = arguments[arguments.index("-f") + 1], arguments[-1]
        assert (ROOT / file).is_file()
        assert context == "."
    elif name == "run":
        (image,) = (word for word in arguments if word.startswith("vllm-offq:"))
        split = arguments.index(image)
        check_vllm("serve", "/model", *arguments[split + 1 :])
        if image == "vllm-offq:cpu":
            tested = " ".join(HARDENED).replace(" ".join(OF_THE_TESTS), "").split()
            assert set(tested) <= set(arguments[:split])
    elif name == "compose":
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
    else:
        assert name == "stop"


def check_curl(url: str) -> None:
    assert url in {"http://localhost:8000/health", "http://localhost:8000/metrics"}


def check_kubectl(verb: str, *arguments: str) -> None:
    deployment = next(
        yaml.safe_load_all((ROOT / "serving" / "kubernetes" / "cpu.yaml").read_text())
    )
    name = deployment["metadata"]["name"]
    if verb == "apply":
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
    else:
        assert f"deployment/{name}" in arguments
    if verb == "set":
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert arguments[-1].startswith(f"{container['name']}=")


def check_python(option: str, module: str, *arguments: str) -> None:
    assert option == "-m"
    if module == "serving.soak":
        soak.parser().parse_args(arguments)
    else:
        assert module == "pytest"
        assert all((ROOT / file).exists() for file in arguments)


CHECKS = {
    "curl": check_curl,
    "docker": check_docker,
    "kubectl": check_kubectl,
    "python": check_python,
}


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[:2]))
def test_command(command: list[str]) -> None:
    CHECKS[command[0]](*command[1:])


def test_variables_exist() -> None:
    envs = pytest.importorskip("vllm.envs", reason="vLLM is not installed")
    sources = "".join(file.read_text() for file in (ROOT / "vllm_offq").rglob("*.py"))
    for name in set(re.findall(r"\bVLLM_[A-Z_]+\b", PAGE)):
        known = envs.environment_variables
        assert name in known or (name.startswith("VLLM_OFFQ_") and name in sources), name


def test_variables_of_compose_are_all_named() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) <= set(re.findall(r"`(\w+)`", PAGE))


def test_values_in_the_image_are_those_named() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile.cpu").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE)
    assert rows
    for name, value in rows:
        assert re.search(rf"\b{name}={value}\b", dockerfile), name


def test_metrics_exist(exported: set[str]) -> None:
    named = set(re.findall(r"`((?:vllm:|offq:|http_)\w+)`", PAGE))
    assert named
    histograms = {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")}
    assert named <= exported | histograms
