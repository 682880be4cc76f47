"""`python -m serving.evaluate`: what it calculates, what it refuses, and a whole run."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from vllm_server import ENVIRONMENT

from serving import scores
from serving.contenders import contenders
from serving.endpoint import Endpoint
from serving.evaluate import main, tabulate
from serving.paired import disagreement
from serving.scores import Score, TaskScores, compare
from serving.server import Server
from serving.tasks import local
from vllm_offq.errors import UserError

ROOT = Path(__file__).parents[2]


def scored(answers: list[float], perplexity: float, hashes: str = "abcd") -> dict[str, TaskScores]:
    mean = sum(answers) / len(answers)
    logs = tuple(-math.log(perplexity) + step for step in (0.1, -0.1, 0.2, -0.2))
    metrics = {
        "acc": Score(mean, 0.25, True, tuple(answers)),
        "perplexity": Score(perplexity, None, False, None),
        scores.LOGLIKELIHOOD: Score(sum(logs) / 4, None, True, logs),
    }
    return {"task": TaskScores(tuple(hashes), metrics)}


def test_rows_compare_both_models() -> None:
    accuracy, perplexity, loglikelihood = compare(
        scored([1, 1, 1, 0], 10), scored([1, 0, 1, 0], 16)
    )
    assert accuracy.recovery_percent == pytest.approx(100 * 2 / 3)
    assert accuracy.paired == disagreement([1, 1, 1, 0], [1, 0, 1, 0])
    assert accuracy.original_standard_error == 0.25
    assert perplexity.recovery_percent == pytest.approx(100 * 10 / 16)
    assert perplexity.paired is None
    assert loglikelihood.recovery_percent is None
    assert loglikelihood.original_standard_error is not None
    assert isinstance(loglikelihood.paired, scores.MeanDifference)
    assert loglikelihood.paired.mean == pytest.approx(math.log(10 / 16))
    assert tabulate([accuracy, perplexity, loglikelihood]).row_count == 3


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(UserError, match="changed"):
        compare(scored([1, 1, 1, 0], 10), scored([1, 1, 1, 0], 10, "abce"))


def test_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"Line {number} of a text.\n" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    pieces = local.read_text(str(tmp_path), "text.txt")["test"]["text"]
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(local.PIECE <= len(piece) < local.PIECE + 30 for piece in pieces[:-1])


def test_lines_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text('{"question": "\u2028"}\n\nnot JSON\n')
    with pytest.raises(UserError, match=r"arc_easy\.jsonl, line 3 is no JSON"):
        local.read_jsonl(str(tmp_path), "arc_easy.jsonl")


def model(folder: Path, method: str | None) -> Path:
    folder.mkdir()
    quantization = {"quant_method": method} if method else None
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Folders that pass for an OffQ checkpoint and its original."""
    return model(tmp_path / "offq", "offq"), model(tmp_path / "original", None)


