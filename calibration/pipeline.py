"""`quantize`: a Hugging Face model in, an OffQ checkpoint out."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.clipping import clipped
from calibration.data import calibration_tokens
from calibration.data_sources import SELF, shares
from calibration.devices import CPU, usable_devices
from calibration.ends import head_inputs, write_embedding, write_head
from calibration.fingerprint import fingerprint
from calibration.fuse import fuse_block, fuse_embedding, fuse_head, fuse_rows
from calibration.instrument import BlockInputs, block_inputs, instrument
from calibration.loader import Original, load_original, refuse_overlap
from calibration.model_card import model_card
from calibration.plan import plan, stored_dtype
from calibration.progress import Progress, no_progress
from calibration.quantize_block import Streams, quantize_block
from calibration.record import Record
from calibration.refine import refine
from calibration.report import Report, write_report
from calibration.resume import SavedRun, unfinished
from calibration.room import expected_bytes, refuse_small_machine
from calibration.rotations import Rotations
from calibration.settings import Settings
from calibration.shown import ShownActivations
from calibration.source import GENERATION_FILE
from calibration.survey import PASSES, survey
from vllm_offq.checkpoint_writer import CheckpointWriter
from vllm_offq.errors import UserError
from vllm_offq.format import CheckpointConfig
from vllm_offq.wrappers import PREFIX, REST

BATCH_TOKENS = 2048
"""Tokens that go through a block at once."""


def quantize(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model to an OffQ checkpoint, holding one decoder block at a time in memory.

    source: Hugging Face folder, hub id or GGUF file; out: the new folder, written atomically;
    device: what computes, such as "cuda:1"; "auto": all GPUs where the whole model does.
    resume: go on with an interrupted run to `out` (True), discard it (False), or refuse (None).
    Raises: UserError, one sentence, for anything that the caller can put right; `out` is as it
    was then, and so is an unfinished run where going on with it is refused.
    """
    out = Path(out)
    settings = settings or Settings()
    refuse_overlap(source, out)
    CheckpointWriter(out, overwrite=overwrite)  # refuses a bad folder before the model is opened
    if resume is None and unfinished(out):
        raise UserError(
            f"an unfinished run to {out} is there; go on with it by --resume, or discard it by "
            "--no-resume"
        )
    with progress("opening the model", 1):
        original = load_original(source, usable_devices(device))
    rest, prefix = (REST, PREFIX) if original.surroundings else ((), "")
    config = plan(original.model.config, original.architecture, settings, rest)
    dtype = stored_dtype(settings, original)
    original_bytes = original.num_bytes
    continues = bool(resume) and unfinished(out)
    refuse_small_machine(original, settings, continues)
    writer = CheckpointWriter(
        out,
        overwrite=overwrite,
        resume=continues,
        expected_bytes=expected_bytes(original, config, dtype, settings),
        prefix=prefix,
    )
    with torch.no_grad(), writer:
        saved = SavedRun(writer, fingerprint(original, settings), continues)
        record = saved.record
        run = _Run(original, settings, config, dtype, writer, saved, record, record.timed(progress))
        try:
            run.quantize()
        except UserError:  # going on would end the same
            writer.keep = False
            raise
        writer.commit()
        report = record.report(
            original.name, original.class_name, settings, original_bytes, writer.sizes
        )
        write_report(report, writer.folder)
    return report


