"""The token embedding as codes: which layers get it, and what they look up."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from test_plugin import bare, offq_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_offq.embedding import OffQEmbeddingMethod
from vllm_offq.errors import UserError
from vllm_offq.format import EmbeddingConfig, pack_int4
from vllm_offq.linear import OffQ8BitHeadMethod
from vllm_offq.quantizer import dequantize

EIGHT, FOUR = EmbeddingConfig(bits=8), EmbeddingConfig(bits=4, group_size=16)


def embedding_layer(
    config: EmbeddingConfig = EIGHT, ranks: int = 1, rank: int = 0
) -> VocabParallelEmbedding:
    """Of 150 tokens, as rank `rank` of `ranks` has it."""
    group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
    return VocabParallelEmbedding(
        150,
        32,
        params_dtype=torch.float32,
        quant_method=OffQEmbeddingMethod(config),
        parallel_group=group,
    )


def test_the_embedding_is_quantized_where_the_checkpoint_says_so() -> None:
    embedding, name = bare(VocabParallelEmbedding), "model.embed_tokens"
    assert offq_config().get_quant_method(embedding, name) is None
    config = offq_config(embedding={"bits": 8})
    assert isinstance(config.get_quant_method(embedding, name), OffQEmbeddingMethod)
    assert isinstance(config.get_quant_method(bare(ParallelLMHead), "lm_head"), OffQ8BitHeadMethod)
    config = offq_config(embedding={"bits": 8}, head=None, ignore=["lm_head"])
    assert config.get_quant_method(bare(ParallelLMHead), "lm_head") is None


@pytest.mark.parametrize("config", [EIGHT, FOUR])
def test_each_rank_looks_up_its_rows_of_the_embedding(config: EmbeddingConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    largest = 1 << config.bits - 1
    codes = torch.randint(-largest, largest, (150, 32), dtype=torch.int8, generator=generator)
    scale = torch.rand(150, 1 if config is EIGHT else 2, generator=generator).half()
    seen = []
    for rank in range(3):
        layer = embedding_layer(config, 3, rank)
        layer.weight_loader(layer.weight_packed, codes if config is EIGHT else pack_int4(codes))
        layer.weight_loader(layer.weight_scale, scale)
        layer.quant_method.process_weights_after_loading(layer)
        start, end = (
            layer.shard_indices.org_vocab_start_index,
            layer.shard_indices.org_vocab_end_index,
        )
        found = layer.quant_method.embedding(layer, torch.arange(end - start))
        assert torch.equal(found, dequantize(codes, scale)[start:end])
        seen += range(start, end)
    assert seen == list(range(150))


def test_an_embedding_without_its_scales_is_refused() -> None:
    layer = embedding_layer()
    with pytest.raises(UserError, match="the embedding's weight_scale is missing"):
        layer.quant_method.process_weights_after_loading(layer)
