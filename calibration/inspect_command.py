"""`offq inspect`: what a checkpoint holds, what it weighs, how it was made, whether it is sound."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_offq.errors import UserError

if TYPE_CHECKING:
    from vllm_offq.format import CheckpointConfig


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `offq quantize` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what is in a checkpoint and whether it is valid (exit code 2 if not)."""
    from vllm_offq.checkpoint import Checkpoint, validate_checkpoint  # torch is slow to import

    content = describe(Checkpoint(checkpoint))
    problem: UserError | None = None
    try:
        validate_checkpoint(checkpoint)
    except UserError as error:
        problem = error
    if as_json:
        validation = {"valid": problem is None, "problem": problem and str(problem)}
        print(json.dumps(content | validation, indent=2))
    else:
        _print(content, problem)
    if problem is not None:
        raise problem


def describe(checkpoint: Any) -> dict[str, Any]:
    """Sizes and settings of a vllm_offq.checkpoint.Checkpoint, from its headers alone."""
    tensors: dict[str, dict[str, int]] = {}
    for name in checkpoint.names:
        kind, bits = _kind(name, checkpoint.config)
        entry = tensors.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        count = math.prod(checkpoint.shape(name))
        num_bytes = count * checkpoint.dtype(name).itemsize
        entry["tensors"] += 1
        entry["parameters"] += count if bits is None else 8 * num_bytes // bits
        entry["bytes"] += num_bytes
    quantized = tensors.get("quantized weights", {"parameters": 0, "bytes": 0})
    scales = tensors.get("weight scales", {"bytes": 0})
    bits_per_weight = 8 * (quantized["bytes"] + scales["bytes"]) / max(quantized["parameters"], 1)
    files = [path.stat().st_size for path in checkpoint.path.iterdir() if path.is_file()]
    return {
        "path": str(checkpoint.path),
        "architecture": checkpoint.model_config.get("architectures"),
        "tensors": tensors,
        "bytes": sum(entry["bytes"] for entry in tensors.values()),
        "bytes_on_disk": sum(files),
        "shards": len(checkpoint.shard_names),
        "bits_per_quantized_weight": bits_per_weight,
        "quantization_config": checkpoint.config.model_dump(),
    }


def _kind(name: str, config: "CheckpointConfig") -> tuple[str, int | None]:
    """What a tensor counts as, and the bits of the codes that it holds, if it holds some."""
    from vllm_offq.architectures import HEAD
    from vllm_offq.format import KEY_ROTATION, WEIGHT_PACKED, WEIGHT_SCALE
    from vllm_offq.wrappers import PREFIX, is_rest

    module, _, last = name.rpartition(".")
    if is_rest(name):
        return "image encoder", None
    if "norm" in name:
        return "norms and biases", None
    if "layers" in name:
        if last == WEIGHT_PACKED:
            return "quantized weights", config.weights.bits
        kinds = {WEIGHT_SCALE: "weight scales", KEY_ROTATION: "key rotations"}
        other = "linears, 16 bit" if config.is_ignored(module) else "norms and biases"
        return kinds.get(last, other), None
    if last == WEIGHT_SCALE:
        return "scales of embedding and head", None
    is_head = name.removeprefix(PREFIX).startswith(HEAD)
    end = config.head if is_head else config.embedding
    if last != WEIGHT_PACKED or end is None:
        return "embedding and head", None
    return f"{'head' if is_head else 'embedding'}, {end.bits} bit", end.bits


def _print(content: dict[str, Any], problem: UserError | None) -> None:
    from calibration.report.words import printable
    from vllm_offq.wrappers import class_name

    console = Console(markup=False, emoji=False)  # names may hold brackets and colons
    config = content["quantization_config"]
    model_class = class_name({"architectures": content["architecture"]}) or "?"
    sizes = Table(title=printable(f"{content['path']} ({model_class})"))
    sizes.add_column("kind")
    for column in ("tensors", "parameters", "MB"):
        sizes.add_column(column, justify="right")
    for kind, entry in content["tensors"].items():
        megabytes = f"{entry['bytes'] / 1e6:.2f}"
        sizes.add_row(kind, str(entry["tensors"]), f"{entry['parameters']:,}", megabytes)
    sizes.add_section()
    total = sum(entry["tensors"] for entry in content["tensors"].values())
    sizes.add_row("all", str(total), "", f"{content['bytes'] / 1e6:.2f}")
    console.print(sizes)

    sites = Table(title="inputs of the linears")
    for column in ("site", "linears", "grid", "rotation"):
        sites.add_column(column)
    for name, site in config["sites"].items():
        kind = "symmetric" if site["symmetric"] else "asymmetric"
        rotation = [f"{site['fused_rotation']}, fused"] if site["fused_rotation"] != "none" else []
        if site["online_hadamard"]:
            rotation.append(f"Hadamard {site['online_hadamard']}, online")
        sites.add_row(
            printable(name),
            "\n".join(map(printable, site["modules"])),
            f"{site['bits']} bits, {kind}\ngroups of {site['group_size']}\n"
            f"clip ratio {site['clip_ratio']:g}",
            "\n".join(rotation) or "none",
        )
    console.print(sites)

    settings = Table(show_header=False)
    settings.add_column()
    settings.add_column(overflow="fold")
    weights, cache = config["weights"], config["kv_cache"]
    scale_of = f"group of {weights['group_size']}" if weights["group_size"] else "channel"
    settings.add_row("recipe", printable(config["recipe"]))
    settings.add_row(
        "weights",
        f"{content['bits_per_quantized_weight']:.3f} bits each, one scale per {scale_of} included",
    )
    settings.add_row(
        "KV cache",
        f"{cache['bits']} bits, groups of {cache['group_size']}, keys "
        + ("rotated" if cache["key_rotation"] else "not rotated")
        if cache
        else "vLLM's own",
    )
    if head := config["head"]:
        groups = f"input of 8 in groups of {head['group_size']}"
        settings.add_row("head", f"{head['bits']} bits, {groups}")
    sixteen = [*config["ignore"], *([] if config["embedding"] else ["embedding"]), "norms"]
    settings.add_row("16 bit", printable(", ".join(sixteen)))
    made_by = printable(config["produced_by"])
    settings.add_row("format", f"version {config['format_version']}, {made_by}")
    settings.add_row("settings, SHA-256", config["settings_sha256"])
    settings.add_row(
        "on disk",
        f"{content['bytes_on_disk'] / 1e6:.2f} MB, tensors in {content['shards']} file(s)",
    )
    verdict = Text("failed", "red") if problem else Text("passed", "green")
    settings.add_row("validation", verdict)
    console.print(settings)