@dataclass
class _Run:
    original: Original
    settings: Settings
    config: CheckpointConfig
    dtype: torch.dtype
    """Of what stays unquantized."""
    writer: CheckpointWriter
    saved: SavedRun
    record: Record
    progress: Progress

    def quantize(self) -> None:
        original, saved = self.original, self.saved
        instrument(original.model, original.architecture)
        tokens = self.tokens()
        batch_size = _batch_size(*tokens.shape)
        rotations = self.rotations(tokens, batch_size).to(original.device)
        if self.record.clip_ratios is not None:
            self.config = clipped(self.config, self.record.clip_ratios)
        with self.progress("quantizing", original.num_layers, unit="layer") as advance:
            streams = self.streams(rotations, tokens, batch_size)
            advance(saved.state.layers)
            for index in range(saved.state.layers, original.num_layers):
                self.quantize_layer(index, rotations, streams)
                advance()
                saved.save(_hidden(index + 1), streams.tensors())
                saved.state.layers = index + 1
                saved.commit()
                saved.drop(_hidden(index))
        with self.progress("writing the rest", 1):
            self.write_rest(rotations, streams)
        if self.settings.refine:
            learned, refinement = refine(
                original,
                self.config,
                self.writer.written(),
                tokens,
                self.settings,
                saved,
                self.progress,
            )
            self.writer.replace(learned)
            self.record.refinement = refinement.model_dump()

    def tokens(self) -> Tensor:
        """Calibration sequences, [samples, sequence_length]."""
        kept = self.saved.load("tokens")
        if kept is not None:
            return kept["tokens"]
        settings = self.settings
        writes = SELF in shares(settings.calibration, settings.samples)
        whole_model = [""] if writes else []
        with (
            self.progress(
                "writing calibration text" if writes else "reading calibration text",
                settings.samples * settings.sequence_length,
            ) as advance,
            self.original.loaded(*whole_model),
        ):
            tokens = calibration_tokens(
                settings.calibration,
                self.original.model,
                self.original.tokenizer,
                settings.samples,
                settings.sequence_length,
                settings.seed,
                advance,
            )
        self.saved.save("tokens", {"tokens": tokens})
        self.saved.commit()
        return tokens

    def rotations(self, tokens: Tensor, batch_size: int) -> Rotations:
        """Of the whole model, from one pass over it."""
        original, saved = self.original, self.saved
        if saved.state.surveyed and (kept := saved.load("rotations")) is not None:
            return Rotations.from_tensors(kept)
        found = survey(
            original, tokens, batch_size, self.config, self.settings, self.progress, saved
        )
        rotations, candidates = found.rotations, found.basis_candidates
        self.record.clip_ratios = found.clip_ratios
        if found.spectrum is not None:
            self.record.spectrum = found.spectrum.model_dump()
        if candidates is not None:
            self.record.basis_candidates = [candidate.model_dump() for candidate in candidates]
        saved.save("rotations", rotations.tensors())
        saved.state.surveyed = True
        saved.commit()
        for name in PASSES:
            saved.drop(name)
        return rotations

    def streams(self, rotations: Rotations, tokens: Tensor, batch_size: int) -> Streams:
        """What reaches the first block that is not quantized yet; writes the embedding if new."""
        model, architecture = self.original.model, self.original.architecture
        hidden = self.saved.load(_hidden(self.saved.state.layers))
        with self.original.loaded(architecture.embedding, architecture.final_norm) as (
            embedding,
            _,
        ):
            fuse_embedding(embedding, rotations)
            if hidden is not None:
                inputs = block_inputs(model, architecture, tokens[:batch_size], batch_size)
                return Streams.from_tensors(hidden, inputs.arguments)
            inputs = block_inputs(model, architecture, tokens, batch_size)
            write_embedding(
                architecture.embedding,
                embedding.get_parameter("weight"),
                self.config,
                self.writer,
                self.dtype,
            )
        if self.settings.gptq_inputs == "original":
            return Streams(inputs, None)
        return Streams(inputs, BlockInputs(list(inputs.hidden), inputs.arguments))

    def quantize_layer(self, index: int, rotations: Rotations, streams: Streams) -> None:
        """One block, from the original's weights to codes in the writer."""
        original, architecture = self.original, self.original.architecture
        shown = None
        with original.block(index) as layer:
            if index == original.num_layers // 2:
                shown = ShownActivations(layer, index, architecture, self.config, rotations)
            fuse_block(layer, index, original.model.config, architecture, rotations)
            quantize_block(
                layer,
                index,
                architecture,
                streams,
                self.settings,
                self.config,
                self.writer,
                self.dtype,
                self.record,
                None if shown is None else shown.add,
            )
        if shown is not None:
            self.record.histograms = shown.result()

    def write_rest(self, rotations: Rotations, streams: Streams) -> None:
        """Final norm, head, what is around the language model, configuration and other files."""
        original, writer = self.original, self.writer
        architecture, tied = original.architecture, original.architecture.layout.head_is_embedding
        heads = [] if tied else [architecture.head]
        with original.loaded(architecture.final_norm, *heads) as (final_norm, *rest):
            head: nn.Linear | None = rest[0] if rest else None  # type: ignore[assignment]
            fuse_head(head, final_norm, architecture, rotations)
            for name, parameter in final_norm.named_parameters():
                writer.add(f"{architecture.final_norm}.{name}", parameter.to(self.dtype))
            if head is not None:
                inputs = head_inputs(final_norm, streams, self.config)
                write_head(
                    architecture.head,
                    head.weight,
                    inputs,
                    self.settings,
                    self.config,
                    writer,
                    self.dtype,
                )
        on_cpu = rotations.to(CPU)
        for name, tensor in original.rest(partial(fuse_rows, rotations=on_cpu)):
            writer.add_rest(name, tensor)
        hf_config = original.model.config
        hf_config.architectures = [architecture.name]
        hf_config.tie_word_embeddings = tied  # else only the head takes the final norm's gain
        hf_config.dtype = self.dtype
        hf_config.quantization_config = self.config.model_dump()
        original.tokenizer.save_pretrained(writer.folder)
        original.save_config(writer.folder)
        if (sampling := original.model.generation_config) is not None:
            # Unlike save_pretrained, as lenient as vLLM is when it reads them.
            writer.add_text(GENERATION_FILE, sampling.to_json_string())
        writer.add_text("README.md", model_card(original.name, self.config, self.settings))


def _batch_size(samples: int, sequence_length: int) -> int:
    """The largest divisor of the samples that keeps a batch within BATCH_TOKENS."""
    limit = max(1, BATCH_TOKENS // sequence_length)
    return max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)


def _hidden(layer: int) -> str:
    return f"hidden-{layer:05d}"
