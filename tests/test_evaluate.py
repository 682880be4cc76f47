"""The figures of `offq eval`: their arithmetic on synthetic models, then through an engine."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_tokenizer
from typer.testing import CliRunner

from calibration.cli import app
from vllm_offq.errors import UserError
from vllm_offq.evaluate import cut_windows, evaluate, prompt_start, read_text
from vllm_offq.metrics import Estimate, WindowScores, compare


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def top(logprobs: np.ndarray, k: int) -> WindowScores:
    """What an engine would return, ties in any order."""
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k].astype(np.int32)
    return WindowScores(
        logprobs[:, 0].astype(np.float32),
        ids,
        np.take_along_axis(logprobs, ids, -1).astype(np.float32),
    )


def two_models(tokens: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = 3 * generator.standard_normal((tokens, vocabulary))
    noise = generator.standard_normal((tokens, vocabulary))
    return log_softmax(logits), log_softmax(logits + noise)


def true_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@given(tokens=st.integers(1, 6), vocabulary=st.sampled_from([2, 50, 300]), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_kl_is_exact_at_full_k(tokens: int, vocabulary: int, seed: int) -> None:
    p, q = two_models(tokens, vocabulary, seed)
    comparison = compare(top(p, vocabulary), top(q, vocabulary), vocabulary)
    assert comparison.kl_divergence == pytest.approx(true_kl(p, q), rel=1e-4, abs=1e-6)
    assert comparison.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    assert comparison.unseen_mass == 0


def test_kl_grows_with_k_and_never_exceeds_the_truth() -> None:
    p, q = two_models(200, 1000)
    bounds = [compare(top(p, k), top(q, k), 1000) for k in (1, 4, 16, 64, 256, 1000)]
    divergences = [bound.kl_divergence for bound in bounds]
    assert divergences == sorted(divergences)
    assert divergences[-1] == pytest.approx(true_kl(p, q), rel=1e-4)
    assert divergences[-2] > 0.9 * divergences[-1]
    assert divergences[0] >= 0
    masses = [bound.unseen_mass for bound in bounds]
    assert masses == sorted(masses, reverse=True)


def test_a_model_does_not_diverge_from_itself() -> None:
    p, _ = two_models(20, 100)
    for k in (1, 10, 100):
        comparison = compare(top(p, k), top(p, k), 100)
        assert comparison.kl_divergence == pytest.approx(0, abs=1e-9)
        assert comparison.top1_agreement == 1


def test_what_neither_top_holds_counts_as_one_outcome() -> None:
    others = np.ones(9) / 9
    p, q = (np.log(np.concatenate([[x], (1 - x) * others]))[None] for x in (0.9, 0.5))
    comparison = compare(top(p, 1), top(q, 1), 10)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert comparison.kl_divergence == pytest.approx(expected, rel=1e-5)
    assert comparison.unseen_mass == pytest.approx(0.1, rel=1e-5)


def test_disjoint_tops_compare_only_the_rest() -> None:
    likely, unlikely = math.log(0.98), math.log(0.01)
    p = np.array([[likely, unlikely, unlikely]])
    q = np.array([[unlikely, likely, unlikely]])
    comparison = compare(top(p, 1), top(q, 1), 3)
    assert comparison.kl_divergence == pytest.approx(0, abs=1e-6)
    assert comparison.unseen_mass == pytest.approx(1)
    assert comparison.top1_agreement == 0


def test_a_model_that_rules_out_what_is_likely_is_infinitely_far() -> None:
    p = np.log(np.array([[0.5, 0.5]]))
    q = np.array([[0.0, -np.inf]])
    assert compare(top(p, 2), top(q, 2), 2).kl_divergence == math.inf
    assert compare(top(q, 2), top(p, 2), 2).kl_divergence == pytest.approx(math.log(2))


def test_standard_error_is_over_windows() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert Estimate.of([5.0]) == Estimate(5.0, None)
    perplexity = Estimate(math.log(20), 0.1).exp()
    assert perplexity == Estimate(pytest.approx(20), pytest.approx(2.0))


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert cut_windows([], list(range(10)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows([], list(range(10)), 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert cut_windows([], list(range(10)), 3, max_tokens=7) == [[0, 1, 2], [3, 4, 5]]


def test_every_window_begins_as_a_prompt_does() -> None:
    tokenizer = make_tiny_tokenizer()
    assert prompt_start(tokenizer) == []
    tokenizer.add_bos_token = True
    assert prompt_start(tokenizer) == [tokenizer.bos_token_id]
    assert cut_windows([7], list(range(5)), 3) == [[7, 0, 1], [7, 2, 3]]


def test_a_text_shorter_than_a_window() -> None:
    with pytest.raises(UserError, match="3 tokens, fewer than one window of 8"):
        cut_windows([], [1, 2, 3], 8)
    with pytest.raises(UserError, match="20 tokens of which 7 may be used, fewer than one window"):
        cut_windows([], list(range(20)), 8, max_tokens=7)


def test_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt cannot be read: No such file"):
        read_text(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_eval_refuses_a_broken_checkpoint_before_it_starts_an_engine(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "offq"}}')
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "--text", f"{tmp_path}/text.txt"])
    assert isinstance(result.exception, UserError)
    assert "format_version is missing" in str(result.exception)


def test_models_that_cannot_be_compared(tmp_path: Path) -> None:
    few, many = str(tmp_path / "few"), str(tmp_path / "many")
    make_tiny_tokenizer(270).save_pretrained(few)
    make_tiny_tokenizer(400).save_pretrained(many)
    with pytest.raises(UserError, match=f"{few} and {many} tokenize the text differently"):
        evaluate([few], "The quick brown fox jumps over the lazy dog. " * 9, against=many)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"\./absent does not exist"):
        evaluate(["./absent"], "text")


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_number_of_tokens_that_is_none(tokens: int) -> None:
    with pytest.raises(UserError, match=f"^--max-tokens must be positive, not {tokens}"):
        evaluate(["model"], "text", max_tokens=tokens)


def test_eval_looks_where_to_write_before_it_starts_an_engine(tmp_path: Path) -> None:
    arguments = ["eval", "model", "--text", "text.txt", "--json", f"{tmp_path}/absent/figures.json"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "absent/figures.json does not exist" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path)])
    assert str(result.exception) == f"{tmp_path} is a folder; give --json a file's name"
