"""The manifests, by Kubernetes' own schemas and by vLLM's parser of options.

A LeaderWorkerSet's schema comes with its controller; its two templates are those of pods.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from test_readme import check_vllm

from serving.server import serve

FOLDER = Path(__file__).parents[2] / "serving" / "kubernetes"
OLDEST = "1.32"
"""The first Kubernetes in which a preStop hook may sleep without a feature gate."""
ENDING = 30
"""Seconds that vLLM's processes may take to end once the last request is answered."""


def pods(template: dict[str, Any], name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name}}


def objects() -> Iterator[Any]:
    for file in sorted(FOLDER.glob("*.yaml")):
        for found in yaml.safe_load_all(file.read_text()):
            name = found["metadata"]["name"]
            if found["kind"] == "LeaderWorkerSet":
                group = found["spec"]["leaderWorkerTemplate"]
                yield pytest.param(pods(group["leaderTemplate"], name), id=f"{name} leader")
                yield pytest.param(pods(group["workerTemplate"], name), id=f"{name} worker")
            else:
                yield pytest.param(found, id=f"{name} {found['kind']}")
                if found["kind"] == "Deployment":
                    yield pytest.param(pods(found["spec"]["template"], name), id=f"{name} pod")


OBJECTS = list(objects())
PODS = [parameter for parameter in OBJECTS if parameter.values[0]["kind"] == "Pod"]


@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "newest"])
@pytest.mark.parametrize("found", OBJECTS)
def test_schema(found: dict[str, Any], version: str | None) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    validator.validate(found, version or validator.latest_version(), strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_vllm_takes_the_options(pod: dict[str, Any]) -> None:
    variables = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "a"}
    (container,) = pod["spec"]["containers"]
    arguments = container["args"]
    for name, value in variables.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    assert not any("$" in argument for argument in arguments)
    check_vllm("serve", "/model", *arguments)


@pytest.mark.parametrize("pod", PODS)
def test_no_more_rights_than_needed(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["shareProcessNamespace"] is True
    assert spec["securityContext"]["runAsNonRoot"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("pod", PODS)
def test_kubernetes_waits_longer_than_vllm(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    options = dict(argument.partition("=")[::2] for argument in container["args"])
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    stopping = sleep + int(options["--shutdown-timeout"])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= stopping + ENDING


def test_nodes_of_a_group_are_one_model() -> None:
    """Leader and worker differ by --headless alone, and every node has as many GPUs as it uses."""
    (workers,) = (
        found
        for found in yaml.safe_load_all((FOLDER / "gpu-multi-node.yaml").read_text())
        if found["kind"] == "LeaderWorkerSet"
    )
    group = workers["spec"]["leaderWorkerTemplate"]
    (leader,) = group["leaderTemplate"]["spec"]["containers"]
    (worker,) = group["workerTemplate"]["spec"]["containers"]
    assert worker["args"] == [*leader["args"], "--headless"]
    options = dict(argument.partition("=")[::2] for argument in leader["args"])
    gpus = int(options["--tensor-parallel-size"]) * int(options["--pipeline-parallel-size"])
    of_a_node = {int(c["resources"]["limits"]["nvidia.com/gpu"]) for c in (leader, worker)}
    assert of_a_node == {gpus // group["size"]}


def test_services_find_their_pods() -> None:
    values = [parameter.values[0] for parameter in OBJECTS]
    labels = [
        found["spec"]["template"]["metadata"]["labels"]
        for found in values
        if found["kind"] == "Deployment"
    ]
    services = {found["metadata"]["name"]: found for found in values if found["kind"] == "Service"}
    assert services["offq-cpu"]["spec"]["selector"] in labels
    # The controller sets the first on every pod of the group; the second is in the template.
    assert services["offq-gpu"]["spec"]["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": "offq-gpu",
        "role": "leader",
    }


@pytest.mark.slow
def test_nodes_serve_one_model_by_these_options(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two on this machine's CPU, and without pipelines, which vLLM 0.32 has for GPUs alone."""
    manifest = (FOLDER / "gpu-multi-node.yaml").read_text()
    group = next(yaml.safe_load_all(manifest))["spec"]["leaderWorkerTemplate"]
    (worker,) = group["workerTemplate"]["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {
        "--tensor-parallel-size=8": "--tensor-parallel-size=2",
        "--pipeline-parallel-size=2": "--pipeline-parallel-size=1",
        "--nnodes=$(LWS_GROUP_SIZE)": "--nnodes=2",
        "--master-addr=$(LWS_LEADER_ADDRESS)": "--master-addr=127.0.0.1",
    }
    assert here.keys() <= set(worker["args"])
    common = [here.get(argument, argument) for argument in worker["args"]]
    common += ["--dtype=float32", "--enforce-eager", "--max-model-len=512"]
    common += [f"--master-port={port}"]
    leader, second = (
        [argument.replace("$(LWS_WORKER_INDEX)", index) for argument in common] for index in "01"
    )
    leader.remove("--headless")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the two would take the same core
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [Path(sys.executable).with_name("vllm"), "serve", tiny_checkpoint, *second]
    with (tmp_path / "second.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log
        )
    try:
        first_log = tmp_path / "first.log"
        with serve(tiny_checkpoint, first_log, *leader, environment=environment) as server:
            request = {"model": "model", "prompt": "The quick brown fox", "max_tokens": 8}
            request["ignore_eos"] = True
            answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=120)
            assert answer.json()["usage"]["completion_tokens"] == 8
    finally:
        process.terminate()
        process.wait(60)