def refuse(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one sentence that the command ends with."""
    with pytest.raises(SystemExit) as ending:
        main([str(word) for word in words])
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_missing_model_is_refused(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    offq, original = models
    assert "no config.json" in refuse(capsys, "none", "--against", original, "--tasks", "x")
    said = refuse(capsys, original, "--against", original, "--tasks", "x")
    assert "no OffQ checkpoint" in said
    assert "itself" in refuse(capsys, offq, "--against", offq, "--tasks", "x")


def test_models_are_named_and_ordered(models: tuple[Path, Path]) -> None:
    offq, original = models
    arguments = argparse.Namespace(
        offq_model=offq,
        against=original,
        config=ROOT / "serving/cpu.yaml",
        server_url="http://a",
        against_url=None,
    )
    first, second = contenders(arguments)
    assert (first.name, first.model, first.url) == ("original", original, None)
    assert (second.name, second.model, second.url) == ("OffQ", offq, "http://a")


@pytest.mark.slow  # lm-evaluation-harness reads thousands of task files
def test_unknown_task_and_data_out_of_reach_are_refused(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    offq, original = models
    said = refuse(capsys, offq, "--against", original, "--tasks", "lambada_openia")
    assert "no task lambada_openia" in said
    assert "lambada_openai" in said
    # The tests are offline.
    said = refuse(capsys, offq, "--against", original, "--tasks", "arc_easy")
    assert "data of arc_easy cannot be had" in said


def test_missing_data_is_refused(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    offq, original = models
    words = (offq, "--against", original, "--tasks", "arc_easy")
    assert "arc_easy.jsonl does not exist" in refuse(capsys, *words, "--data-folder", tmp_path)


def test_server_that_does_not_answer_is_refused(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    offq, original = models
    write_data(tmp_path)
    words = (offq, "--against", original, "--tasks", "local_text", "--data-folder", tmp_path)
    said = refuse(capsys, *words, "--against-url", "http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in said


def write_data(folder: Path, documents: int = 12) -> None:
    """Data of the kind that serving/tasks/ reads."""
    questions = [
        {
            "question": f"What is the number after {number}?",
            "choices": {"text": ["a fox", str(number + 1), "the moon"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
        for number in range(documents)
    ]
    lines = "\n".join(json.dumps(question) for question in questions)
    (folder / "arc_easy.jsonl").write_text(lines)
    texts = [f"The quick brown fox jumps over the lazy dog {n} times." for n in range(documents)]
    (folder / "lambada_openai.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (folder / "text.txt").write_text("In 1969 three people flew to the moon.\n" * 120)


@pytest.mark.slow
def test_both_models_are_evaluated(original: Path, checkpoint: Path, tmp_path: Path) -> None:
    """With servers that the command starts, one after the other, and ends."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    pytest.importorskip("tenacity", reason="lm-evaluation-harness's API client needs it")
    write_data(tmp_path)
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "serving.evaluate", checkpoint, "--against", original]
    command += ["--tasks", "arc_easy", "lambada_openai", "local_text", "--limit", "10"]
    command += ["--data-folder", tmp_path, "--output", output]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert "arc_easy (10)" in said
    found = json.loads(output.read_text())
    rows = {(row["task"], row["metric"]): row for row in found["results"]}
    assert rows.keys() >= {
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("arc_easy", "log-likelihood"),
        ("lambada_openai", "acc"),
        ("lambada_openai", "perplexity"),
        ("local_text", "word_perplexity"),
    }
    assert all(row["documents"] in (3, 10) for row in found["results"])
    # The checkpoint is close to its original, but not the original served twice.
    loss = rows["lambada_openai", "log-likelihood"]["paired"]
    assert 0 < abs(loss["mean"]) < 1
    bits = rows["local_text", "bits_per_byte"]
    assert bits["offq"] == pytest.approx(bits["original"], rel=0.2)


@pytest.mark.slow
def test_scores_outlast_a_second_server_that_fails(
    float32_server: Server,
    original: Path,
    no_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = (no_model, "--against", original, "--against-url", float32_server.url)
    words += ("--tasks", "lambada_openai", "--limit", 2, "--data-folder", tmp_path)
    with pytest.raises(SystemExit) as ending:
        main([str(word) for word in (*words, "--output", "results.json")])
    assert ending.value.code == 2
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].startswith("evaluate: vllm serve ended with exit code")
    assert "lambada_openai (2)" in said.out
    rows = json.loads(Path("results.json").read_text())["results"]
    assert {row["metric"] for row in rows} >= {"acc", "perplexity"}
    assert all(row["original"] is not None and row["offq"] is None for row in rows)


WRITING = """
task: writing
custom_dataset: !function local.read_jsonl
dataset_kwargs: {file: lambada_openai.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "fox"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_text_is_generated_through_the_chat_api(
    float32_server: Server, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from serving import harness

    write_data(tmp_path)
    shutil.copy(local.__file__, tmp_path / "local.py")
    (tmp_path / "writing.yaml").write_text(WRITING)
    monkeypatch.setattr(harness, "LOCAL_TASKS", tmp_path)
    tasks = harness.Tasks.load(["writing"], tmp_path)
    assert (tasks.scored, tasks.generated) == ((), ("writing",))
    endpoint = Endpoint.connect(float32_server.url)
    before = chat_requests(float32_server)
    found = harness.evaluate(endpoint, checkpoint, tasks, 3, 2, 8)["writing"]
    assert found.metrics["exact_match"].of_documents == (0, 0, 0)
    assert scores.LOGLIKELIHOOD not in found.metrics
    assert chat_requests(float32_server) - before == 3


def chat_requests(server: Server) -> int:
    return server.log.read_text(errors="replace").count("POST /v1/chat/completions")


@pytest.mark.slow
def test_ctrl_c_leaves_no_server(original: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_data(tmp_path)
    command = [sys.executable, "-m", "serving.evaluate", checkpoint, "--against", original]
    command += ["--tasks", "arc_easy", "--data-folder", tmp_path]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    # Tests may run in the background of a script, which ignores Ctrl-C, and children inherit that.
    command = ["env", "--default-signal=INT", *command]
    tool = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "build/evaluate/original.log"
    deadline = time.monotonic() + 300
    while not log.exists() or "Initializing" not in log.read_text(errors="replace"):
        assert tool.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    servers = psutil.Process(tool.pid).children(recursive=True)
    assert servers
    tool.send_signal(signal.SIGINT)
    assert tool.wait(60) == 130
    _, left = psutil.wait_procs(servers, timeout=10)
    assert not [server for server in left if server.status() != psutil.STATUS_ZOMBIE]
