"""`quantize`: a Hugging Face model in, an OffQ checkpoint out."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from calibration.architectures import Architecture
from calibration.data import calibration_tokens
from calibration.data_sources import SELF, shares
from calibration.fuse import fuse
from calibration.gptq import gptq, output_error, round_head, round_to_nearest
from calibration.instrument import (
    OffQLinear,
    attention_state,
    first_layer_inputs,
    instrument,
    layers_of,
)
from calibration.loader import Original, load_original
from calibration.model_card import model_card
from calibration.plan import plan
from calibration.progress import Progress, no_progress
from calibration.rotations import Rotations, hadamard_rotations, principal_rotations
from calibration.settings import RECIPES, Settings
from calibration.statistics import Statistics, collect
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import (
    KEY_ROTATION,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    CheckpointConfig,
    SiteConfig,
    pack_int4,
    pack_int8,
)
from vllm_offq.quantizer import fake_quantize

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once."""
SNR_TOKENS = 512
"""Tokens of a batch that the signal-to-noise ratio is measured on."""


@dataclass
class Report:
    """What a run did."""

    signal_to_noise: dict[str, list[float]] = field(default_factory=dict)
    """Of each site's quantized input, in dB, a value a layer."""
    output_error: dict[str, float] = field(default_factory=dict)
    """Of each linear: squared error of its output from rounding weights, relative."""
    original_bytes: int = 0
    checkpoint_bytes: int = 0
    seconds: float = 0.0


