"""OffQ linear layers in vLLM: parameters, sharding, loading. The arithmetic is in kernels."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from vllm_offq.errors import UserError
from vllm_offq.format import WEIGHT_PACKED, WEIGHT_SCALE, HeadConfig, SiteConfig
from vllm_offq.kernels import backend, ops
from vllm_offq.kernels.interface import Weight


@register_weight_loader_v2_supported_method
class OffQLinearMethod(LinearMethodBase):
    """A linear layer with 4-bit weights whose input is quantized as its site says."""

    def __init__(self, site: SiteConfig, weight_group_size: int | None):
        self.site = site
        self.weight_group_size = weight_group_size

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register weight_packed and weight_scale with the shapes of the checkpoint.

        Raises: UserError if this rank's part of the input cuts a group or a Hadamard block.
        """
        check_partition(
            layer.prefix,
            self.site,
            self.weight_group_size,
            input_size_per_partition,
            input_size,
        )
        weight_loader = extra_weight_attrs["weight_loader"]
        n = sum(output_partition_sizes)
        layer.register_parameter(
            WEIGHT_PACKED,
            PackedvLLMParameter(
                data=torch.empty(n, input_size_per_partition // 2, dtype=torch.uint8),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=2,
                weight_loader=weight_loader,
            ),
        )
        # NaN until loaded: vLLM does not report a quantized tensor that the checkpoint lacks.
        scale: Parameter
        if self.weight_group_size is None:
            scale = ChannelQuantScaleParameter(
                data=torch.full((n, 1), math.nan, dtype=torch.float16),
                output_dim=0,
                weight_loader=weight_loader,
            )
        else:
            num_groups = input_size_per_partition // self.weight_group_size
            scale = GroupQuantScaleParameter(
                data=torch.full((n, num_groups), math.nan, dtype=torch.float16),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            )
        layer.register_parameter(WEIGHT_SCALE, scale)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Replace the stored form of the weight by the one the kernels run on.

        Raises: UserError if a scale is missing, NaN or infinite.
        """
        if not layer.weight_scale.isfinite().all():
            raise UserError(
                f"{layer.prefix}: {WEIGHT_SCALE} is missing from the checkpoint or not finite; "
                "quantize the model again"
            )
        layer.offq_out_features = layer.weight_packed.shape[0]
        weight = prepare_weight(
            layer.weight_packed.data, layer.weight_scale.data, self.site.group_size
        )
        del layer.weight_packed
        layer.weight_codes = Parameter(weight.codes, requires_grad=False)
        layer.weight_scale = Parameter(weight.scale, requires_grad=False)
        layer.weight_sums = Parameter(weight.sums, requires_grad=False)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K]. Returns: [..., N] in x's dtype."""
        return ops.linear(
            x,
            layer.weight_codes,
            layer.weight_scale,
            layer.weight_sums,
            bias,
            layer.offq_out_features,
            self.site.group_size,
            self.site.online_hadamard or 0,
            self.site.clip_ratio,
            self.site.symmetric,
            self.site.bits,
        )


def prepare_weight(weight_packed: Tensor, weight_scale: Tensor, group_size: int) -> Weight:
    """The backend's form of a stored weight.

    weight_packed: [N, K / 2] uint8; weight_scale: [N, 1] or [N, any] float16, each for one or
    several groups of the input, which have group_size channels.
    """
    if weight_scale.shape[1] > 1:
        num_groups = 2 * weight_packed.shape[1] // group_size
        weight_scale = weight_scale.repeat_interleave(num_groups // weight_scale.shape[1], 1)
    return backend().prepare_weight(weight_packed, weight_scale, group_size)


def check_partition(
    name: str, site: SiteConfig, weight_group_size: int | None, partition: int, input_size: int
) -> None:
    """Raises: UserError if a rank's part of a linear's input cuts a group or a Hadamard block.

    partition: input channels of a rank, of input_size.
    """
    unit = math.lcm(site.group_size, site.online_hadamard or 1, weight_group_size or 1)
    if partition % unit == 0:
        return
    whole_groups = input_size // unit
    works = [size for size in range(1, whole_groups + 1) if whole_groups % size == 0]
    if input_size % unit:
        raise UserError(
            f"{name} has {input_size} input channels, which its groups of {unit} do not divide; "
            "quantize the model again"
        )
    raise UserError(
        f"tensor parallel size {input_size // partition} cuts the groups of {unit} input channels "
        f"of {name}; sizes that work for it: {', '.join(map(str, works))}"
    )


def head_method(head: HeadConfig) -> OffQLinearMethod:
    """Of an output head: with 4-bit weights it is one more linear."""
    if head.bits == 8:
        return OffQ8BitHeadMethod(head)
    return OffQLinearMethod(head.site, head.weight_group_size)


class OffQ8BitHeadMethod(OffQLinearMethod):
    """An output head with 8-bit weights: as pack_int8 says, one of 4-bit weights on [16 x, x]."""

    def __init__(self, head: HeadConfig):
        super().__init__(head.site, weight_group_size=None)

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        *rest: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        """See OffQLinearMethod; see pack_int8 for why there are twice the inputs."""
        sizes = 2 * input_size_per_partition, output_partition_sizes, 2 * input_size
        super().create_weights(layer, *sizes, *rest, **extra_weight_attrs)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K]. Returns: [..., N] in x's dtype."""
        wide = x.float()  # 16-fold it may not fit x's dtype
        logits = super().apply(layer, torch.cat([16 * wide, wide], -1))
        return (logits if bias is None else logits + bias).to(x.dtype)
