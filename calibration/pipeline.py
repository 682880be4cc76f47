"""`quantize`: a Hugging Face model in, an OffQ checkpoint out."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vllm_offq
from calibration.data import calibration_tokens
from calibration.data_sources import SELF, shares
from calibration.fuse import fuse_block, fuse_embedding, fuse_head
from calibration.gptq import round_head
from calibration.instrument import BlockInputs, block_inputs, instrument
from calibration.loader import Original, load_original
from calibration.model_card import model_card
from calibration.outcome import Report
from calibration.plan import plan
from calibration.progress import Progress, no_progress
from calibration.quantize_block import quantize_block
from calibration.resume import SavedRun, unfinished
from calibration.rotations import Rotations, compute_rotations
from calibration.settings import Settings
from calibration.statistics import collect
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import WEIGHT_PACKED, WEIGHT_SCALE, CheckpointConfig, pack_int8
from vllm_offq.manifest import expected_tensors

BATCH_TOKENS = 2048
"""Tokens that go through a block at once."""


def quantize(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model to an OffQ checkpoint, holding one decoder block at a time in memory.

    source: Hugging Face folder, hub id or GGUF file; out: the new folder, written atomically.
    resume: go on with an interrupted run to `out` (True), discard it (False), or refuse (None).
    Raises: UserError, one sentence, for anything that the caller can put right; nothing is
    written then.
    """
    start = time.monotonic()
    out = Path(out)
    settings = settings or Settings()
    if resume is None and unfinished(out):
        raise UserError(
            f"an unfinished run to {out} is there; go on with it by --resume, or discard it by "
            "--no-resume"
        )
    CheckpointWriter(out, overwrite=overwrite)  # refuses a bad folder before the model is opened
    with progress("opening the model", 1):
        original = load_original(source)
    config = plan(original.model.config, original.architecture, settings)
    dtype = _stored_dtype(settings, original)
    continues = bool(resume) and unfinished(out)
    writer = CheckpointWriter(
        out,
        overwrite=overwrite,
        resume=continues,
        expected_bytes=_expected_bytes(original, config, dtype),
    )
    with torch.no_grad(), writer:
        saved = SavedRun(writer, _fingerprint(original, settings), continues)
        report = Report(**saved.state.report)
        report.original_bytes = original.num_bytes
        try:
            _run(original, settings, config, dtype, writer, saved, report, progress)
        except UserError:  # going on would end the same
            writer.keep = False
            raise
    report.checkpoint_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    report.seconds += time.monotonic() - start
    return report


def _run(
    original: Original,
    settings: Settings,
    config: CheckpointConfig,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    saved: SavedRun,
    report: Report,
    progress: Progress,
) -> None:
    model, architecture = original.model, original.architecture
    tokens = _tokens(original, settings, saved, progress)
    batch_size = _batch_size(*tokens.shape)
    instrument(model, architecture)
    tensors = saved.load("rotations")
    if tensors is None:
        with progress("measuring activations", original.num_layers, unit="layer") as advance:
            statistics = collect(original, tokens, batch_size, advance)
        with progress("finding rotations", 1):
            rotations = compute_rotations(statistics, config, settings)
            del statistics
        saved.save("rotations", rotations.tensors())
        saved.commit()
    else:
        rotations = Rotations.from_tensors(tensors)
    with progress("quantizing", original.num_layers, unit="layer") as advance:
        inputs = _inputs(original, rotations, tokens, batch_size, dtype, writer, saved)
        advance(saved.state.layers)
        for index in range(saved.state.layers, original.num_layers):
            _quantize_layer(
                original, index, rotations, inputs, settings, config, dtype, writer, report
            )
            saved.save(_hidden(index + 1), dict(_numbered(inputs.hidden)))
            saved.state.layers = index + 1
            saved.state.report = asdict(report)
            saved.commit()
            saved.drop(_hidden(index))
            advance()
    _write_rest(original, rotations, config, settings, writer, dtype)


