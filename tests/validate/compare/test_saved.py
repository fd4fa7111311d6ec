"""``servecast validate result``: each format is read, predicted, compared and judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import SAMPLES
from small_scenarios import open_loop, scenario_file

from servecast.__main__ import main
from servecast.sim.metrics.metrics import latencies
from servecast.sim.metrics.records import Run
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import load
from servecast.validate.compare.saved import requests_of
from servecast.validate.readers import read

POOL = {
    "engine": {"version": "0.32", "num_gpu_blocks_override": 4000},
    "workload": open_loop(20, 150, 200, 40),
}
ONLY_TPOT = """
rows: {median_tpot_ms: {relative: 0.6}}
min_requests: 1
max_length_difference: 1000.0
client_lag_ms: 1000.0
"""
FORMATS = {  # and what it has of each of its loads
    "vllm/vllm-0.32.json": ("requests",),
    "vllm/vllm-0.23.json": ("requests",),
    "vllm/vllm-0.32.jsonl": ("requests", "requests", "totals"),
    "vllm/vllm-0.23.jsonl": ("totals", "totals"),
    "guidellm/benchmarks.json": ("requests", "requests"),
    "aiperf/profile_export.jsonl": ("requests",),
    "aiperf/profile_export_aiperf.json": ("totals",),
    "inference_perf/0.7.0/per_request_lifecycle_metrics.json": ("requests", "requests"),
    "inference_perf/0.2.0/per_request_lifecycle_metrics.json": ("requests", "requests"),
    "inference_perf/0.2.0/stage_1_lifecycle_metrics.json": ("totals",),
    "benchmark_report/servecast.yaml": ("totals",),
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(scenario_file(tmp_path, **POOL))


def saved(run: Run, path: Path, *, slower: float = 1.0, requests: int | None = None, **load_of: Any) -> Path:
    """A simulated run as vllm bench serve would have saved it; slower: what latencies are multiplied by."""
    done = run.requests.sort_values("sent", kind="stable").iloc[:requests]
    seconds = latencies(done)
    e2el = slower * seconds["e2el"].to_numpy()
    ttft = slower * seconds["ttft"].to_numpy()
    tokens = done["output_tokens"].to_numpy()
    sent = done["sent"].to_numpy() + 1000.0
    duration = float((sent + e2el).max()) - 1000.0
    document = {
        "date": "20270101-000000",
        "backend": "openai",
        "model_id": "tiny",
        "num_prompts": len(done),
        "request_rate": 20.0,
        "burstiness": 1.0,
        "max_concurrency": None,
        **load_of,
        "duration": duration,
        "completed": len(done),
        "failed": 0,
        "request_throughput": len(done) / duration,
        "output_throughput": float(tokens.sum()) / duration,
        "input_lens": done["prompt_tokens"].tolist(),
        "output_lens": tokens.tolist(),
        "ttfts": ttft.tolist(),
        "itls": [
            [(whole - first) / (n - 1)] * (n - 1) for whole, first, n in zip(e2el, ttft, tokens, strict=True)
        ],
        "latencies": e2el.tolist(),
        "start_times": sent.tolist(),
        "queue_times": [0.0] * len(done),
        "errors": [""] * len(done),
    }
    path.write_text(json.dumps(document))
    return path


def judged(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["validate", "result", *arguments, "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    document: dict[str, Any] = json.loads(captured.out)
    return code, document


# verdicts


def test_a_right_prediction_passes(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(simulate(load(tiny), seed=7), tmp_path / "bench.json")
    code, document = judged(capsys, str(file), "--scenario", tiny, "--seeds", "3")
    assert (code, document["verdict"], document["reasons"]) == (0, "pass", [])
    rows = {row["metric"]: row for row in document["loads"][0]["rows"]}
    assert rows["median_tpot_ms"]["state"] == "pass"
    assert rows["median_tpot_ms"]["predicted"] == pytest.approx(rows["median_tpot_ms"]["measured"], rel=0.03)
    assert document["prediction"]["scenario"] == "tiny"
    assert document["facts"]["model measured"] == "tiny"


def test_a_wrong_prediction_fails_with_its_numbers(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(simulate(load(tiny), seed=7), tmp_path / "bench.json", slower=1.5)
    report = tmp_path / "report.html"
    assert main(["validate", "result", str(file), "--scenario", tiny, "--report", str(report)]) == 1
    text = capsys.readouterr().out
    assert "verdict: fail" in text
    assert "20 requests/s: median_tpot_ms: predicted" in text
    assert "(-33" in text
    assert f"written: {report}" in text
    page = report.read_text()
    assert "fail" in page
    assert "<svg" in page


def test_too_little_data_is_inconclusive(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(simulate(load(tiny), seed=7), tmp_path / "bench.json", requests=12)
    code, document = judged(capsys, str(file), "--scenario", tiny)
    assert (code, document["verdict"]) == (3, "inconclusive")
    assert "12 requests finished, at least 20 are needed" in document["reasons"][0]


def test_own_tolerances_decide(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(simulate(load(tiny), seed=7), tmp_path / "bench.json", slower=1.5)
    limits = tmp_path / "t.yaml"
    limits.write_text("rows:\n  median_e2el_ms: {relative: 0.6}\n")
    code, document = judged(capsys, str(file), "--scenario", tiny, "--tolerances", str(limits))
    assert (code, document["verdict"]) == (0, "pass")
    assert document["facts"]["tolerances"] == "t.yaml"


# which traffic


def test_the_very_requests_are_simulated(tiny: str, tmp_path: Path) -> None:
    run = simulate(
        load(tiny, {"workload.output_tokens": {"kind": "uniform", "tokens": 30, "range_ratio": 0.9}}), seed=7
    )
    reading = read(saved(run, tmp_path / "bench.json"))
    trace, bound = requests_of(reading)
    done = run.requests.sort_values("sent", kind="stable")
    assert bound is None
    assert trace.output_tokens.tolist() == done["output_tokens"].tolist()
    assert trace.prompt_tokens.tolist() == done["prompt_tokens"].tolist()
    assert np.diff(trace.times_s) == pytest.approx(np.diff(done["sent"].to_numpy()), abs=1e-9)


def test_a_closed_loop_is_simulated_as_one(tiny: str, tmp_path: Path) -> None:
    law = {"kind": "closed_loop", "concurrency": 4}
    run = simulate(load(tiny, {"workload.arrivals": law}), seed=7)
    file = saved(run, tmp_path / "bench.json", request_rate="inf", max_concurrency=4)
    trace, bound = requests_of(read(file))
    assert bound == 4
    assert not trace.times_s.any()


def test_the_scenarios_traffic_takes_the_files_load(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = {"kind": "closed_loop", "concurrency": 4}
    run = simulate(load(tiny, {"workload.arrivals": law}), seed=7)
    file = saved(run, tmp_path / "bench.json", request_rate="inf", max_concurrency=4)
    code, document = judged(capsys, str(file), "--scenario", tiny, "--traffic", "scenario", "--seeds", "2")
    assert (code, document["loads"][0]["load"]) == (0, "concurrency 4")
    other = simulate(load(tiny, {"workload.output_tokens": 80}), seed=7)
    file = saved(other, tmp_path / "other.json")
    code, document = judged(capsys, str(file), "--scenario", tiny, "--traffic", "scenario", "--seeds", "2")
    assert code == 3
    assert "another traffic: outputs of 40.0 tokens predicted, 80.0 measured" in document["reasons"][0]


# formats and bad input


@pytest.mark.parametrize(("name", "kinds"), FORMATS.items())
def test_every_format_is_judged(
    name: str, kinds: tuple[str, ...], tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples' server took about as long a token as a model of 0.5B, and a tenth of one of 7B."""
    slow = scenario_file(tmp_path, **POOL, name="slow", model={"config": "Qwen2.5-7B-Instruct"})
    limits = tmp_path / "tolerances.yaml"
    limits.write_text(ONLY_TPOT)
    for scenario, exit_code, verdict in ((tiny, 0, "pass"), (str(slow), 1, "fail")):
        code, document = judged(
            capsys, str(SAMPLES / name), "--scenario", scenario, "--seeds", "2", "--tolerances", str(limits)
        )
        assert (code, document["verdict"]) == (exit_code, verdict)
        assert len(document["loads"]) == len(kinds)
        for each, kind in zip(document["loads"], kinds, strict=True):
            rows = {row["metric"]: row for row in each["rows"]}
            assert rows["median_ttft_ms"]["measured"] > 0
            assert rows["median_ttft_ms"]["predicted"] > 0
            assert (rows["median_ttft_ms"]["measured_interval"][0] is not None) == (kind == "requests")
            assert math.isfinite(rows["median_ttft_ms"]["error"])


