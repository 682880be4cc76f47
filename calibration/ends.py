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


def write_end(
    path: str,
    weight: Tensor,
    architecture: Architecture,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Add one end to the writer, in 8 bits where the configuration says so.

    path: the embedding's or the head's; weight: [vocabulary, n], rotated, of the head with the
    final norm's gain; dtype: of what stays unquantized.
    """
    is_head = path == architecture.head
    if (config.head if is_head else config.embedding) is None:
        writer.add(f"{path}.weight", weight.to(dtype))
        return
    codes, scale = round_rows(weight, HEAD_CODE_MAX if is_head else EMBEDDING_CODE_MAX)
    writer.add(f"{path}.{WEIGHT_PACKED}", pack_int8(codes) if is_head else codes)
    writer.add(f"{path}.{WEIGHT_SCALE}", scale)
