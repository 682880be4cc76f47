"""What was tried and is not built, beside what was chosen in its place.

    python -m benchmarks.tried MODEL --calibration TEXT --text TEXT

Other bases of the residual stream, by the trial that `--basis auto` makes; and keys without their
mean, which attention does not see, in a 4-bit cache. For models whose rotation can be fused.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from benchmarks.accuracy import prepare, workload_parser
from benchmarks.accuracy_recipes import OFFQ, Workload, calibration, set_mode
from benchmarks.machine import describe_machine
from benchmarks.scores import score
from calibration.basis import residual_candidates, try_candidates
from calibration.instrument import ATTENTION, attention_state, instrument, layers_of
from calibration.loader import Original, load_original
from calibration.plan import plan
from calibration.progress import no_progress
from calibration.settings import Basis, HeadBasis
from calibration.simulate import fused_model
from calibration.statistics import collect
from calibration.survey import survey
from vllm_offq.errors import UserError
from vllm_offq.metrics import Estimate
from vllm_offq.rotation import group_rotation, principal_basis

CENTRED = "offq-centred"
"""Name of the attention that subtracts a mean from keys."""
TOP = 8


def opened(workload: Workload) -> Original:
    """The instrumented original."""
    original = load_original(workload.model)
    instrument(original.model, original.architecture)
    return original


def other_bases(original: Original, tokens: Tensor, group_size: int) -> dict[str, Tensor]:
    """Rotations of the residual stream that no option makes, [n, n] float64 each."""
    model, architecture = original.model, original.architecture
    n = model.config.hidden_size
    top: dict[str, list[Tensor]] = {"top-8": [], "top-1, first tokens aside": []}
    normed_moments, raw_moments = torch.zeros(2, n, n, dtype=torch.float64)

    def observe(_: nn.Module, inputs: tuple[Tensor]) -> None:
        raw = inputs[0]
        normed = raw * raw.square().mean(-1, keepdim=True).rsqrt()
        peaks = normed.abs().amax(-1)
        later = 1 + peaks[:, 1:].argmax(-1, keepdim=True)
        for name, chosen in zip(top, (peaks.topk(TOP).indices, later), strict=True):
            top[name].append(normed.gather(1, chosen[..., None].expand(-1, -1, n)).flatten(0, 1))
        for moments, x in ((normed_moments, normed), (raw_moments, raw)):
            moments.add_((x.flatten(0, 1).T @ x.flatten(0, 1)).double())

    with original.loaded(""), torch.no_grad():
        for layer in layers_of(model, architecture):
            for site in architecture.reading:
                layer.get_submodule(str(site.norm)).register_forward_pre_hook(observe)
        for sequence in track(tokens, "other bases", transient=True):
            model.get_decoder()(sequence[None], use_cache=False)
    bases = {name: principal_basis(torch.cat(x), normed_moments) for name, x in top.items()}
    bases["all, layers by their size"] = principal_basis(torch.zeros(0, n), raw_moments)
    return {name: group_rotation(basis, group_size) for name, basis in bases.items()}


def try_bases(workload: Workload, tokens: Tensor) -> Table:
    """All bases in the trial, each alone on all inputs from the residual stream."""
    original = opened(workload)
    config = plan(original.model.config, original.architecture, OFFQ)
    grid = config.sites["attention_input"]
    if grid.fused_rotation != "principal":
        raise UserError(f"{workload.model} fuses no rotation; give a Llama, Mistral, Qwen or Phi")
    statistics = collect(original, tokens, 1, lambda: None)
    candidates = residual_candidates(statistics, grid.group_size)
    candidates |= other_bases(opened(workload), tokens, grid.group_size)
    table = Table(title="bases of the residual stream: 4-bit inputs of attention and MLP alone")
    for column in ("basis", "an option", "mean error", "worst error", "KL"):
        table.add_column(column, justify="right" if column[-1] in "rL" else "left")
    for tried in try_candidates(original, grid, candidates, tokens, lambda: None):
        table.add_row(
            tried.name,
            "yes" if tried.name in get_args(Basis) else "no",
            f"{tried.mean_error:.5f}",
            f"{tried.worst_error:.5f}",
            f"{tried.divergence:.4f}",
        )
    return table


def key_means(model: PreTrainedModel, original: Original, tokens: Tensor) -> list[Tensor]:
    """Of each layer, after RoPE and but for first tokens, [1, num_kv_heads, 1, D]."""
    layers = layers_of(model, original.architecture)
    sums: list[Any] = [0.0] * len(layers)
    for index, layer in enumerate(layers):

        def observe(key: Tensor, _: Tensor, index: int = index) -> None:
            sums[index] = sums[index] + key[:, :, 1:].double().sum((0, 2), keepdim=True)

        attention_state(layer, original.architecture).observe = observe
    with torch.no_grad():
        for sequence in track(tokens, "means of keys", transient=True):
            model(sequence[None])
    for layer in layers:
        attention_state(layer, original.architecture).observe = None
    return [(total / (tokens.numel() - len(tokens))).float() for total in sums]


def subtract(model: PreTrainedModel, means: list[Tensor]) -> None:
    """Take them from all keys. One shift of all keys of a head moves all its scores alike."""
    plain = AttentionInterface()[ATTENTION]

    def centred(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        return plain(module, query, key - means[module.layer_idx], *rest, **options)

    AttentionInterface.register(CENTRED, centred)
    AttentionMaskInterface.register(CENTRED, sdpa_mask)
    model.set_attn_implementation(CENTRED)


def cache_rows(workload: Workload, tokens: Tensor) -> Iterator[tuple[str, Estimate]]:
    """KL from the original where the 4-bit cache is all that is quantized."""
    for basis in get_args(HeadBasis):
        settings = replace(OFFQ, head_basis=basis)
        original = opened(workload)
        config = plan(original.model.config, original.architecture, settings)
        found = survey(original, tokens, 1, config, settings, no_progress)
        original.model.config.architectures = [original.architecture.name]
        with fused_model(original, found.rotations) as model:
            means = key_means(model, original, tokens)
            set_mode(model, config, "KV4")
            for name in (basis, f"{basis}, mean of keys removed"):
                scores = score(model, workload.windows, workload.references)
                yield name, Estimate.of(scores.kl)
                subtract(model, means)


def main() -> None:
    """The command line."""
    arguments = workload_parser((__doc__ or "").splitlines()[0]).parse_args()
    console = Console(width=120)
    try:
        with TemporaryDirectory() as folder:
            workload, _ = prepare(arguments, Path(folder))
            tokens = calibration(workload)
            console.print(try_bases(workload, tokens))
            table = Table(title="heads' bases: 4-bit cache alone")
            table.add_column("basis")
            table.add_column("KL", justify="right")
            for name, kl in cache_rows(workload, tokens):
                table.add_row(name, f"{kl.value:.4f} \u00b1 {kl.standard_error or 0:.4f}")
            console.print(table)
    except UserError as error:
        sys.exit(f"benchmarks.tried: {error}")
    console.print(describe_machine())


if __name__ == "__main__":
    main()
