"""The token embedding in vLLM, as codes of 8 or 4 bits and scales."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from vllm_offq.errors import UserError
from vllm_offq.format import WEIGHT_PACKED, WEIGHT_SCALE, EmbeddingConfig, unpack_int4
from vllm_offq.quantizer import dequantize


class OffQEmbeddingMethod(QuantizeMethodBase):
    """Rows are looked up as codes and scales, and only those become floating point."""

    def __init__(self, config: EmbeddingConfig) -> None:
        self.config = config

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register weight_packed and weight_scale with the shapes of the checkpoint."""
        rows, width = sum(output_partition_sizes), input_size_per_partition
        codes = torch.empty(rows, width, dtype=torch.int8)
        if self.config.bits == 4:
            codes = torch.empty(rows, width // 2, dtype=torch.uint8)
        num_groups = width // (self.config.group_size or width)
        tensors = {
            WEIGHT_PACKED: codes,
            # NaN until loaded: vLLM does not report a quantized tensor that the checkpoint lacks.
            WEIGHT_SCALE: torch.full((rows, num_groups), math.nan, dtype=torch.float16),
        }
        for name, tensor in tensors.items():
            parameter = Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)
        layer.offq_dtype = params_dtype

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Raises: UserError if a scale is missing, NaN or infinite."""
        if not layer.weight_scale.isfinite().all():
            raise UserError(
                f"the embedding's {WEIGHT_SCALE} is missing from the checkpoint or not finite; "
                "quantize the model again"
            )

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        """Rows of the given tokens, [...] integers. Returns: [..., n] in the model's dtype."""
        codes = embedding(input_, layer.weight_packed)
        if self.config.bits == 4:
            codes = unpack_int4(codes)
        return dequantize(codes, embedding(input_, layer.weight_scale)).to(layer.offq_dtype)

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """An embedding multiplies nothing. Raises: UserError: a head has a method of its own."""
        raise UserError("a quantized embedding cannot serve as the output head; quantize again")
