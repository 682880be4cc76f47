"""As serve_in_turn.py, for multimodal checkpoints: prompts of tokens, and then some with an image.

Usage: python serve_with_images.py PROMPTS.json ANSWERS.json NAME=CHECKPOINT...
NAME is one of tiny_multimodal.MODELS; the last answers are those about images.
"""

import json
import os
import sys
from pathlib import Path

from serve_in_turn import answers
from tiny_multimodal import IMAGES, PLACEHOLDERS, PROMPT, tiny_image
from vllm_server import ENVIRONMENT

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(Path(sys.argv[1]).read_text())]
    found = {}
    for argument in sys.argv[3:]:
        name, checkpoint = argument.split("=")
        text = PROMPT.format(image=PLACEHOLDERS[name])
        about_images = [
            {"prompt": text, "multi_modal_data": {"image": tiny_image(seed)}}
            for seed in range(IMAGES)
        ]
        found[name] = answers(checkpoint, [*prompts, *about_images], disable_chunked_mm_input=True)
    Path(sys.argv[2]).write_text(json.dumps(found))
