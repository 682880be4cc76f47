"""Dashboard and alerts ask for metrics that vLLM exports; Prometheus and Grafana can read them."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serving.server import Server, serve

FOLDER = Path(__file__).parents[2] / "serving" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
ALERTS = [
    pytest.param(rule["expr"], id=rule["alert"])
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
VARIABLES = {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}
"""What Grafana puts in."""

PATIENCE = 90
"""Seconds until all panels must have values."""
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (of Prometheus) is not installed"
)


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def metrics(expression: str) -> set[str]:
    """Those that an expression reads; each is followed by labels or is vLLM's own."""
    return set(re.findall(r"vllm:\w+|\w+(?=\{)", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS + ALERTS)
def test_metrics_exist(expression: str, exported: set[str]) -> None:
    assert metrics(expression)
    assert metrics(expression) <= exported


def test_metrics_of_variables_exist(exported: set[str]) -> None:
    queries = [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    read = set().union(*(metrics(query["query"]) for query in queries if isinstance(query, dict)))
    assert read
    assert read <= exported


def test_dashboard_is_grafanas() -> None:
    """Grafana's own types lose nothing of it: a key that they do not know would be lost."""
    pytest.importorskip(
        "grafana_foundation_sdk", reason="Grafana's SDK (grafana-foundation-sdk) is not installed"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert list(lost(DASHBOARD, read)) == []


def lost(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, other than by what was empty or is a default."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            if key in read:
                yield from lost(value, read[key], f"{path}/{key}")
            elif value not in (None, [], {}):
                yield f"{path}/{key}"
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from lost(one, other, f"{path}/{index}")
    elif written != read:
        yield path


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", FOLDER / "prometheus.yml"],
        ["test", "rules", Path(__file__).with_name("alerts_test.yml")],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool(arguments: list[str | Path]) -> None:
    done = subprocess.run(["promtool", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_parses_the_dashboards_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": filled_in(str(parameter.values[0]))}
        for number, parameter in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", file], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    folder = tmp_path_factory.mktemp("server")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(folder / "cache")}
    log = folder / "server.log"
    with serve(tiny_checkpoint, log, *options, environment=environment) as running:
        yield running


@contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with this project's configuration, but for the server's address and the pace."""
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(FOLDER / name) for name in configuration["rule_files"]]
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=(folder / "prometheus.log").open("w"),
    )
    try:
        transport = httpx.HTTPTransport(retries=5)  # it takes a moment until it listens
        with httpx.Client(base_url=f"http://{address}/api/v1", transport=transport) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def samples(client: httpx.Client, expression: str) -> list[Any]:
    answer = client.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_dashboard_shows_what_a_server_did(server: Server, tmp_path: Path) -> None:
    """Every panel has values, and the rules evaluate, with a real vLLM and a real Prometheus."""
    with prometheus(server, tmp_path) as client:
        request = {"model": "tiny", "prompt": "The quick brown fox. " * 40, "max_tokens": 8}
        empty, deadline = list(EXPRESSIONS), time.monotonic() + PATIENCE
        while empty and time.monotonic() < deadline:  # a rate needs values of several moments
            # All but the first find the prompt in the cache.
            httpx.post(f"{server.url}/v1/completions", json=request).raise_for_status()
            time.sleep(2)
            empty = [
                parameter
                for parameter in EXPRESSIONS
                if not samples(client, filled_in(str(parameter.values[0])))
            ]
        assert [parameter.id for parameter in empty] == []
        assert samples(client, 'up{job="vllm"}')[0]["value"][1] == "1"
        (hits,) = samples(client, "vllm:prefix_cache_hits_total")
        assert float(hits["value"][1]) > 0
        (group,) = client.get("/rules").json()["data"]["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
