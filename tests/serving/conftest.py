"""One vLLM server per configuration, shared by all tests of a session."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama
from vllm_server import serve_tiny

from calibration.pipeline import quantize
from calibration.settings import Settings
from serving.server import Server


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny unquantized Llama, head size 64, float32."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tied=False)


@pytest.fixture(scope="session")
def checkpoint(original: Path) -> Path:
    """The same, quantized, so that none of the tests' prompts meets a boundary between codes."""
    out = original.parent / "tiny-offq"
    settings = Settings(samples=4, sequence_length=64, dtype="float32", basis="top-1", refits=0)
    quantize(str(original), out, settings)
    return out


@pytest.fixture(scope="session")
def no_model(checkpoint: Path) -> Path:
    """What the checkpoint's download would leave without a network: vLLM cannot serve it."""
    folder = checkpoint.parent / "tiny-offq-without-weights"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    return folder


@pytest.fixture(scope="session")
def float32_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Eager, with chunks of 64 tokens, so that longer prompts need several."""
    options = ["--quantization", "offq", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--block-size", "32"]
    with serve_tiny(checkpoint, tmp_path_factory.mktemp("float32"), *options) as server:
        yield server


@pytest.fixture(scope="session")
def triton_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The kernels, backend and metadata of a GPU, interpreted."""
    pytest.importorskip("triton")
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "64"]
    options += ["--max-num-seqs", "4", "--max-model-len", "256"]
    environment = {"VLLM_OFFQ_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # so that weights can be reloaded
    folder = tmp_path_factory.mktemp("triton")
    with serve_tiny(checkpoint, folder, *options, environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def bfloat16_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Compiled, and without any option about quantization."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine, and torch.compile needs it")
    folder = tmp_path_factory.mktemp("bfloat16")
    with serve_tiny(checkpoint, folder, "--dtype", "bfloat16") as server:
        yield server
