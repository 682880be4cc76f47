"""Both ends of a model in the checkpoint: the token embedding and the output head."""

import torch
from torch import Tensor

from calibration.architectures import Architecture
from calibration.gptq import round_rows
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.format import (
    EMBEDDING_CODE_MAX,
    HEAD_CODE_MAX,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    pack_int8,
)


def write_embedding(
    weight: Tensor,
    architecture: Architecture,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """weight: [vocabulary, n], rotated; dtype: of what stays unquantized."""
    path = architecture.embedding
    if config.embedding is None:
        writer.add(f"{path}.weight", weight.to(dtype))
        return
    codes, scale = round_rows(weight, EMBEDDING_CODE_MAX)
    writer.add(f"{path}.{WEIGHT_PACKED}", codes)
    writer.add(f"{path}.{WEIGHT_SCALE}", scale)


def write_head(
    weight: Tensor,
    architecture: Architecture,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """weight: [vocabulary, n], rotated, with the final norm's gain; dtype: as above."""
    path = architecture.head
    if config.head is None:
        writer.add(f"{path}.weight", weight.to(dtype))
        return
    codes, scale = round_rows(weight, HEAD_CODE_MAX)
    writer.add(f"{path}.{WEIGHT_PACKED}", pack_int8(codes))
    writer.add(f"{path}.{WEIGHT_SCALE}", scale)
