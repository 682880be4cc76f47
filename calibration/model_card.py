"""README.md of a checkpoint, with the metadata that Hugging Face reads."""

from dataclasses import asdict

from huggingface_hub import ModelCardData

from calibration.settings import Settings
from vllm_offq.format import CheckpointConfig
from vllm_offq.wrappers import REST


def model_card(name: str, config: CheckpointConfig, settings: Settings) -> str:
    """The card's text. name: of the original, a hub id where it came from the hub."""
    cached, sees_images = config.kv_cache is not None, REST[0] in config.ignore
    bits = config.sites["attention_input"].bits
    metadata = ModelCardData(
        base_model=name if "/" in name else None,
        base_model_relation="quantized",
        library_name="vllm",
        pipeline_tag="image-text-to-text" if sees_images else "text-generation",
        tags=["offq", "4-bit", f"w4a{bits}", "vllm"],
    )
    activations = "weights and activations" if bits == 4 else f"weights, {bits}-bit activations"
    parts = f"4-bit {activations}"
    ends = {"embedding": config.embedding, "head": config.head}
    parts += "".join(
        f", {'an 8' if end.bits == 8 else 'a 4'}-bit {part}"
        for part, end in ends.items()
        if end is not None
    )
    parts += " and a 4-bit KV cache" if cached else ""
    shown = asdict(settings) | {"calibration": ", ".join(settings.calibration)}
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    return f"""---
{metadata.to_yaml()}
---

# {name}, OffQ W4A{bits}{"KV4" if cached else ""}

{name} with {parts}, made by
{config.produced_by}. Serve it where the plugin `vllm-offq` is installed beside vLLM:

    vllm serve FOLDER

## How it was made

| setting | value |
|---|---|
{rows}
| settings, SHA-256 | {config.settings_sha256} |
"""
