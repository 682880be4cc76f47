"""One decoder block from a float one to 4-bit codes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.architectures.base import SiteName
from calibration.gptq import gptq, output_error, round_to_nearest
from calibration.instrument import BlockInputs, OffQLinear, attention_state
from calibration.record import Record
from calibration.settings import Settings
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import (
    KEY_ROTATION,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    SiteConfig,
    pack_int4,
)
from vllm_offq.quantizer import fake_quantize

SNR_TOKENS = 512
"""Tokens of a batch that the signal-to-noise ratio is measured on."""
SHOWN_SITE: SiteName = "attention_input"
"""Whose activations the report has histograms of."""


@dataclass
class SiteObserver:
    """Collects the Hessian and the quantizer's signal-to-noise of one site's input."""

    grid: SiteConfig
    hessian: Tensor
    signal: float = 0.0
    noise: float = 0.0
    show: Callable[[Tensor], None] | None = None

    def __call__(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self.hessian.addmm_(flat.T, flat)
        if self.show is not None:
            self.show(flat)
        sample = flat[:: max(1, len(flat) // SNR_TOKENS)]
        quantized = fake_quantize(
            sample,
            self.grid.group_size,
            self.grid.clip_ratio,
            self.grid.symmetric,
            self.grid.bits,
        )
        self.signal += float(sample.square().sum())
        self.noise += float((quantized - sample).square().sum())

    @property
    def decibel(self) -> float:
        """Signal-to-noise ratio of the quantized input."""
        return 10 * math.log10(max(self.signal, 1e-30) / max(self.noise, 1e-30))


@torch.no_grad()
def quantize_block(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    inputs: BlockInputs,
    settings: Settings,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
    record: Record,
    show: Callable[[Tensor], None] | None = None,
) -> None:
    """Round the weights of a fused block and add them to the writer; the inputs move on.

    The Hessians are those of unquantized inputs. dtype: of what stays unquantized. show:
    called with batches [t, n] of the input of SHOWN_SITE.
    Raises: UserError naming the layer and linears whose input or weight is out of range.
    """
    prefix = f"{architecture.layers}.{index}"
    observers: dict[str, SiteObserver] = {}
    for site in architecture.sites:
        first: OffQLinear = layer.get_submodule(site.modules[0])  # type: ignore[assignment]
        width = first.weight.shape[1]
        observers[site.name] = SiteObserver(config.sites[site.name], torch.zeros(width, width))
        first.observe = observers[site.name]
        if site.name == SHOWN_SITE:
            observers[site.name].show = show
    inputs.advance(index, layer)
    written = set()
    for site in architecture.sites:
        observer = observers[site.name]
        what = f"layer {index}, {'/'.join(site.modules)}"
        if not observer.hessian.isfinite().all():
            raise UserError(
                f"{what}: the input is not finite on the calibration text; check the model's "
                "weights"
            )
        record.signal_to_noise.setdefault(site.name, []).append(observer.decibel)
        linears: dict[str, OffQLinear] = {
            path: layer.get_submodule(path)  # type: ignore[misc]
            for path in site.modules
        }
        # Rows are rounded independently, so linears that share an input go as one matrix.
        stacked = torch.cat([linear.weight for linear in linears.values()])
        rows = [len(linear.weight) for linear in linears.values()]
        try:
            codes, scales = round_weight(stacked, observer.hessian, settings)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
        parts = zip(linears.items(), codes.split(rows), scales.split(rows), strict=True)
        for (path, linear), code, scale in parts:
            linear.observe = None
            name = f"{prefix}.{path}"
            writer.add(f"{name}.{WEIGHT_PACKED}", pack_int4(code))
            writer.add(f"{name}.{WEIGHT_SCALE}", scale)
            record.output_error[name] = output_error(linear.weight, code, scale, observer.hessian)
            written.add(f"{path}.weight")
    rotation = attention_state(layer, architecture).key_rotation
    if rotation is not None:
        writer.add(f"{prefix}.{architecture.attention}.attn.{KEY_ROTATION}", rotation.half())
    for path, parameter in layer.named_parameters():
        if path not in written:
            writer.add(f"{prefix}.{path}", parameter.to(dtype))


def round_weight(weight: Tensor, hessian: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Codes and scales as the settings ask for them; see gptq."""
    if settings.rounding == "gptq":
        return gptq(weight, hessian, settings.weight_group_size)
    return round_to_nearest(weight, hessian.diagonal(), settings.weight_group_size)