def quantize(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model to an OffQ checkpoint.

    source: Hugging Face folder, hub id or GGUF file; out: the new folder, written atomically.
    Raises: UserError, one sentence, for anything that the caller can put right; nothing is
    written then.
    """
    start = time.monotonic()
    settings = settings or Settings()
    writer = CheckpointWriter(Path(out), overwrite=overwrite)
    with progress("loading the model", 1):
        original = load_original(source)
    config = plan(original.model.config, original.architecture, settings)
    report = Report(original_bytes=_original_bytes(original))
    with torch.no_grad(), writer:
        _run(original, settings, config, writer, report, progress)
    report.checkpoint_bytes = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    report.seconds = time.monotonic() - start
    return report


def _run(
    original: Original,
    settings: Settings,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    report: Report,
    progress: Progress,
) -> None:
    model, architecture = original.model, original.architecture
    writes = SELF in shares(settings.calibration, settings.samples)
    with progress(
        "writing calibration text" if writes else "reading calibration text",
        settings.samples * settings.sequence_length,
    ) as advance:
        tokens = calibration_tokens(
            settings.calibration,
            model,
            original.tokenizer,
            settings.samples,
            settings.sequence_length,
            settings.seed,
            advance,
        )
    batch_size = _batch_size(*tokens.shape)
    instrument(model, architecture)
    num_layers = len(layers_of(model, architecture))
    with progress("measuring activations", num_layers, unit="layer") as advance:
        statistics = collect(model, architecture, tokens, batch_size, advance)
    with progress("rotating the weights", 1):
        fuse(model, architecture, compute_rotations(statistics, config, settings))
    dtype = _stored_dtype(settings, original)
    with progress("quantizing", num_layers, unit="layer") as advance:
        quantize_layers(
            model,
            architecture,
            tokens,
            batch_size,
            settings,
            config,
            writer,
            dtype,
            report,
            advance,
        )
    _write_rest(original, config, settings, writer, dtype)


def compute_rotations(
    statistics: Statistics, config: CheckpointConfig, settings: Settings
) -> Rotations:
    """The rotations of the settings' recipe."""
    rotation = RECIPES[settings.recipe].rotation
    if rotation == "none":
        return Rotations()
    if rotation == "hadamard":
        rotations = hadamard_rotations(statistics, settings.seed)
    else:
        rotations = principal_rotations(
            statistics,
            group_size=config.sites["attention_input"].group_size,
            head_group_size=config.sites["attention_output"].group_size,
            down_group_size=config.sites["mlp_output"].group_size,
            basis=settings.basis,
        )
    if config.kv_cache is None:
        rotations.keys = None
    return rotations


@dataclass
class _SiteObserver:
    """Collects the Hessian and the quantizer's signal-to-noise of one site's input."""

    grid: SiteConfig
    hessian: Tensor
    signal: float = 0.0
    noise: float = 0.0

    def __call__(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self.hessian.addmm_(flat.T, flat)
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
        return 10 * math.log10(max(self.signal, 1e-30) / max(self.noise, 1e-30))


def quantize_layers(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    batch_size: int,
    settings: Settings,
    config: CheckpointConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
    report: Report,
    advance: Callable[[], None],
) -> None:
    """Round the weights of a fused model layer by layer and write them.

    The Hessians are those of unquantized inputs: quantized ones gained nothing at this size.
    """
    round_weight = gptq if settings.rounding == "gptq" else _round_by_diagonal
    hidden, arguments = first_layer_inputs(model, architecture, tokens, batch_size)
    for index, layer in enumerate(layers_of(model, architecture)):
        prefix = f"{architecture.layers}.{index}"
        observers: dict[str, _SiteObserver] = {}
        for site in architecture.sites:
            first: OffQLinear = layer.get_submodule(site.modules[0])  # type: ignore[assignment]
            width = first.weight.shape[1]
            observers[site.name] = _SiteObserver(config.sites[site.name], torch.zeros(width, width))
            first.observe = observers[site.name]
        hidden = [layer(batch, **arguments) for batch in hidden]
        written = set()
        for site in architecture.sites:
            observer = observers[site.name]
            if not observer.hessian.isfinite().all():
                raise UserError(
                    f"layer {index}: the input of {'/'.join(site.modules)} is not finite on the "
                    "calibration text; check the model's weights"
                )
            report.signal_to_noise.setdefault(site.name, []).append(observer.decibel)
            linears: dict[str, OffQLinear] = {
                path: layer.get_submodule(path)  # type: ignore[misc]
                for path in site.modules
            }
            # Rows are rounded independently, so linears that share an input go as one matrix.
            stacked = torch.cat([linear.weight for linear in linears.values()])
            rows = [len(linear.weight) for linear in linears.values()]
            try:
                codes, scales = round_weight(stacked, observer.hessian, settings.weight_group_size)
            except UserError as error:
                raise UserError(f"layer {index}, {'/'.join(site.modules)}: {error}") from None
            parts = zip(linears.items(), codes.split(rows), scales.split(rows), strict=True)
            for (path, linear), code, scale in parts:
                linear.observe = None
                name = f"{prefix}.{path}"
                writer.add(f"{name}.{WEIGHT_PACKED}", pack_int4(code))
                writer.add(f"{name}.{WEIGHT_SCALE}", scale)
                report.output_error[name] = output_error(
                    linear.weight, code, scale, observer.hessian
                )
                written.add(f"{path}.weight")
        rotation = attention_state(layer, architecture).key_rotation
        if rotation is not None:
            writer.add(f"{prefix}.{architecture.attention}.attn.{KEY_ROTATION}", rotation.half())
        for path, parameter in layer.named_parameters():
            if path not in written:
                writer.add(f"{prefix}.{path}", parameter.to(dtype))
        advance()


def _round_by_diagonal(
    weight: Tensor, hessian: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    return round_to_nearest(weight, hessian.diagonal(), group_size)


def _write_rest(
    original: Original,
    config: CheckpointConfig,
    settings: Settings,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Embedding, final norm, head, configuration, tokenizer, generation config, model card."""
    model, architecture = original.model, original.architecture
    unquantized = [architecture.embedding, architecture.final_norm]
    if config.head is None:
        unquantized.append(architecture.head)
    else:
        codes, scale = round_head(model.get_submodule(architecture.head).weight)  # type: ignore[arg-type]
        writer.add(f"{architecture.head}.{WEIGHT_PACKED}", pack_int8(codes))
        writer.add(f"{architecture.head}.{WEIGHT_SCALE}", scale)
    for module in unquantized:
        for name, parameter in model.get_submodule(module).named_parameters():
            writer.add(f"{module}.{name}", parameter.to(dtype))
    hf_config = model.config
    hf_config.architectures = [architecture.name]
    hf_config.dtype = dtype
    hf_config.quantization_config = config.model_dump()
    hf_config.save_pretrained(writer.folder)
    original.tokenizer.save_pretrained(writer.folder)
    generation: GenerationConfig | None = model.generation_config
    if generation is not None:
        generation.save_pretrained(writer.folder)
    writer.add_text("README.md", model_card(original.name, config, settings))


def _original_bytes(original: Original) -> int:
    """Bytes of the original's weights as it stores them, tied tensors once."""
    return sum(p.numel() for p in original.model.parameters()) * original.dtype.itemsize


def _stored_dtype(settings: Settings, original: Original) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.bfloat16 if original.dtype == torch.float32 else original.dtype


def _batch_size(samples: int, sequence_length: int) -> int:
    """The largest divisor of the samples that keeps a batch within BATCH_TOKENS."""
    limit = max(1, BATCH_TOKENS // sequence_length)
    return max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)
