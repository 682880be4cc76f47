"""Reports: the schema, the files, the page, the comparison."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from sample_report import NOTHING_OPTIONAL, sample_report

from calibration.cli import main
from calibration.experts import LEAST_SHARE
from calibration.report import HTML_FILE, JSON_FILE, Report, read_report, size_kind, write_report
from calibration.report.page import report_page
from vllm_offq.errors import UserError

HOSTILE = "<script>alert(1)</script>\"'&$x^1$[red]\u202e\x1b"


@pytest.mark.parametrize("changes", [{}, NOTHING_OPTIONAL], ids=["full", "bare"])
def test_what_is_written_is_read_again(tmp_path: Path, changes: dict[str, None]) -> None:
    report = sample_report(**changes)
    write_report(report, tmp_path)
    assert read_report(tmp_path) == read_report(tmp_path / JSON_FILE) == report


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_report(sample_report(experts=2), tmp_path / name)
    for file in (JSON_FILE, HTML_FILE):
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    for changes in (
        {"seconds": value},
        {"signal_to_noise": {"mlp_input": [value]}},
        {"settings": {"ratios": [value]}},
    ):
        with pytest.raises(ValidationError, match="finite"):
            sample_report(**changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("{", "no report"),
        ("[]", "no report"),
        ('{"format_version": 2}', "upgrade vllm-offq"),
        ('{"format_version": 1}', "damaged, model: Field required"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(
    tmp_path: Path, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / JSON_FILE).write_text(text)
    with pytest.raises(UserError, match=says):
        read_report(tmp_path)


def test_sizes_count_every_kind_of_tensor() -> None:
    layer = "model.layers.0.self_attn"
    assert [
        size_kind(name)
        for name in (
            "model.embed_tokens.weight",
            "lm_head.weight_packed",
            f"{layer}.q_proj.weight_packed",
            f"{layer}.q_proj.weight_scale",
            f"{layer}.attn.key_rotation",
            "model.norm.weight",
            "model.layers.0.mlp.gate.weight",
            "vision_tower.ln_pre.weight",
        )
    ] == [
        "embedding",
        "head",
        "quantized weights",
        "weight scales",
        "key rotations",
        "norms",
        "other",
        "image encoder",
    ]


@pytest.mark.parametrize(
    "report",
    [
        sample_report(),
        sample_report(layers=80),
        sample_report(experts=4),
        sample_report(**NOTHING_OPTIONAL),
        sample_report(**NOTHING_OPTIONAL, signal_to_noise={}, output_error={}, sizes={}),
        sample_report(signal_to_noise={"mlp_input": [20.0, 20.0]}, output_error={"lm_head": 0.0}),
    ],
    ids=["tiny", "80 layers", "experts", "bare", "empty", "equal"],
)
def test_a_page_shows_what_the_report_has(report: Report) -> None:
    page = report_page(report)
    headings = {
        "How much noise": any(report.signal_to_noise.values()),
        "What happens to outliers": report.histograms is not None,
        "Where outliers point": report.spectrum is not None,
        "What rounding the weights costs": any("layers" in name for name in report.output_error),
        "How many tokens the experts were sent": report.expert_counts is not None,
    }
    for heading, expected in headings.items():
        assert (heading in page) is expected, heading
    for site, values in report.signal_to_noise.items():
        for layer, value in enumerate(values):  # every cell says its value to a pointer
            words = site.replace("_", " ").replace("mlp", "MLP")
            assert f"layer {layer}, {words}: {value:.2f} dB" in page
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert all(target in identifiers for target in re.findall(r'(?:href="|url\()#([\w-]+)', page))


def test_the_page_leads_with_what_a_newcomer_asks() -> None:
    errors = {"model.layers.0.mlp.up_proj": 0.01, "model.layers.1.mlp.down_proj": 0.09}
    noise = {"mlp_input": [30.0, 28.0], "mlp_output": [26.0, 12.0]}
    page = report_page(sample_report(output_error=errors, signal_to_noise=noise))
    lead = page[: page.index("<section>")]
    for words in (
        "4.00 times smaller",
        "MLP output of layer 1, with 12.0 dB",
        "9.0% for the worst, model.layers.1.mlp.down_proj",
    ):
        assert words in lead


def test_the_page_tells_what_experts_were_sent_from_what_they_saw() -> None:
    page = " ".join(report_page(sample_report(experts=2)).split())
    assert "was sent few tokens, on the axis none, was rounded mostly on others" in page
    assert f"fill up to one in {LEAST_SHARE} of all" in page
    assert "saw" not in page


@pytest.mark.parametrize(
    ("activation_bits", "kv_bits", "words"),
    [
        (
            "4",
            "4",
            "the weights and activations of its linear layers and its key-value cache now "
            "take 4 bits instead of 16 or more.",
        ),
        (
            "4",
            "16",
            "the weights and activations of its linear layers now take 4 bits instead of "
            "16 or more; its key-value cache stays as it was.",
        ),
        (
            "8",
            "4",
            "the weights of its linear layers and its key-value cache now take 4 bits, the "
            "activations 8, instead of 16 or more.",
        ),
        (
            "8",
            "16",
            "the weights of its linear layers now take 4 bits, the activations 8, instead "
            "of 16 or more; its key-value cache stays as it was.",
        ),
    ],
)
def test_the_page_says_what_takes_how_many_bits(
    activation_bits: str, kv_bits: str, words: str
) -> None:
    settings = {"activation_bits": activation_bits, "kv_bits": kv_bits}
    page = report_page(sample_report(settings=settings))
    assert words in page
    assert "16 levels" not in page


def test_one_clean_place_leaves_the_others_their_colours() -> None:
    noise = [21.0, 22.0, 23.0, 24.0, 25.0, 26.0]
    plain, with_clean = (
        report_page(sample_report(signal_to_noise={"mlp_output": values}))
        for values in (noise, [*noise, 60.0])
    )
    for page, words in ((plain, "26.0 dB, cleaner"), (with_clean, "dB and more, cleaner")):
        assert words in page
    # Its neighbours do not all look alike: the scale still ends near them.
    (end,) = set(re.findall(r">([\d.]+) dB and more", with_clean))
    assert 26 < float(end) < 35
    assert "layer 6, MLP output: 60.00 dB" in with_clean


def test_a_page_asks_nothing_of_the_network() -> None:
    page = report_page(sample_report(experts=2))
    assert re.findall(r"https?://[^\"'<\s]*", page) == ["https://arxiv.org/abs/2606.07116"]
    assert "<script" not in page
    assert re.search(r"(\bsrc=|@import|url\((?!#))", page) is None
    assert "default-src 'none'" in page


def test_names_are_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = sample_report(
        model=HOSTILE,
        settings={HOSTILE: HOSTILE},
        signal_to_noise={HOSTILE: [1.0, 2.0]},
        output_error={f"model.layers.0.{HOSTILE}": 0.1},
        expert_counts={f"model.layers.0.{HOSTILE}": [1, 2]},
    )
    (tmp_path / "a").mkdir()
    write_report(report, tmp_path / "a")
    page = (tmp_path / "a" / HTML_FILE).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not {"\u202e", "\x1b"} & set(page)
    assert re.search(r"<text[^>]*>[^<]*\$x\^1\$", page)  # no formula in the pictures either
    other = {"settings": {}, "output_error": {f"model.layers.0.{HOSTILE}": 0.2}}
    (tmp_path / "b.json").write_text(report.model_copy(update=other).model_dump_json())
    monkeypatch.chdir(tmp_path)
    output = compare(monkeypatch, capsys, "a", "b.json", "--html", "both.html")
    assert "<script" not in Path("both.html").read_text()
    assert "[red]" in output
    assert not {"\u202e", "\x1b"} & set(output)


def compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    monkeypatch.setattr(sys, "argv", ["offq", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    return capsys.readouterr().out


def test_compare_shows_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sample_report(), sample_report(seed=1, checkpoint_bytes=1_500_000)
    (tmp_path / "a").mkdir()  # a checkpoint's folder and a file do
    (tmp_path / "a" / JSON_FILE).write_text(first.model_dump_json())
    (tmp_path / "b.json").write_text(second.model_dump_json())
    monkeypatch.chdir(tmp_path)
    output = compare(monkeypatch, capsys, "a", "b.json", "--html", "both.html")
    most = max(
        first.output_error,
        key=lambda name: abs(second.output_error[name] - first.output_error[name]),
    )
    for words in ("seed", "+50.0%", "signal to noise, MLP output, worst", most):
        assert words in output
    assert "recipe" not in output  # they agree on it
    page = (tmp_path / "both.html").read_text()
    assert "\ufffd" not in page  # what stands for characters that are not shown
    for words in ("Settings that differ", "B less A", "+50.0%", most.replace(".", ".<wbr>")):
        assert words in page
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    content = json.loads(compare(monkeypatch, capsys, "a", "b.json", "--json"))
    assert content["settings"] == {"seed": [0, 1]}
    assert content["changed_most"][0]["name"] == most
    assert content["quantities"][0] == {
        "name": "checkpoint",
        "unit": "bytes",
        "before": 1_000_000,
        "after": 1_500_000,
    }


def test_compare_names_the_basis_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = sample_report()
    given = sample_report(basis_candidates=None, settings=chosen.settings | {"basis": "sink"})
    none = sample_report(**NOTHING_OPTIONAL)
    for name, report in (("chosen", chosen), ("given", given), ("none", none)):
        (tmp_path / f"{name}.json").write_text(report.model_dump_json())
    monkeypatch.chdir(tmp_path)
    for name, used in (("given.json", "sink"), ("none.json", "-")):
        found = json.loads(compare(monkeypatch, capsys, "chosen.json", name, "--json"))
        assert found["settings"]["basis used"] == ["top-1", used]


def test_compare_of_models_without_a_common_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = sample_report(**NOTHING_OPTIONAL, output_error={}, signal_to_noise={})
    for name, report in (("a.json", sample_report(layers=3, experts=2)), ("b.json", bare)):
        (tmp_path / name).write_text(report.model_dump_json())
    monkeypatch.chdir(tmp_path)
    output = compare(monkeypatch, capsys, "a.json", "b.json", "--html", "both.html")
    assert "Linears that only one of the two has: 18." in output
    page = (tmp_path / "both.html").read_text()
    assert "This report has none." in page
    assert "Linears that only one of the two has: 18." in page