def _tokens(original: Original, settings: Settings, saved: SavedRun, progress: Progress) -> Tensor:
    """Calibration sequences, [samples, sequence_length]."""
    kept = saved.load("tokens")
    if kept is not None:
        return kept["tokens"]
    writes = SELF in shares(settings.calibration, settings.samples)
    whole_model = [""] if writes else []
    with (
        progress(
            "writing calibration text" if writes else "reading calibration text",
            settings.samples * settings.sequence_length,
        ) as advance,
        original.loaded(*whole_model),
    ):
        tokens = calibration_tokens(
            settings.calibration,
            original.model,
            original.tokenizer,
            settings.samples,
            settings.sequence_length,
            settings.seed,
            advance,
        )
    saved.save("tokens", {"tokens": tokens})
    return tokens


def _inputs(
    original: Original,
    rotations: Rotations,
    tokens: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    saved: SavedRun,
) -> BlockInputs:
    """What reaches the first block that is not quantized yet; writes the embedding on the way."""
    model, architecture = original.model, original.architecture
    hidden = saved.load(_hidden(saved.state.layers))
    with original.loaded(architecture.embedding, architecture.final_norm) as (embedding, _):
        fuse_embedding(embedding, rotations)
        if hidden is not None:
            inputs = block_inputs(model, architecture, tokens[:batch_size], batch_size)
            inputs.hidden = [hidden[str(number)] for number in range(len(hidden))]
            return inputs
        inputs = block_inputs(model, architecture, tokens, batch_size)
        for name, parameter in embedding.named_parameters():
            writer.add(f"{architecture.embedding}.{name}", parameter.to(dtype))
    return inputs


def _quantize_layer(
    original: Original,
    index: int,
    rotations: Rotations,
    inputs: BlockInputs,
    settings: Settings,
    config: CheckpointConfig,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    report: Report,
) -> None:
    architecture = original.architecture
    with original.block(index) as layer:
        fuse_block(layer, index, original.model.config, architecture, rotations)
        quantize_block(layer, index, architecture, inputs, settings, config, writer, dtype, report)


def _write_rest(
    original: Original,
    rotations: Rotations,
    config: CheckpointConfig,
    settings: Settings,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Final norm, head, configuration, tokenizer, generation config, model card."""
    architecture = original.architecture
    with original.loaded(architecture.head, architecture.final_norm) as (head, final_norm):
        fuse_head(head, final_norm, rotations)  # type: ignore[arg-type]
        for name, parameter in final_norm.named_parameters():
            writer.add(f"{architecture.final_norm}.{name}", parameter.to(dtype))
        weight: Tensor = head.weight  # type: ignore[assignment]
        if config.head is None:
            writer.add(f"{architecture.head}.weight", weight.to(dtype))
        else:
            codes, scale = round_head(weight)
            writer.add(f"{architecture.head}.{WEIGHT_PACKED}", pack_int8(codes))
            writer.add(f"{architecture.head}.{WEIGHT_SCALE}", scale)
    hf_config = original.model.config
    hf_config.architectures = [architecture.name]
    hf_config.tie_word_embeddings = False  # only the head takes the final norm's gain
    hf_config.dtype = dtype
    hf_config.quantization_config = config.model_dump()
    hf_config.save_pretrained(writer.folder)
    original.tokenizer.save_pretrained(writer.folder)
    if original.model.generation_config is not None:
        original.model.generation_config.save_pretrained(writer.folder)
    writer.add_text("README.md", model_card(original.name, config, settings))


def _fingerprint(original: Original, settings: Settings) -> dict[str, Any]:
    return asdict(settings) | {
        "model": original.name,
        "weights": original.weights.fingerprint(),
        "program": vllm_offq.__version__,
    }


def _expected_bytes(original: Original, config: CheckpointConfig, dtype: torch.dtype) -> int:
    model_config = original.model.config.to_dict() | {
        "architectures": [original.architecture.name],
        "tie_word_embeddings": False,
    }
    return sum(
        math.prod(spec.shape) * (dtype if dtype in spec.dtypes else spec.dtypes[0]).itemsize
        for spec in expected_tensors(model_config, config).values()
    )


def _stored_dtype(settings: Settings, original: Original) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.bfloat16 if original.dtype == torch.float32 else original.dtype


def _batch_size(samples: int, sequence_length: int) -> int:
    """The largest divisor of the samples that keeps a batch within BATCH_TOKENS."""
    limit = max(1, BATCH_TOKENS // sequence_length)
    return max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)


def _hidden(layer: int) -> str:
    return f"hidden-{layer:05d}"


def _numbered(batches: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(str(number), batch) for number, batch in enumerate(batches)]
