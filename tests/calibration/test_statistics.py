"""What calibration sees of a model: outliers planted in it are found and become offsets."""

from pathlib import Path

import torch
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM

from calibration.architectures import find_architecture
from calibration.basis import residual_candidates
from calibration.fuse import fuse_block, fuse_embedding
from calibration.instrument import OffQLinear, block_inputs, instrument
from calibration.loader import load_original
from calibration.rotations import principal_rotations
from calibration.statistics import collect
from vllm_offq.rotation import principal_basis

LLAMA = find_architecture(["LlamaForCausalLM"])


def test_planted_outlier_is_found_and_becomes_a_constant(tmp_path: Path) -> None:
    """A direction added to every token's embedding dominates the residual stream."""
    folder = make_tiny_llama(tmp_path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(256, generator=generator), dim=0)
    model.model.embed_tokens.weight += 100 * direction
    for layer in model.model.layers:  # so that the norm's input is the direction itself
        layer.input_layernorm.weight.fill_(1.0)
        layer.post_attention_layernorm.weight.fill_(1.0)
    model.save_pretrained(folder)
    original = load_original(str(folder))
    instrument(original.model, LLAMA)
    tokens = torch.randint(0, 512, (4, 32), generator=generator)
    statistics = collect(original, tokens, batch_size=4, advance=lambda: None)

    basis = principal_basis(statistics.top_tokens, statistics.residual)
    assert (basis[:, 0] @ direction.double()).abs() > 0.99

    rotations = principal_rotations(statistics, 64, 64, 64)
    rotations.residual = residual_candidates(statistics, 64)["top-1"]
    seen: list[torch.Tensor] = []
    with original.loaded(LLAMA.embedding, LLAMA.final_norm) as (embedding, _):
        fuse_embedding(embedding, rotations)
        inputs = block_inputs(original.model, LLAMA, tokens, batch_size=4)
    with original.block(0) as layer, torch.no_grad():
        fuse_block(layer, 0, original.model.config, LLAMA, rotations)
        linear: OffQLinear = layer.get_submodule(LLAMA.query)
        linear.observe = seen.append
        inputs.advance(0, layer)
    groups = seen[0].flatten(0, 1).unflatten(-1, (-1, 64))
    with_outlier = groups[:, 0]  # rank 0 goes to group 0, slot 0: a constant on its 64 channels
    spread = with_outlier.std(-1).mean()
    assert with_outlier.mean(-1).abs().mean() > 10 * spread


def test_top_tokens_are_the_largest_of_each_sequence_and_layer_input(tmp_path: Path) -> None:
    original = load_original(str(make_tiny_llama(tmp_path)))
    instrument(original.model, LLAMA)
    tokens = torch.randint(0, 512, (6, 16), generator=torch.Generator().manual_seed(0))
    whole = collect(original, tokens, batch_size=6, advance=lambda: None)
    assert whole.top_tokens.shape == (2 * 2 * 6, 256)
    with original.loaded(LLAMA.embedding) as (embedding,):
        first_input = embedding(tokens)
    normed = first_input / first_input.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    expected = normed.abs().amax((1, 2))
    torch.testing.assert_close(whole.top_tokens[:6].abs().amax(-1), expected)
    # However the sequences are batched, the statistics are the same.
    split = collect(original, tokens, batch_size=2, advance=lambda: None)
    for name in ("residual", "keys", "values", "down_energy"):
        found, expected = getattr(split, name), getattr(whole, name)
        assert (found - expected).norm() < 1e-5 * expected.norm()  # sums of float32 products
