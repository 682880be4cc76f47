"""Tiny random models of the multimodal classes, processor included, as folders."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tiny_models import FAMILIES, SIZES, WINDOW, initialise, make_tiny_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PixtralImageProcessorPil,
)

SIDE, PATCH = 32, 8
IMAGE_TOKENS = (SIDE // PATCH // 2) ** 2
"""Of one image, in Gemma 3; no more than its WINDOW."""
assert IMAGE_TOKENS <= WINDOW
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
LLAVA = {"projector_hidden_act": "gelu", "vision_feature_layer": -2}
GRIDS = [[SIDE, SIDE]]
"""Of tiles of an image, in LLaVA-NeXT; with the whole image, no more tokens than a step takes."""
PIXTRAL = {"model_type": "pixtral", "head_dim": 32, "hidden_act": "silu"}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3": (
        "Gemma3",
        "Gemma3",
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        {"mm_tokens_per_image": IMAGE_TOKENS},
    ),
    "Llava": ("Llava", "Llama", {"model_type": "clip_vision_model"}, LLAVA),
    "LlavaQwen2": ("Llava", "Qwen2", {"model_type": "clip_vision_model"}, LLAVA),
    "LlavaNext": (
        "LlavaNext",
        "Mistral",
        {"model_type": "clip_vision_model"},
        LLAVA | {"image_grid_pinpoints": GRIDS},
    ),
    "Mistral3": (
        "Mistral3",
        "Mistral",
        PIXTRAL,
        LLAVA | {"vision_feature_layer": -1, "spatial_merge_size": 2},
    ),
}
"""By name: prefix of the class, family of the language model, what differs in the configuration of
the vision tower, and of the whole."""
PROMPT = "Every model {image} answers the same question in its own words"
IMAGES = 4
"""How many a test asks about, one after the other."""
PLACEHOLDERS = {"Gemma3": "<start_of_image>", "Mistral3": "[IMG]"} | dict.fromkeys(
    ("Llava", "LlavaQwen2", "LlavaNext"), "<image>"
)
SPECIAL_TOKENS = {
    "Gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "Mistral3": {
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    },
}


def make_tiny_multimodal(path: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random float32 model of one of MODELS under path. Returns: path."""
    torch.manual_seed(seed)
    prefix, family, vision, values = MODELS[name]
    config_class, text = FAMILIES.get(family, (family, {}))
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text_config = getattr(transformers, f"{config_class}Config")(
        **SIZES | tokens | text | {"rms_norm_eps": 1e-5}
    )
    image_token = _save_processor(path, name)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text_config.to_dict(),
        vision_config=VISION | vision,
        image_token_index=image_token,
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype="float32",
        **values | changes,
    )
    model = AutoModelForImageTextToText.from_config(config)
    initialise(model.model.language_model)
    if not text_config.tie_word_embeddings:
        model.lm_head.weight.data.normal_(0, 0.2)
    for parameter_name, parameter in model.model.multi_modal_projector.named_parameters():
        if "norm" not in parameter_name:
            parameter.data.normal_(0, 0.3)
    if name == "LlavaNext":
        model.model.image_newline.data.normal_(0, 0.3)
    model.save_pretrained(path)
    return path


def tiny_image(seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def tiny_inputs(path: Path, name: str, seed: int = 0) -> BatchFeature:
    """PROMPT around an image, prepared for transformers."""
    text = PROMPT.format(image=PLACEHOLDERS[name])
    if name != "Mistral3":
        processor = transformers.AutoProcessor.from_pretrained(path)
        return processor(images=[tiny_image(seed)], text=text, return_tensors="pt")
    # Its processor needs torchvision, the model does not.
    rows = SIDE // PATCH // 2
    text = text.replace("[IMG]", "[IMG_BREAK]".join(["[IMG]" * rows] * rows) + "[IMG_END]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    images = transformers.AutoImageProcessor.from_pretrained(path)
    return BatchFeature(
        tokenizer(text, return_tensors="pt") | images([tiny_image(seed)], return_tensors="pt")
    )


def _save_processor(path: Path, name: str) -> int:
    """Returns: the placeholder of a token of an image."""
    sizes = {"height": SIDE, "width": SIDE}
    tokens = SPECIAL_TOKENS.get(name, {"image_token": "<image>"})
    tokenizer = make_tiny_tokenizer(extra_special_tokens=tokens)
    if name == "Gemma3":
        tokenizer.add_tokens(["\n" * count for count in range(1, 5)])
        images = Gemma3ImageProcessorPil(size=sizes, image_seq_length=IMAGE_TOKENS)
        Gemma3Processor(images, tokenizer, image_seq_length=IMAGE_TOKENS).save_pretrained(path)
    elif "Llava" in name:
        edges: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": sizes}
        tiled = LlavaNextImageProcessorPil(image_grid_pinpoints=GRIDS, **edges)
        images, processor_class = (
            (tiled, LlavaNextProcessor)
            if name == "LlavaNext"
            else (CLIPImageProcessorPil(**edges), LlavaProcessor)
        )
        processor = processor_class(
            images,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        processor.save_pretrained(path)
    else:
        tokenizer.save_pretrained(path)
        images = PixtralImageProcessorPil(size={"longest_edge": SIDE}, patch_size=PATCH)
        images.save_pretrained(path)
        values = {"processor_class": "PixtralProcessor", "patch_size": PATCH}
        content = json.dumps(values | {"spatial_merge_size": 2} | tokens)
        (path / "processor_config.json").write_text(content)
    return tokenizer.convert_tokens_to_ids(tokens["image_token"])
