"""The recipes of `benchmarks.accuracy`, and their simulation with each part on or off."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.scores import Scores, score
from calibration.architectures import Architecture, find_architecture
from calibration.data import calibration_tokens
from calibration.inspect_command import describe
from calibration.instrument import OffQLinear, instrument, layers_of, set_grids
from calibration.loader import load_original
from calibration.pipeline import quantize
from calibration.plan import plan
from calibration.progress import no_progress
from calibration.settings import Settings
from calibration.simulate import fused_model, load_simulated
from calibration.survey import survey
from vllm_offq.checkpoint import Checkpoint
from vllm_offq.format import CheckpointConfig

OFFQ = Settings(head_bits="16")
"""All rows but those of the ends leave the head alone, as QuaRot's does."""
PAPER = replace(OFFQ, basis="top-1", head_basis="hadamard", clip_ratio=1.0, refits=0)
"""OffQ as arXiv 2606.07116 has it: what each addition is added to."""
RECIPES: dict[str, Settings] = {
    "rtn": replace(OFFQ, recipe="rtn", refits=0),
    "quarot": replace(OFFQ, recipe="quarot", refits=0),
    "paper": PAPER,
    "+ basis chosen": replace(PAPER, basis="auto"),
    "+ basis of all tokens": replace(PAPER, basis="all"),
    "+ basis of sinks first": replace(PAPER, basis="sink"),
    "+ basis a permutation": replace(PAPER, basis="permutation"),
    "+ heads principal": replace(PAPER, head_basis="principal"),
    "+ clip ratio 0.95": replace(PAPER, clip_ratio=None),
    "+ clip ratio auto": replace(PAPER, clip_ratio="auto"),
    "+ GPTQ refined": replace(PAPER, refits=1),
    "+ GPTQ in activation order": replace(PAPER, gptq_order="activation"),
    "+ GPTQ on quantized inputs": replace(PAPER, gptq_inputs="quantized"),
    "+ GPTQ corrected": replace(PAPER, gptq_inputs="corrected"),
    "+ weight groups": PAPER,  # their size is the model's, see `settings_of`
    "offq": OFFQ,
    "offq, head 8": replace(OFFQ, head_bits="8"),
    "offq, head and embedding 8": replace(OFFQ, head_bits="8", embedding_bits="8"),
    "offq, head and embedding 4": replace(OFFQ, head_bits="4", embedding_bits="4"),
    "offq, weight groups": OFFQ,
    "offq, weight groups, all of GPTQ": replace(
        OFFQ, gptq_inputs="quantized", gptq_order="activation"
    ),
    "offq, fine groups": OFFQ,  # likewise
    "offq, weight groups, refined": replace(OFFQ, refine=128),
    "offq, fine groups, refined": replace(OFFQ, refine=128),
}
PARTS = ("rtn", "quarot", "paper", "offq", "offq, weight groups")
"""Recipes that are measured with one part quantized alone, too."""
MODES = ("W4A4KV4", "W4A4", "W4A8KV4", "W4", "A4", "KV4")

Measured = tuple[str, Scores, float]
"""Mode, scores and bits of a quantized weight."""


@dataclass(frozen=True)
class Workload:
    """What every recipe is calibrated and scored on."""

    model: str
    calibration: tuple[str, ...]
    samples: int
    sequence_length: int
    windows: Tensor
    """[W, T] int64."""
    references: Path
    """The original's log-probabilities of each window, see benchmarks.scores.keep."""
    fingerprint: str
    """Of the model's weights."""

    @cached_property
    def kind(self) -> tuple[PreTrainedConfig, Architecture]:
        """The model's, read once: a GGUF file takes long."""
        original = load_original(self.model)
        return original.model.config, original.architecture


def refusal(name: str, architecture: Architecture) -> str | None:
    """Why a recipe cannot be applied to a family of models, if it cannot."""
    if name.startswith("+ basis") and not architecture.rotates_stream:
        return f"the residual stream of {architecture.name} cannot be rotated to a basis"
    return None


def settings_of(name: str, workload: Workload) -> Settings:
    """A recipe's settings for this model and calibration."""
    settings = replace(
        RECIPES[name],
        calibration=workload.calibration,
        samples=workload.samples,
        sequence_length=workload.sequence_length,
    )
    if not workload.kind[1].rotates_stream:  # then there is no basis to be given
        settings = replace(settings, basis="auto")
    if "groups" not in name:
        return settings
    size = group_sizes(workload, settings)[0]
    group_size = size // 2 if "fine groups" in name else size
    return replace(settings, group_size=group_size, weight_group_size=size)


def group_sizes(workload: Workload, settings: Settings) -> tuple[int, int]:
    """Of weights and activations: the largest that suits every linear. Then of the KV cache."""
    config = plan(*workload.kind, settings)
    assert config.kv_cache is not None
    return min(site.group_size for site in config.sites.values()), config.kv_cache.group_size


def set_mode(model: PreTrainedModel, config: CheckpointConfig, mode: str) -> None:
    """Turn the grids of an instrumented model on and off."""
    architecture = find_architecture(model.config.architectures).of(model.config)
    bits = {"W4A8KV4": 8, "W4": None, "KV4": None}.get(mode, 4)
    change: dict[str, float | None] = {"bits": bits}
    if bits == 8:
        change["clip_ratio"] = 1.0  # as in plan
    sites = {name: site.model_copy(update=change) for name, site in config.sites.items()}
    cache = config.kv_cache if "KV4" in mode else None
    config = config.model_copy(update={"sites": sites, "kv_cache": cache})
    for layer in layers_of(model, architecture):
        set_grids(layer, architecture, config)
        for linear in layer.modules():
            if isinstance(linear, OffQLinear) and bits is None:
                linear.grid = None


def measure(name: str, workload: Workload, modes: list[str]) -> Iterator[Measured]:
    """Quantize by a recipe, and score it in each mode."""

    def scored(model: PreTrainedModel, mode: str) -> Scores:
        return score(
            model,
            workload.windows,
            workload.references,
            lambda windows: track(windows, f"{name}, {mode}", transient=True),
        )

    settings = settings_of(name, workload)
    with_weights = [mode for mode in modes if "W4" in mode]
    if with_weights:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "offq"
            quantize(workload.model, out, settings)
            model, _ = load_simulated(out)
            config = Checkpoint(out).config
            bits = describe(Checkpoint(out))["bits_per_quantized_weight"]
        for mode in with_weights:
            set_mode(model, config, mode)
            yield mode, scored(model, mode), bits
    without = [mode for mode in modes if "W4" not in mode]
    if without:
        original = load_original(workload.model)
        config = plan(original.model.config, original.architecture, settings)
        tokens = calibration(workload)
        instrument(original.model, original.architecture)
        found = survey(original, tokens, 1, config, settings, no_progress)
        original.model.config.architectures = [original.architecture.name]
        with fused_model(original, found.rotations) as model:
            for mode in without:
                set_mode(model, config, mode)
                yield mode, scored(model, mode), 16


def calibration(workload: Workload) -> Tensor:
    """The tokens that every recipe is calibrated on, [samples, sequence length] int64."""
    original = load_original(workload.model)
    return calibration_tokens(
        workload.calibration,
        original.model,
        original.tokenizer,
        workload.samples,
        workload.sequence_length,
        Settings.seed,
        lambda steps=1: None,
    )
