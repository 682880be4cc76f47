"""One decoder block from a float one to 4-bit codes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture, Site
from calibration.architectures.base import SiteName
from calibration.gptq import gptq, output_error, round_to_nearest
from calibration.instrument import BlockInputs, OffQLinear, attention_state, set_grids
from calibration.moments import SiteMoments
from calibration.record import Record
from calibration.settings import Settings
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

SHOWN_SITE: SiteName = "attention_input"
"""Whose activations the report has histograms of."""


@dataclass
class Streams:
    """The calibration tokens between two blocks, of the original and of the quantized model."""

    original: BlockInputs
    quantized: BlockInputs | None
    """None where nothing asks for it."""

    def tensors(self) -> dict[str, Tensor]:
        """For a file; the inverse of from_tensors."""
        return {
            f"{name}.{number}": batch
            for name, stream in vars(self).items()
            if stream is not None
            for number, batch in enumerate(stream.hidden)
        }

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
    collected = {
        site.name: SiteMoments(
            _linear(layer, site.modules[0]).weight.shape[1],
            config.sites[site.name],
            sum(batch.shape[:-1].numel() for batch in streams.original.hidden),
            corrects=settings.gptq_inputs == "corrected",
        )
        for site in architecture.sites
    }
    if streams.quantized is None:
        _collect_all(layer, index, architecture, streams.original, collected, show)
    for site in architecture.sites:
        what = f"layer {index}, {'/'.join(site.modules)}"
        moments = collected[site.name]
        if streams.quantized is not None:
            shown = show if site.name == SHOWN_SITE else None
            _collect(layer, index, architecture, site, streams, config, moments, shown)
        moments.finish()
        if not moments.hessian.isfinite().all():
            raise UserError(
                f"{what}: the input is not finite on the calibration text; check the model's "
                "weights"
            )
        record.signal_to_noise.setdefault(site.name, []).append(moments.decibel)
        linears = {path: _linear(layer, path) for path in site.modules}
        # Rows are rounded independently, so linears that share an input go as one matrix.
        stacked = torch.cat([linear.weight for linear in linears.values()])
        rows = [len(linear.weight) for linear in linears.values()]
        try:
            codes, scales = round_weight(stacked, moments, settings)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
        parts = zip(linears.items(), codes.split(rows), scales.split(rows), strict=True)
        for (path, linear), code, scale in parts:
            name = f"{prefix}.{path}"
            writer.add(f"{name}.{WEIGHT_PACKED}", pack_int4(code))
            writer.add(f"{name}.{WEIGHT_SCALE}", scale)
            linear.rounded = dequantize(code, scale)
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
            writer.add(f"{prefix}.{path}", parameter.to(dtype))


def _linear(layer: nn.Module, path: str) -> OffQLinear:
    return layer.get_submodule(path)  # type: ignore[return-value]


def _collect_all(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    original: BlockInputs,
    collected: dict[SiteName, SiteMoments],
    show: Callable[[Tensor], None] | None,
) -> None:
    """Of all sites of the original in one pass, which also takes its stream through the block."""

    def observe(name: SiteName, x: Tensor) -> None:
        collected[name].add(x, x)
        if show is not None and name == SHOWN_SITE:
            show(x)

    for site in architecture.sites:
        _linear(layer, site.modules[0]).observe = partial(observe, site.name)
    original.advance(index, layer)
    for site in architecture.sites:
        _linear(layer, site.modules[0]).observe = None


def _collect(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    site: Site,
    streams: Streams,
    config: CheckpointConfig,
    moments: SiteMoments,
    show: Callable[[Tensor], None] | None,
) -> None:
    """Of one site, when all sites before it are quantized already."""
    linear = _linear(layer, site.modules[0])
    assert streams.quantized is not None
    for number in range(len(streams.original.hidden)):
        set_grids(layer, architecture, None)
        x = streams.original.reach(number, index, layer, linear)
        set_grids(layer, architecture, config)
        moments.add(x, streams.quantized.reach(number, index, layer, linear))
        if show is not None:
            show(x)
    set_grids(layer, architecture, None)


def round_weight(weight: Tensor, moments: SiteMoments, settings: Settings) -> tuple[Tensor, Tensor]:
    """Codes and scales as the settings ask for them; see gptq."""
    group_size = settings.weight_group_size
    if settings.rounding == "rtn":
        return round_to_nearest(weight, moments.hessian.diagonal(), group_size)
    return gptq(
        weight,
        moments.hessian,
        group_size,
        correction=moments.correction,
        refinements=settings.refinements,
    )
