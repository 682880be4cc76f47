"""lm-evaluation-harness against a running server: what a model scores, document by document."""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from serving.endpoint import Endpoint
from serving.scores import LOGLIKELIHOOD, Score, TaskScores
from vllm_offq.errors import UserError

LOCAL_TASKS = Path(__file__).with_name("tasks")
BOOTSTRAP = 1000  # draws, for the standard errors of metrics that have no formula
TIMEOUT = 3600  # seconds of a request: on few cores, long prompts wait for others


@dataclass(frozen=True)
class Tasks:
    """Tasks that are known and whose data is there, by how they are asked."""

    manager: Any
    scored: tuple[str, ...]
    """By log-likelihoods, through the completions API."""
    generated: tuple[str, ...]
    """By text that the model writes, through the chat API."""

    @classmethod
    def load(cls, names: Sequence[str], data_folder: Path | None) -> "Tasks":
        """Find tasks by name; with a data folder, those of serving/tasks/ read their data there.

        Raises: UserError if a task is unknown, or its data neither there nor to be had.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
        if data_folder is None:
            manager = TaskManager()
        else:
            local = {file.stem for file in LOCAL_TASKS.glob("*.yaml")}
            manager = TaskManager(
                include_path=LOCAL_TASKS,
                include_defaults=not local.issuperset(names),  # reading them all takes seconds
                metadata={"data_folder": str(data_folder.resolve())},
            )
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                advice = f"; did you mean {' or '.join(near)}?" if near else ""
                raise UserError(f"lm-evaluation-harness knows no task {name}{advice}")
        generated = [name for name in names if _generates(manager, name)]
        scored = [name for name in names if name not in generated]
        return cls(manager, tuple(scored), tuple(generated))


def evaluate(
    endpoint: Endpoint,
    tokenizer: Path,
    tasks: Tasks,
    limit: int | None,
    concurrent: int,
    batch_size: int,
) -> dict[str, TaskScores]:
    """Score a served model on tasks.

    limit: only the first documents of each. concurrent: requests that are on their way at once;
    batch_size: prompts of each request.
    """
    encoder = AutoTokenizer.from_pretrained(tokenizer)
    api = {
        "model": endpoint.model,
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "max_length": endpoint.max_model_len,
        "num_concurrent": concurrent,
        "timeout": TIMEOUT,
        # What the tokenizer puts before every text in training belongs there in tests, too.
        "add_bos_token": bool(encoder("").input_ids),
    }
    completions = api | {
        "base_url": f"{endpoint.url}/v1/completions",
        "tokenized_requests": True,  # text would be cut into tokens elsewhere than its parts are
    }
    chat = api | {
        "base_url": f"{endpoint.url}/v1/chat/completions",
        "tokenized_requests": False,
    }
    found: dict[str, TaskScores] = {}
    if tasks.scored:
        found |= _run("local-completions", completions, tasks.scored, tasks, limit, batch_size)
    if tasks.generated and encoder.chat_template:
        found |= _run("local-chat-completions", chat, tasks.generated, tasks, limit, 1)
    elif tasks.generated:
        found |= _run("local-completions", completions, tasks.generated, tasks, limit, 1)
    return found


def _generates(manager: Any, name: str) -> bool:
    try:
        loaded = manager.load([name])["tasks"].values()
    except OSError as error:  # that of a dataset which does not exist is one, too
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the data of {name} cannot be had ({reason}); it comes from the Hugging Face hub, "
            "or for the tasks in serving/tasks/ from --data-folder"
        ) from error
    return any(task.OUTPUT_TYPE == "generate_until" for task in loaded)


def _run(
    api: str,
    arguments: dict[str, Any],
    names: Sequence[str],
    tasks: Tasks,
    limit: int | None,
    batch_size: int,
) -> dict[str, TaskScores]:
    # Draws of the bootstrap in this process: those that are forked from one with threads may wait
    # for ever, and these are few.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # says that it bootstraps
            results = simple_evaluate(
                model=api,
                model_args=arguments,
                batch_size=batch_size,
                tasks=list(names),
                task_manager=tasks.manager,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=api == "local-chat-completions",
            )
    except (aiohttp.ClientError, requests.RequestException) as error:
        raise UserError(f"the server at {arguments['base_url']} failed: {error}") from error
    return {
        name: _scores(
            metrics, results["higher_is_better"].get(name, {}), results["samples"].get(name, [])
        )
        for name, metrics in results["results"].items()
    }


def _scores(
    metrics: dict[str, Any], higher_is_better: dict[str, bool], samples: list[dict[str, Any]]
) -> TaskScores:
    """From what lm-evaluation-harness says about one task."""
    filters = {name.partition(",")[2] for name in metrics if "," in name}
    scores = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        values = [sample[metric] for sample in samples if sample["filter"] == filtered]
        is_number = bool(values) and all(isinstance(value, int | float) for value in values)
        scores[metric if len(filters) == 1 else f"{metric}, {filtered}"] = Score(
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) else None,
            higher_is_better=higher_is_better.get(metric) is not False,
            of_documents=tuple(map(float, values)) if is_number else None,
        )
    once = list(_first_filter(samples))
    loglikelihoods = [_loglikelihood(sample) for sample in once]
    known = [value for value in loglikelihoods if value is not None]
    if known and len(known) == len(once):
        scores[LOGLIKELIHOOD] = Score(sum(known) / len(known), None, True, tuple(known))
    return TaskScores(tuple(sample["doc_hash"] for sample in once), scores)


def _first_filter(samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every document once: there is one sample of it for each filter of its answers."""
    return (sample for sample in samples if sample["filter"] == samples[0]["filter"])


def _loglikelihood(sample: dict[str, Any]) -> float | None:
    """Of a document's right answer, in nats; None where the task asks for no log-likelihood."""
    answers, target = sample["filtered_resps"], sample["target"]
    if len(answers) == 1:  # a target to predict, or a whole text
        answer = answers[0]
    elif isinstance(target, int) and target < len(answers):
        answer = answers[target]
    else:
        return None
    if isinstance(answer, tuple | list):
        answer = answer[0]
    return answer if isinstance(answer, float) else None
