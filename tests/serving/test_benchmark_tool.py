"""`python -m serving.benchmark`: its loads, what it reads of a server, and a whole run."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serving import benchmark, gauges
from serving.benchmark import Measured, parser, sweep, tabulate
from serving.benchmark_plot import plot
from serving.load import Load
from serving.server import Server, ServerError

METRICS = """\
# HELP vllm:num_preemptions_total Cumulative number of preemptions.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="a b"} 3.0
vllm:num_preemptions_total{engine="1",model_name="a b"} 4.0
vllm:num_preemptions_created{engine="0",model_name="a b"} 1.7e+09
vllm:kv_cache_usage_perc{engine="0",model_name="a b"} 0.25
up 1.0
"""


def test_metrics_are_summed_over_engines() -> None:
    assert gauges.read(METRICS, "vllm:num_preemptions_total") == 7
    assert gauges.read(METRICS, "vllm:kv_cache_usage_perc") == 0.25
    assert gauges.read(METRICS, "up") == 1
    assert gauges.read(METRICS, "vllm:num_preemptions") == 0


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.filterwarnings("error")  # an exception in the thread that looks on
def test_a_server_that_dies_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "PERIOD", 0.01)
    server = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ServerError, match=f"{url} has no /metrics"), gauges.watch(url) as seen:
        server.shutdown()
        server.server_close()
        time.sleep(0.1)
    assert seen.kv_cache_peak == 0.25


def test_every_load_has_prompts_of_its_own() -> None:
    words = ["offq", "--against", "original", "--output", "folder", "--concurrency", "1", "8"]
    words += ["--input-lengths", "128", "1024", "--shared-prefix", "64", "--requests", "2"]
    loads = sweep(parser().parse_args(words))
    assert len(loads) == len({load.seed for load in loads}) == 8
    kinds = {(load.shared_prefix, load.input_len, load.streams, load.requests) for load in loads}
    assert kinds == {
        (prefix, length, streams, 2 * streams)
        for prefix in (0, 64)
        for length in (128, 1024)
        for streams in (1, 8)
    }


def measured(model: str, streams: int, speed: float, prefix: int = 0) -> Measured:
    load = Load(16, 8, streams, 3 * streams, shared_prefix=prefix)
    return Measured(model, load, speed, 2 * speed, 50, 90, 5, 9, 0.1, 0, 0.5)


def test_table_and_picture_hold_every_load(tmp_path: Path) -> None:
    found = {
        model: [
            measured(model, streams, factor * streams, prefix)
            for prefix in (0, 32)
            for streams in (1, 8)
        ]
        for model, factor in (("original", 10.0), ("OffQ", 25.0))
    }
    table = tabulate(*found.values())
    assert table.row_count == 4 * 3
    assert list(table.columns[2].cells)[:3] == ["10.0", "25.0", "2.50"]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_short_replies_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, method in (("offq", "offq"), ("original", None)):
        (tmp_path / name).mkdir()
        config = {"quantization_config": {"quant_method": method} if method else None}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    words = [str(tmp_path / "offq"), "--against", str(tmp_path / "original"), "--output", "x"]
    with pytest.raises(SystemExit) as ending:
        benchmark.main([*words, "--output-length", "1"])
    assert ending.value.code == 2
    assert "--output-length must be 2 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_run(
    float32_server: Server, original: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """One server plays both parts: what is tried is the way from the load to the picture."""
    words = [str(checkpoint), "--against", str(original), "--output", str(tmp_path / "out")]
    words += ["--server-url", float32_server.url, "--against-url", float32_server.url]
    words += ["--concurrency", "4", "--input-lengths", "32", "--output-length", "4"]
    words += ["--shared-prefix", "64", "--requests", "2"]
    benchmark.main(words)
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [one["model"] for one in results] == ["original"] * 2 + ["OffQ"] * 2
    assert all(one["output_tokens_per_second"] > 0 for one in results)
    assert all(one["ttft_p99_ms"] >= one["ttft_median_ms"] > 0 for one in results)
    assert results[1]["prefix_cache_hits"] > 0.3  # 64 of 96 tokens are shared by 8 requests
    # Not 0: of a vocabulary as small as this, random prompts may be the same by chance.
    assert results[0]["prefix_cache_hits"] < results[1]["prefix_cache_hits"] - 0.2
    assert (tmp_path / "out/benchmark.png").exists()


@pytest.mark.slow
def test_what_was_measured_outlasts_a_second_server_that_fails(
    float32_server: Server,
    original: Path,
    no_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(no_model), "--against", str(original), "--output", str(tmp_path)]
    words += ["--against-url", float32_server.url, "--concurrency", "1", "--requests", "1"]
    with pytest.raises(SystemExit) as ending:
        benchmark.main([*words, "--input-lengths", "32", "--output-length", "4"])
    assert ending.value.code == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("benchmark: vllm serve ended with exit code 1 (")
    assert "1 x 32 in, 4 out" in said.out
    (kept,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert kept["model"] == "original"
    assert kept["output_tokens_per_second"] > 0
