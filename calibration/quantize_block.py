"""One decoder block from a float one to 4-bit codes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.architectures.base import SiteName
from calibration.experts import experts_of
from calibration.gptq import gptq, output_error, round_to_nearest
from calibration.instrument import BlockInputs, OffQLinear, attention_state, set_grids
from calibration.moments import SiteMoments
from calibration.record import Record
from calibration.settings import Settings
from calibration.shown import SHOWN_SITE
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import (
    KEY_ROTATION,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    pack_int4,
)
from vllm_offq.quantizer import dequantize


@dataclass
class Streams:
    """The calibration tokens between two blocks, of the original and of the quantized model."""

    original: BlockInputs
    quantized: BlockInputs | None
    """None where nothing asks for it."""

    def tensors(self) -> dict[str, Tensor]:
        """For a file; the inverse of from_tensors."""
        quantized = {} if self.quantized is None else self.quantized.tensors("quantized")
        return self.original.tensors("original") | quantized

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], arguments: list[dict[str, Any]]) -> "Streams":
        """Inverse of tensors. arguments: see BlockInputs."""

        def stream(name: str) -> BlockInputs:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return BlockInputs([tensors[f"{name}.{number}"] for number in range(count)], arguments)

        return cls(stream("original"), stream("quantized") if "quantized.0" in tensors else None)


@torch.no_grad()
def quantize_block(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    streams: Streams,
    settings: Settings,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
    record: Record,
    show: Callable[[Tensor], None] | None = None,
) -> None:
    """Round the weights of a fused block and add them to the writer; the streams move on.

    With a quantized stream it goes site after site, so that each site sees what the quantized
    part of the model before it makes of the tokens. dtype: of what stays unquantized. show:
    called with batches [B, T, K] of SHOWN_SITE's input.
    Raises: UserError naming the layer and linears whose input or weight is out of range.
    """
    prefix = f"{architecture.layers}.{index}"
    written = set()
    signal, noise = (dict.fromkeys((s.name for s in architecture.sites), 0.0) for _ in range(2))
    collected = {
        group: SiteMoments(
            _linear(layer, group[0]).weight.shape[1],
            config.sites[site.name],
            sum(batch.shape[:-1].numel() for batch in streams.original.hidden),
            corrects=settings.gptq_inputs == "corrected",
            device=_linear(layer, group[0]).weight.device,
        )
        for site in architecture.sites
        for group in site.groups
    }
    if streams.quantized is None:
        _collect_all(layer, index, architecture, streams.original, collected, show)
    places = [(site, group) for site in architecture.sites for group in site.groups]
    for site, group in places:
        what = f"layer {index}, {'/'.join(group)}"
        moments = collected.pop(group)
        if streams.quantized is not None:
            shown = show if site.name == SHOWN_SITE else None
            _collect(layer, index, architecture, group, streams, config, moments, shown)
        moments.finish()
        if not moments.hessian.isfinite().all():
            raise UserError(
                f"{what}: the input is not finite on the calibration text; check the model's "
                "weights"
            )
        noise[site.name] += moments.noise
        signal[site.name] += moments.signal
        linears = {path: _linear(layer, path) for path in group}
        # Rows are rounded independently, so linears that share an input go as one matrix.
        stacked = torch.cat([linear.weight for linear in linears.values()])
        rows = [len(linear.weight) for linear in linears.values()]
        try:
            group_size = settings.weight_group_size
            codes, scales = round_weight(stacked, moments, settings, group_size, what)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
        parts = zip(linears.items(), codes.split(rows), scales.split(rows), strict=True)
        for (path, linear), code, scale in parts:
            name = architecture.stored(f"{prefix}.{path}")
            writer.add(f"{name}.{WEIGHT_PACKED}", pack_int4(code))
            writer.add(f"{name}.{WEIGHT_SCALE}", scale)
            if streams.quantized is not None:
                linear.rounded = partial(nn.functional.linear, weight=dequantize(code, scale))
            record.output_error[name] = output_error(linear.weight, code, scale, moments.hessian)
            written.add(f"{path}.weight")
    if streams.quantized is not None:
        streams.original.advance(index, layer)
        set_grids(layer, architecture, config)
        streams.quantized.advance(index, layer)
        set_grids(layer, architecture, None)
    for path in (path for site in architecture.sites for path in site.modules):
        _linear(layer, path).rounded = None
    rotation = attention_state(layer, architecture).key_rotation
    if rotation is not None:
        writer.add(f"{prefix}.{architecture.attention}.attn.{KEY_ROTATION}", rotation.half())
    for path, parameter in layer.named_parameters():
        if path not in written:
            writer.add(architecture.stored(f"{prefix}.{path}"), parameter.to(dtype))
    for name in signal:
        ratio = max(signal[name], 1e-30) / max(noise[name], 1e-30)
        record.signal_to_noise.setdefault(name, []).append(10 * math.log10(ratio))
    experts = experts_of(layer, architecture)
    if experts is not None:
        record.expert_counts = (record.expert_counts or {}) | {prefix: experts.counts}


def _linear(layer: nn.Module, path: str) -> OffQLinear:
    return layer.get_submodule(path)  # type: ignore[return-value]


def _collect_all(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    original: BlockInputs,
    collected: dict[tuple[str, ...], SiteMoments],
    show: Callable[[Tensor], None] | None,
) -> None:
    """Of all sites of the original in one pass, which also takes its stream through the block."""

    def observe(name: SiteName, group: tuple[str, ...], x: Tensor) -> None:
        collected[group].add(x, x)
        if show is not None and name == SHOWN_SITE:
            show(x)

    experts = experts_of(layer, architecture)
    if experts is not None:
        experts.counts, experts.calibrates = [0] * len(experts.counts), True
    for site in architecture.sites:
        for group in site.groups:
            _linear(layer, group[0]).observe = partial(observe, site.name, group)
    original.advance(index, layer)
    for site in architecture.sites:
        for group in site.groups:
            _linear(layer, group[0]).observe = None
    if experts is not None:
        experts.calibrates = False


def _collect(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    group: tuple[str, ...],
    streams: Streams,
    config: CheckpointConfig,
    moments: SiteMoments,
    show: Callable[[Tensor], None] | None,
) -> None:
    """Of linears that share their input, when all sites before it are quantized already."""
    linear = _linear(layer, group[0])
    assert streams.quantized is not None
    for number in range(len(streams.original.hidden)):
        set_grids(layer, architecture, None)
        x = streams.original.reach(number, index, layer, linear)
        set_grids(layer, architecture, config)
        moments.add(x, streams.quantized.reach(number, index, layer, linear))
        if show is not None:
            show(x)
    set_grids(layer, architecture, None)


def round_weight(
    weight: Tensor, moments: SiteMoments, settings: Settings, group_size: int | None, what: str
) -> tuple[Tensor, Tensor]:
    """Codes and scales as the settings ask for them; see gptq. what: the weight's name."""
    if settings.rounding == "rtn":
        return round_to_nearest(weight, moments.hessian.diagonal(), group_size)
    order = None
    if settings.gptq_order == "activation":
        order = moments.hessian.diagonal().argsort(descending=True, stable=True)
    return gptq(
        weight,
        moments.hessian,
        group_size,
        order=order,
        correction=moments.correction,
        refits=settings.refits,
        what=what,
    )
