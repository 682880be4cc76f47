"""Head and embedding: in 8 and in 4 bits, and left as they are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny
from typer.testing import CliRunner

from calibration.cli import app
from calibration.inspect_command import describe
from calibration.pipeline import quantize
from calibration.report import Report
from calibration.settings import Settings
from calibration.simulate import load_simulated
from vllm_offq.checkpoint import Checkpoint, validate_checkpoint
from vllm_offq.errors import UserError
from vllm_offq.format import unpack_int8

QUICK = {"samples": 4, "sequence_length": 64}


def test_the_head_takes_eight_bits_and_loses_next_to_nothing(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), head_bits="16", **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    checkpoint, unquantized = Checkpoint(quantized[0]), Checkpoint(tmp_path / "out")
    weight = unquantized.load("lm_head.weight").float()
    packed = checkpoint.load("lm_head.weight_packed")
    assert packed.nbytes == weight.numel()
    scale = checkpoint.load("lm_head.weight_scale").float()
    error = (unpack_int8(packed) * scale - weight).abs()
    assert (error <= scale / 2 + weight.abs() * 2.0**-8).all()  # which is bfloat16's rounding
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    expected, found = (
        load_simulated(folder)[0](tokens).logits for folder in (tmp_path / "out", quantized[0])
    )
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.02


def test_embedding_of_eight_bits(
    quantized: tuple[Path, Report], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), embedding_bits="8", **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    validate_checkpoint(tmp_path / "out")
    small, large = (Checkpoint(folder) for folder in (tmp_path / "out", quantized[0]))
    name = "model.embed_tokens"
    wanted = large.load(f"{name}.weight").float()
    scale = small.load(f"{name}.weight_scale").float()
    found = load_simulated(tmp_path / "out")[0].get_submodule(name).weight
    # Half a step of the grid, and what storing the other in bfloat16 has rounded off.
    assert ((found - wanted).abs() <= 0.501 * scale + 2.0**-8 * wanted.abs()).all()
    assert small.load(f"{name}.weight_packed").dtype == torch.int8
    rest = [other for other in large.names if not other.startswith(name)]
    assert all(torch.equal(small.load(other), large.load(other)) for other in rest)


def test_both_ends_in_four_bits(original: Path, text: Path, tmp_path: Path) -> None:
    settings = Settings(calibration=(str(text),), head_bits="16", **QUICK)
    quantize(str(original), tmp_path / "large", settings)
    small = replace(settings, head_bits="4", embedding_bits="4")
    quantize(str(original), tmp_path / "gptq", small)
    quantize(str(original), tmp_path / "nearest", replace(small, weights="rtn"))
    large, tokenizer = load_simulated(tmp_path / "large")
    tokens = torch.tensor([tokenizer(text.read_text())["input_ids"][:256]])
    hidden = large.get_decoder()(tokens)[0]
    wanted = large.lm_head(hidden)
    errors = []
    for name in ("gptq", "nearest"):
        validate_checkpoint(tmp_path / name)
        found, _ = load_simulated(tmp_path / name)
        checkpoint = Checkpoint(tmp_path / name)
        for end in ("model.embed_tokens", "lm_head"):
            expected = large.get_submodule(end).weight
            assert checkpoint.load(f"{end}.weight_packed").nbytes * 2 == expected.numel()
            off = (found.get_submodule(end).weight - expected).norm() / expected.norm()
            assert 0.02 < off < 0.15
        errors.append((found.lm_head(hidden) - wanted).norm() / wanted.norm())
    assert errors[0] < errors[1] < 0.15


@pytest.mark.parametrize("bits", ["4", "8"])
def test_what_is_said_of_both_ends_has_their_bits(
    bits: Any, original: Path, text: Path, tmp_path: Path
) -> None:
    settings = Settings(calibration=(str(text),), head_bits=bits, embedding_bits=bits, **QUICK)
    quantize(str(original), tmp_path / "out", settings)
    found = describe(Checkpoint(tmp_path / "out"))["tensors"]
    for end in ("embedding", "head"):
        assert found[f"{end}, {bits} bit"]["parameters"] == 512 * 256
    printed = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    assert f"{bits} bits, input of 8 in groups of 128" in printed
    article = "an" if bits == "8" else "a"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f", {article} {bits}-bit embedding, {article} {bits}-bit head and" in card


def test_an_embedding_that_vllm_keeps_is_refused(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "model", "Gemma2")
    with pytest.raises(UserError, match="--embedding-bits 8 is not supported for Gemma2"):
        quantize(str(source), tmp_path / "out", Settings(embedding_bits="8", **QUICK))
