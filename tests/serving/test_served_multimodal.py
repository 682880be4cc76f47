"""Multimodal classes through vLLM's own: answers about text and about an image.

See test_served_architectures.py for why most values are equal to 1e-4, and not all.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_multimodal import MODELS, make_tiny_multimodal, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

from calibration.pipeline import quantize
from calibration.settings import Settings
from calibration.simulate import load_simulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("torchvision") is None,
        reason="vLLM cannot import these classes without torchvision",
    ),
]

EXACT = 1e-4
PROMPTS = [[(31 * i + 13 * j) % 370 + 2 for j in range(10)] for i in range(12)]
SCRIPT = Path(__file__).with_name("serve_with_images.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/model and NAME/offq."""
    path = tmp_path_factory.mktemp("multimodal")
    for name in MODELS:
        make_tiny_multimodal(path / name / "model", name)
        settings = Settings(samples=4, sequence_length=64, dtype="float32", embedding_bits="8")
        quantize(str(path / name / "model"), path / name / "offq", settings)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[str, Any]:
    prompts, answers = folder / "prompts.json", folder / "answers.json"
    prompts.write_text(json.dumps(PROMPTS))
    checkpoints = [f"{name}={folder / name / 'offq'}" for name in MODELS]
    folders = [*map(str, SCRIPT.parents[1:3]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, SCRIPT, prompts, answers, *checkpoints],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    )
    return json.loads(answers.read_text())


@torch.no_grad()
def errors(model: PreTrainedModel, answer: dict[str, Any], **image: Tensor) -> Tensor:
    """Of the log-probabilities of every token from the second on."""
    tokens = torch.tensor([answer["prompt"] + answer["tokens"]])
    if "token_type_ids" in image:
        new = torch.zeros(1, len(answer["tokens"]), dtype=torch.int64)
        image["token_type_ids"] = torch.cat([image["token_type_ids"], new], 1)
    logprobs = model(tokens, **image).logits[0, :-1].log_softmax(-1)
    return (torch.tensor(answer["logprobs"]) - logprobs.gather(1, tokens[0, 1:, None])[:, 0]).abs()


@pytest.mark.parametrize("name", MODELS)
def test_answers_to_text_are_those_of_transformers(
    name: str, folder: Path, served: dict[str, Any]
) -> None:
    model, _ = load_simulated(folder / name / "offq")
    found = torch.stack([errors(model, answer) for answer in served[name][: len(PROMPTS)]])
    assert found.median() < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_answers_about_an_image_are_those_of_transformers(
    name: str, folder: Path, served: dict[str, Any]
) -> None:
    """And not those about the same prompt without one."""
    model, _ = load_simulated(folder / name / "offq")
    found, without = [], []
    for seed, answer in enumerate(served[name][len(PROMPTS) :]):
        inputs = tiny_inputs(folder / name / "offq", name, seed)
        assert answer["prompt"] == inputs.pop("input_ids")[0].tolist()
        del inputs["attention_mask"]
        found.append(errors(model, answer, **inputs))
        without.append(errors(model, answer))
    assert torch.cat(found).median() < EXACT
    assert torch.stack(without).amax(1).min() > 100 * EXACT
