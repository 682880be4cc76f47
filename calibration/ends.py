"""Both ends of a model in the checkpoint: the token embedding and the output head."""

from typing import Literal

import torch
from torch import Tensor, nn

from calibration.gptq import ROWS_AT_ONCE, round_rows, round_to_nearest
from calibration.moments import SiteMoments
from calibration.quantize_block import Streams, round_weight
from calibration.settings import Settings
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import (
    EMBEDDING_CODE_MAX,
    HEAD_CODE_MAX,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    pack_int4,
    pack_int8,
)


def write_embedding(
    name: str,
    weight: Tensor,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Add the embedding to the writer. weight: [vocabulary, n], rotated; dtype: if in 16 bit."""
    embedding = config.embedding
    if embedding is None:
        writer.add(f"{name}.weight", weight.to(dtype))
    elif embedding.bits == 8:
        _write(name, *round_rows(weight, EMBEDDING_CODE_MAX), None, writer)
    else:
        equal = weight.new_ones(weight.shape[1])  # a row meets nothing but the norm
        parts = [
            round_to_nearest(rows, equal, embedding.group_size)
            for rows in weight.split(ROWS_AT_ONCE)
        ]
        codes, scales = map(torch.cat, zip(*parts, strict=True))
        _write(name, codes, scales, 4, writer)


def head_inputs(
    final_norm: nn.Module, streams: Streams, config: CheckpointConfig
) -> SiteMoments | None:
    """Of what reaches the head when both streams have passed all blocks; None: it needs none."""
    if config.head is None or config.head.bits == 8:
        return None
    original, quantized = streams.original, streams.quantized or streams.original
    width = original.hidden[0].shape[-1]
    num_tokens = sum(batch.shape[:-1].numel() for batch in original.hidden)
    device = next(final_norm.parameters()).device
    moments = SiteMoments(width, config.head.site, num_tokens, corrects=False, device=device)
    for x, on_grid in zip(original.hidden, quantized.hidden, strict=True):
        moments.add(final_norm(x.to(device)), final_norm(on_grid.to(device)))
    moments.finish()
    return moments


def write_head(
    name: str,
    weight: Tensor,
    inputs: SiteMoments | None,
    settings: Settings,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Add the head to the writer.

    weight: [vocabulary, n], rotated, with the final norm's gain; inputs: needed for 4 bits, see
    head_inputs; dtype: if in 16 bit.
    Raises: UserError naming the head if its input or weight is out of range.
    """
    head = config.head
    if head is None:
        writer.add(f"{name}.weight", weight.to(dtype))
    elif head.bits == 8:
        _write(name, *round_rows(weight, HEAD_CODE_MAX), 8, writer)
    else:
        assert inputs is not None
        try:
            codes, scales = round_weight(weight, inputs, settings, head.weight_group_size, name)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        _write(name, codes, scales, 4, writer)


def _write(
    name: str, codes: Tensor, scales: Tensor, packed: Literal[4, 8] | None, writer: CheckpointWriter
) -> None:
    if packed is not None:
        codes = pack_int4(codes) if packed == 4 else pack_int8(codes)
    writer.add(f"{name}.{WEIGHT_PACKED}", codes)
    writer.add(f"{name}.{WEIGHT_SCALE}", scales)
