"""What a run needs of disk and memory, known before it begins."""

import math

import torch

from calibration.data_sources import SELF, shares
from calibration.devices import CPU
from calibration.instrument import layers_of
from calibration.learning import PIECE
from calibration.loader import Original
from calibration.memory import refuse_small_memory
from calibration.refine import BATCH_TOKENS
from calibration.settings import Settings
from vllm_offq.format import CheckpointConfig
from vllm_offq.manifest import expected_tensors

GPTQ_BYTES = 24
"""Of a linear, times its input width squared: three matrices in double precision at once."""
BLOCK_ACTIVATIONS = 20
"""Floats of a token in a step of `--refine`, times width and MLP's width; SmolLM2 takes more."""
LOGITS = 4
"""Of a piece in such a step: of both models, and their gradients."""


def expected_bytes(
    original: Original, config: CheckpointConfig, dtype: torch.dtype, settings: Settings
) -> int:
    """On disk at most, dtype being that of what stays unquantized.

    That is the checkpoint's tensors twice, as parts and as shards of several parts; before there
    are shards, `kept_bytes` in the place of one.
    """
    model_config = original.model.config.to_dict() | {
        "architectures": [original.architecture.name],
        "tie_word_embeddings": original.architecture.layout.head_is_embedding,
    }
    tensors = sum(
        math.prod(spec.shape) * (dtype if dtype in spec.dtypes else spec.dtypes[0]).itemsize
        for spec in expected_tensors(model_config, config).values()
    )
    checkpoint = tensors + original.rest_bytes
    kept = kept_bytes(original, settings)
    return checkpoint + max(checkpoint + kept // 2, kept)


def kept_bytes(original: Original, settings: Settings) -> int:
    """What a run keeps on disk to be resumed: activations after a block while those before it stay.

    Also those of the quantized model, where errors count on them.
    """
    tokens = settings.samples * settings.sequence_length
    activations = tokens * original.model.config.hidden_size * torch.float32.itemsize
    return 2 * activations * (1 if settings.gptq_inputs == "original" else 2)


def refuse_small_machine(original: Original, settings: Settings, continues: bool) -> None:
    """Raises: UserError if the CPU has too little memory free for any part of the run.

    continues: an earlier run has written the calibration text.
    """
    if original.device != CPU:
        return
    writes = SELF in shares(settings.calibration, settings.samples) and not continues
    if writes:
        refuse_small_memory(
            4 * _parameters(original),
            "a model that writes its own calibration text",
            "give --calibration FILE: then a block at a time is enough",
        )
    refuse_small_memory(
        block_bytes(original, settings),
        f"a block of {original.name} with {settings.samples} samples of "
        f"{settings.sequence_length} tokens",
        "give fewer --samples, or free some",
    )
    if settings.refine:
        refuse_small_memory(refine_bytes(original, settings), "--refine", "leave it out")


def block_bytes(original: Original, settings: Settings) -> int:
    """The least that quantizing block by block takes: activations, and the largest of the rest.

    That is the embedding, or a block with the second moments of all its inputs and what GPTQ makes
    of the widest one's, see calibration.gptq.factor.
    """
    architecture = original.architecture
    (layer, *_) = layers_of(original.model, architecture)
    embedding = original.model.get_submodule(architecture.embedding).get_parameter("weight")
    weights = sum(parameter.numel() for parameter in layer.parameters())
    widths = [
        layer.get_submodule(paths[0]).get_parameter("weight").shape[1]
        for site in architecture.sites
        for paths in site.groups
    ]
    moments = 0
    if settings.rounding == "gptq":
        moments = 4 * sum(width**2 for width in widths) + GPTQ_BYTES * max(widths) ** 2
    return kept_bytes(original, settings) // 2 + max(4 * embedding.numel(), 4 * weights + moments)


def refine_bytes(original: Original, settings: Settings) -> int:
    """The least that `--refine` takes.

    Both models are there, of the quantized one the linears as bytes and, packed, as half bytes;
    and of a step what each block gets, what one block makes of it, and some of the logits.
    """
    model, architecture = original.model, original.architecture
    layers = layers_of(model, architecture)
    linears = sum(
        layer.get_submodule(path).get_parameter("weight").numel()
        for layer in layers
        for site in architecture.sites
        for path in site.modules
    )
    parameters, config = _parameters(original), model.config
    models = 4 * parameters + 4 * (parameters - linears) + 3 * linears // 2
    tokens = max(BATCH_TOKENS, settings.sequence_length)
    inside = BLOCK_ACTIVATIONS * (config.hidden_size + architecture.intermediate_size(config))
    activations = 4 * tokens * (config.hidden_size * len(layers) + inside)
    return models + activations + LOGITS * 4 * PIECE * config.vocab_size


def _parameters(original: Original) -> int:
    return sum(parameter.numel() for parameter in original.model.parameters())
