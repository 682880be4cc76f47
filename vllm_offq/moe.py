"""Mixtures of experts in vLLM: parameters, sharding, loading. The arithmetic is in kernels."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.utils import set_weight_attrs

from vllm_offq.errors import UserError
from vllm_offq.format import WEIGHT_PACKED, WEIGHT_SCALE, SiteConfig
from vllm_offq.kernels import ops
from vllm_offq.linear import check_partition, prepare_weight

LINEARS = ("w13", "w2")
"""vLLM's names of gate and up, and of down."""


class OffQMoEMethod(FusedMoEMethodBase):
    """Experts with 4-bit weights whose inputs are quantized as their sites say.

    Raises: UserError naming what the layer has that OffQ does not support.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        gate_up: SiteConfig,
        down: SiteConfig,
        weight_group_size: int | None,
    ):
        super().__init__(layer.moe_config)
        self.sites = dict(zip(LINEARS, (gate_up, down), strict=True))
        self.weight_group_size = weight_group_size
        refuse_unsupported(layer)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register weight_packed and weight_scale of all experts, [E, ...] of the checkpoint's.

        Raises: UserError if this rank's part of an input cuts a group or a Hadamard block.
        """
        intermediate_size = intermediate_size_per_partition * self.moe.tp_size
        out_features = 2 * intermediate_size_per_partition, hidden_size
        in_features = hidden_size, intermediate_size_per_partition
        whole = hidden_size, intermediate_size
        group_size = self.weight_group_size
        for name, n, k, input_size in zip(LINEARS, out_features, in_features, whole, strict=True):
            check_partition(
                f"{name} of {layer.layer_name}", self.sites[name], group_size, k, input_size
            )
            num_scales = 1 if group_size is None else k // group_size
            packed = torch.empty(num_experts, n, k // 2, dtype=torch.uint8)
            # NaN until loaded: vLLM does not report an expert that the checkpoint lacks.
            scale = torch.full((num_experts, n, num_scales), math.nan, dtype=torch.float16)
            for suffix, data in (WEIGHT_PACKED, packed), (WEIGHT_SCALE, scale):
                parameter = Parameter(data, requires_grad=False)
                layer.register_parameter(f"{name}_{suffix}", parameter)
                attributes = {
                    "weight_loader": extra_weight_attrs["weight_loader"],
                    "quant_method": "channel" if group_size is None else "group",
                }
                set_weight_attrs(parameter, attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replace the stored form of the weights by the one the kernels run on.

        Raises: UserError if a scale is missing, NaN or infinite.
        """
        for name, site in self.sites.items():
            packed = getattr(layer, f"{name}_{WEIGHT_PACKED}").data
            scales = getattr(layer, f"{name}_{WEIGHT_SCALE}").data
            finite = scales.flatten(1).isfinite().all(1)
            if not finite.all():
                raise UserError(
                    f"{layer.layer_name}: {WEIGHT_SCALE} of {name} of expert "
                    f"{int(finite.logical_not().nonzero()[0])} of this rank is missing from the "
                    "checkpoint or not finite; quantize the model again"
                )
            delattr(layer, f"{name}_{WEIGHT_PACKED}")
            delattr(layer, f"{name}_{WEIGHT_SCALE}")
            for part, tensor in self._prepare(packed, scales, site.group_size).items():
                layer.register_parameter(
                    f"{name}_weight_{part}", Parameter(tensor, requires_grad=False)
                )

    def _prepare(self, packed: Tensor, scales: Tensor, group_size: int) -> dict[str, Tensor]:
        """Each expert by prepare_weight. Returns: codes, scale, sums; [E, ...]."""
        stacked: dict[str, Tensor] = {}
        for expert, stored in enumerate(zip(packed, scales, strict=True)):
            weight = prepare_weight(*stored, group_size)
            for part, tensor in weight._asdict().items():
                if expert == 0:
                    stacked[part] = tensor.new_empty(len(packed), *tensor.shape)
                stacked[part][expert] = tensor
        return stacked

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x: [T, K]; topk_weights, topk_ids: [T, k], by vLLM's router. Returns: [T, K]."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]  # -1: another rank's
        hidden_size, intermediate_size = layer.hidden_size, layer.intermediate_size_per_partition
        arguments: list[object] = []
        for (name, site), n in zip(
            self.sites.items(), (2 * intermediate_size, hidden_size), strict=True
        ):
            weight = [getattr(layer, f"{name}_weight_{p}") for p in ("codes", "scale", "sums")]
            block = site.online_hadamard or 0
            arguments += [weight, n, site.group_size, block]
            arguments += [site.clip_ratio, site.symmetric, site.bits]
        return ops.experts(x, topk_ids, topk_weights, *arguments)


def refuse_unsupported(layer: RoutedExperts) -> None:
    """Raises: UserError naming what the layer has that OffQ's experts have not."""
    moe = layer.moe_config
    clamps = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    used = {
        f"{moe.activation.value} as the experts' activation": moe.activation
        is not MoEActivation.SILU,
        "a clamped activation of experts": any(value is not None for value in clamps),
        "biases of experts": moe.has_bias,
        "router weights applied to the experts' input": layer.apply_router_weight_on_input,
        "data parallelism of experts": moe.dp_size > 1 or moe.is_sequence_parallel,
    }
    for feature, is_used in used.items():
        if is_used:
            raise UserError(f"{feature} is not supported by OffQ yet: {layer.layer_name}")