def test_bad_input_has_one_message(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(SAMPLES / "vllm" / "vllm-0.32.json")
    absent = str(tmp_path / "absent.json")
    for arguments, message in (
        ([absent, "--scenario", tiny], "absent.json: cannot be read"),
        ([good, "--scenario", "no-such"], "there is no scenario 'no-such'"),
        ([good, "--scenario", tiny, "--tolerances", absent], "absent.json: cannot be read"),
        ([good, "--scenario", tiny, "--seeds", "0"], "--seeds: 0 seeds"),
        ([good, "--scenario", tiny, "--traffic", "trace"], "trace"),
        (
            [str(SAMPLES / "vllm" / "vllm-0.23.jsonl"), "--scenario", tiny, "--traffic", "requests"],
            "has no requests to simulate again",
        ),
        (
            [
                str(SAMPLES / "benchmark_report" / "inference-perf.partial.stage_0.yaml"),
                "--scenario",
                "l4-qwen2.5-0.5b",
            ],
            "does not say under which load it ran",
        ),
    ):
        assert main(["validate", "result", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def changed(tmp_path: Path, **changes: Any) -> Path:
    """vLLM's sample, changed."""
    document = json.loads((SAMPLES / "vllm" / "vllm-0.32.json").read_text()) | changes
    file = tmp_path / "changed.json"
    file.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency should be greater than or equal to 1, not 0"),
        ({"duration": 0}, "duration should be greater than 0, not 0"),
        ({"input_lens": [0] * 24}, "a request has 0 prompt_tokens"),
        ({"errors": ["refused"] * 24, "completed": 0}, "none of its requests finished"),
        ({"itls": "gone", "completed": 0}, "none of its requests finished"),
        ({"itls": "gone", "completed": 10**18}, "says that 1e+18 requests were sent"),
        ({"itls": "gone", "request_rate": 1e-9}, "24 requests at 1e-09 requests/s take 2.778e+05 days"),
        ({"input_lens": [40_000] * 24}, "request 0 (stage 'all', stream 'requests') of 40000 prompt tokens"),
    ],
)
def test_a_result_that_cannot_be_judged_is_named(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    file = changed(tmp_path, **changes)
    assert main(["validate", "result", str(file), "--scenario", tiny]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"servecast: {file}")
    assert message in error
    assert error.count("\n") == 1


def test_single_tokens_have_no_time_between_them(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    zeros = {f"{name}_{metric}_ms": 0.0 for metric in ("tpot", "itl") for name in names}
    totals = {"itls": "gone", "total_output_tokens": 24, "output_throughput": 17.0}
    file = changed(tmp_path, **zeros, **totals)
    _, document = judged(capsys, str(file), "--scenario", tiny, "--seeds", "1")
    metrics = [row["metric"] for row in document["loads"][0]["rows"]]
    assert "median_ttft_ms" in metrics
    assert not [each for each in metrics if each.endswith(("_tpot_ms", "_itl_ms"))]


def test_a_ramp_is_replayed_as_it_came(tmp_path: Path) -> None:
    """Its bound does not make it a closed loop."""
    ramp = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 20}
    file = changed(tmp_path, request_rate="inf", **ramp)
    trace, bound = requests_of(read(file))
    assert bound == 8
    assert trace.times_s[-1] > 1


def totals(path: Path, **stated: Any) -> Path:
    """Totals of vllm bench serve: 150 requests at 20 requests/s, with a first token after a second."""
    document = {
        "num_prompts": 150, "request_rate": 20.0, "max_concurrency": None, "duration": 8.0, "completed": 150,
        "failed": 0, "total_input_tokens": 30_000, "total_output_tokens": 6_000, "request_throughput": 18.75,
        "output_throughput": 750.0, "mean_ttft_ms": 1000.0, "median_ttft_ms": 1000.0, "p95_ttft_ms": 1000.0,
    }  # fmt: skip
    path.write_text(json.dumps(document | stated))
    return path


def predicted(capsys: pytest.CaptureFixture[str], file: Path, scenario: str) -> tuple[list[float], list[str]]:
    """What is predicted of a file's TTFT, and the notes."""
    _, document = judged(capsys, str(file), "--scenario", scenario, "--seeds", "2")
    (load_,) = document["loads"]
    rows = [row["predicted"] for row in load_["rows"] if row["metric"].endswith("_ttft_ms")]
    assert len(rows) == 3
    return rows, load_["notes"]


@pytest.mark.parametrize("burstiness", [50.0, 0.1, "inf"])
def test_the_arrivals_that_a_file_states_are_sent(
    burstiness: float | str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the scenario predicts them when it is written with these arrivals itself."""
    shape = float(burstiness)
    file = totals(tmp_path / "result.json", burstiness=shape if math.isfinite(shape) else math.inf)
    law = {"kind": "vllm_bench", "request_rate": 20, "burstiness": shape}
    workload = POOL["workload"] | {"arrivals": law}
    (tmp_path / "written").mkdir()
    written = str(scenario_file(tmp_path / "written", **POOL | {"workload": workload}))
    stated, notes = predicted(capsys, file, tiny)
    assert stated == predicted(capsys, file, written)[0]
    assert any("arrivals as the file states them" in note for note in notes)
    poisson, notes = predicted(capsys, totals(tmp_path / "poisson.json", burstiness=1.0), tiny)
    assert stated != poisson
    assert not any("arrivals as the file states them" in note for note in notes)


def test_a_bad_verdict_on_ttft_says_what_it_is_made_of(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, notes = predicted(capsys, totals(tmp_path / "result.json"), tiny)
    assert any(note.startswith("TTFT p95, ms as predicted is ") and "to change it:" in note for note in notes)
