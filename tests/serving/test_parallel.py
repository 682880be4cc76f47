"""Several processes that share a model, or a server's requests, answer as one process does.

Ranks that share a model add up its sums in another order than one process. As test_served.py says,
that may move a value at the boundary between two codes; in two layers it is rare.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import make_tiny_llama
from vllm_server import serve_tiny

from calibration.pipeline import quantize
from calibration.settings import Settings
from serving.server import Server

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("serve_in_parallel.py")
PROMPTS = [[(31 * i + 13 * j) % 400 + 2 for j in range(8 + 12 * i)] for i in range(6)]
MODELS: dict[str, tuple[int, dict[str, int]]] = {
    "tiny": (2, {"intermediate": 512}),
    "SmolLM2-135M's widths": (
        3,
        {
            "hidden": 576,
            "intermediate": 1536,
            "num_heads": 9,
            "num_kv_heads": 3,
            "vocab": 576,  # vLLM divides it, too
        },
    ),
}
"""By name: how many ranks share it, and what it is made of."""

KERNELS = {"cpu": {}, "triton": {"VLLM_OFFQ_KERNELS": "triton", "TRITON_INTERPRET": "1"}}
"""By name: the environment that chooses them."""

SHARED = [*(("cpu", name) for name in MODELS), ("triton", "tiny")]
"""Kernels, and a model that processes share which run them."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (_, sizes) in MODELS.items():
        folder = tmp_path_factory.mktemp("parallel")
        make_tiny_llama(folder / "model", tied=False, **sizes)
        settings = Settings(samples=4, sequence_length=64, dtype="float32")
        quantize(str(folder / "model"), folder / "offq", settings)
        found[name] = folder / "offq"
    return found


@pytest.fixture(scope="module")
def found(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kernels."""
    folder = tmp_path_factory.mktemp("found")
    prompts, out = folder / "prompts.json", folder / "found.json"
    found = {}
    for kernels, choice in KERNELS.items():
        # Interpreted, they take long.
        prompts.write_text(json.dumps(PROMPTS[:2] if kernels == "triton" else PROMPTS))
        names = [name for other, name in SHARED if other == kernels]
        jobs = [f"{checkpoints[name]}={MODELS[name][0]}" for name in names]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])} | choice
        subprocess.run([sys.executable, SCRIPT, prompts, out, *jobs], check=True, env=environment)
        found[kernels] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("kernels", "name"), SHARED)
def test_ranks_that_share_every_layer_answer_as_one_process(
    kernels: str, name: str, checkpoints: dict[str, Path], found: Any
) -> None:
    one, several = found[kernels]["tokens"][str(checkpoints[name])]
    assert several == one


@pytest.mark.parametrize("kernels", KERNELS)
def test_stages_of_a_pipeline_load_their_own_layers_alone(kernels: str, found: Any) -> None:
    first, second = (set(names) for names in found[kernels]["stages"])
    assert not first & second
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0"}
    assert {name.split(".")[2] for name in second if ".layers." in name} == {"1"}
    assert {name for name in first if ".layers." not in name} == {"model.embed_tokens.weight"}
    assert any(name.startswith("lm_head.") for name in second)
    # A layer of either stage is quantized: its weight is codes with their scales and sums.
    down_projections = [
        {name for name in names if "down_proj" in name} for names in (first, second)
    ]
    assert [len(names) for names in down_projections] == [3, 3]


def requests_of_each_engine(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    found: dict[str, float] = {}
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            if sample.name == "vllm:request_success_total":
                engine = sample.labels["engine"]
                found[engine] = found.get(engine, 0) + sample.value
    return found


def test_engines_behind_one_endpoint_answer_as_one_process(
    checkpoints: dict[str, Path], found: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints["tiny"]
    expected, _ = found["cpu"]["tokens"][str(checkpoint)]

    options = ["--data-parallel-size", "2", "--dtype", "float32", "--enforce-eager"]
    with serve_tiny(checkpoint, tmp_path, *options, "--max-model-len", "256") as server:

        def ask(prompt: list[int]) -> list[int]:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
            tokens: list[int] = reply.json()["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(ask, PROMPTS * 2))
        served = requests_of_each_engine(server)
    assert answers == expected * 2
    assert served.keys() == {"0", "1"}
    assert all(count > 0 for count in served.values())
