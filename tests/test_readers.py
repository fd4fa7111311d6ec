"""Readers of load generators' results: what they compute from a sample is what the tool itself reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from servecast.sim.benchmark_report import benchmark_report, write_benchmark_report
from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.knee import saturation
from servecast.sim.metrics import samples
from servecast.sim.results import result
from servecast.sim.scenario import load
from servecast.sim.simulate import simulate
from servecast.validate.readers import READERS, Reading, read, read_all

SAMPLES = Path(__file__).parent / "samples"
FILES = sorted(
    file
    for file in SAMPLES.rglob("*")
    if file.suffix in (".json", ".jsonl", ".yaml") and file.name not in ("config.yaml",)
)


def agrees(reading: Reading, *, rel: float, keys: Callable[[str], bool] = lambda key: True) -> int:
    """How many of the tool's own figures were compared with those computed from its requests."""
    figures = reading.figures()
    compared = {key: value for key, value in reading.reported.items() if keys(key)}
    for key, value in compared.items():
        assert figures[key] == pytest.approx(value, rel=rel), key
    return len(compared)


def cut(path: Path, folder: Path, *, share: float) -> Path:
    text = path.read_text()
    short = folder / path.name
    short.write_text(text[: int(share * len(text))])
    return short


# vllm bench serve


@pytest.mark.parametrize(("version", "rel"), [("0.32", 1e-9), ("0.23", 1e-4)])
def test_vllm_figures_are_its_own(version: str, rel: float) -> None:
    """0.23 does not save the end-to-end latencies, and their sum differs from its own by a clock reading."""
    reading = read(SAMPLES / "vllm" / f"vllm-{version}.json")
    burst = ("max_output_tokens_per_s", "max_concurrent_requests")  # counted from times of tokens
    assert agrees(reading, rel=rel, keys=lambda key: key not in burst) > 30
    assert reading.figures()["duration"] == pytest.approx(reading.reported["duration"], rel=1e-9)
    assert reading.context.request_rate == 20
    assert reading.context.max_concurrency == 8
    assert reading.context.model == "tiny"
    assert reading.context.tool_version is None  # the file does not say
    requests = reading.run.requests
    assert len(requests) == 24
    assert requests["arrival"].isna().all() == (version == "0.23")
    assert requests["preemptions"].isna().all()
    figures = reading.figures()
    assert figures["num_preemptions"] is None
    assert figures["kv_cache_usage_peak"] is None
    assert figures["prefix_cache_hit_rate"] is None


def test_vllm_jsonl_is_a_run_a_line() -> None:
    readings = read_all(SAMPLES / "vllm" / "vllm-0.32.jsonl")
    assert [each.label for each in readings] == ["10 requests/s", "30 requests/s", "concurrency 4"]
    assert [each.has_requests for each in readings] == [True, True, False]
    assert readings[2].context.request_rate == math.inf
    assert readings[2].figures()["median_ttft_ms"] == readings[2].reported["median_ttft_ms"] > 0
    old = read_all(SAMPLES / "vllm" / "vllm-0.23.jsonl")
    assert [each.has_requests for each in old] == [False, False]
    assert not saturation(readings[0].run).saturated


def test_one_run_is_asked_of_a_file_with_several() -> None:
    with pytest.raises(InputError, match="has 3 runs \\(10 requests/s; 30 requests/s; concurrency 4\\)"):
        read(SAMPLES / "vllm" / "vllm-0.32.jsonl")


def vllm_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SAMPLES / "vllm" / "vllm-0.32.json").read_text())
    return document


def test_vllm_failed_requests_count_as_failed_and_in_no_latency(tmp_path: Path) -> None:
    document = vllm_document()
    for row in (3, 7):
        document["errors"][row] = "Traceback: server disconnected"
        document["ttfts"][row], document["itls"][row], document["output_lens"][row] = 0.0, [], 0
    document["completed"], document["failed"] = 22, 2
    file = tmp_path / "failed.json"
    file.write_text(json.dumps(document))
    reading = read(file)
    figures = reading.figures()
    assert (figures["completed"], figures["failed"]) == (22, 2)
    assert len(samples(reading.run, "ttft")[0]) == 22
    assert len(samples(reading.run, "itl")[0]) == 22 * 11
    assert reading.run.requests["sent"].notna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("ttfts"), "field 'ttfts' is missing"),
        (lambda d: d["ttfts"].pop(), "lists differ in length .*ttfts 23"),
        (lambda d: d.update(completed=20), "says 20 completed and lists 24"),
        (lambda d: d.update(duration="long"), "duration should be"),
    ],
)
def test_vllm_what_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    document = vllm_document()
    change(document)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"result of vllm bench serve, but .*{message}"):
        read(file)


# guidellm


def test_guidellm_figures_are_its_own() -> None:
    file = SAMPLES / "guidellm" / "benchmarks.json"
    raw = json.loads(file.read_text())["benchmarks"]
    readings = read_all(file)
    assert [each.context.request_rate for each in readings] == [10, 30]
    for reading, benchmark in zip(readings, raw, strict=True):
        assert reading.context.tool_version == "0.8.1"
        assert (
            agrees(reading, rel=1e-6, keys=lambda key: key in ("completed", "mean_ttft_ms", "std_ttft_ms"))
            == 3
        )
        until_end = reading.reported["duration"] - reading.figures()["duration"]
        assert 0 < until_end < 0.01  # from the last token to the end of its stream
        requests = benchmark["requests"]["successful"]
        assert sorted(samples(reading.run, "tpot")[0] * 1000) == pytest.approx(
            sorted(each["inter_token_latency_ms"] for each in requests), rel=1e-4
        )
        tail = [
            each["info"]["timings"]["request_end"] - each["info"]["timings"]["last_token_iteration"]
            for each in requests
        ]
        theirs = reading.reported["mean_e2el_ms"] - 1000 * float(np.mean(tail))
        assert reading.figures()["mean_e2el_ms"] == pytest.approx(theirs, rel=1e-4)
        assert reading.figures()["mean_itl_ms"] is None
        assert reading.planned
        assert (reading.run.requests["sent"] >= reading.run.requests["arrival"]).all()


def test_guidellm_sampled_requests_are_no_run(tmp_path: Path) -> None:
    document = json.loads((SAMPLES / "guidellm" / "benchmarks.json").read_text())
    document["benchmarks"] = document["benchmarks"][:1]
    document["benchmarks"][0]["requests"]["successful"] = document["benchmarks"][0]["requests"]["successful"][
        :3
    ]
    file = tmp_path / "sampled.json"
    file.write_text(json.dumps(document))
    reading = read(file)
    assert not reading.has_requests
    assert "only totals: the file holds 3 of 10 requests" in reading.notes


def test_guidellm_of_another_schema_is_refused(tmp_path: Path) -> None:
    document = json.loads((SAMPLES / "guidellm" / "benchmarks.json").read_text())
    document["metadata"]["version"] = 1
    file = tmp_path / "old.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="schema version 1 of guidellm, this servecast reads 2"):
        read_all(file)


# aiperf


def test_aiperf_figures_are_its_own(tmp_path: Path) -> None:
    file = SAMPLES / "aiperf" / "profile_export.jsonl"
    reading = read(file)
    other = ("request_throughput", "output_throughput")  # over a phase that begins before the first request
    assert agrees(reading, rel=1e-6, keys=lambda key: key not in other) == 28
    assert reading.context.tool_version == "0.13.0"
    assert reading.context.request_rate == 20
    alone = tmp_path / file.name
    alone.write_text(file.read_text())
    assert read(alone).reported == {}
    assert read(alone).context.model is None
    summary = read(file.with_name("profile_export_aiperf.json"))
    assert summary.reported == reading.reported
    assert not summary.has_requests


def test_aiperf_warm_up_is_left_out(tmp_path: Path) -> None:
    lines = (SAMPLES / "aiperf" / "profile_export.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["metadata"]["benchmark_phase"] = "warmup"
    file = tmp_path / "profile_export.jsonl"
    file.write_text("\n".join([json.dumps(first), *lines[1:]]))
    reading = read(file)
    assert len(reading.run.requests) == len(lines) - 1
    assert "1 warm-up requests left out" in reading.notes


# inference-perf


def test_inference_perf_figures_are_its_own() -> None:
    readings = read_all(SAMPLES / "inference_perf" / "0.7.0" / "per_request_lifecycle_metrics.json")
    assert [each.context.request_rate for each in readings] == [10, 20] or len(readings) == 2
    for reading in readings:
        assert (
            agrees(reading, rel=1e-9, keys=lambda key: key.endswith(("ttft_ms", "tpot_ms", "itl_ms"))) == 15
        )
        assert agrees(reading, rel=0.02, keys=lambda key: key.endswith(("throughput", "e2el_ms"))) == 8
        assert reading.figures()["mean_e2el_ms"] < reading.reported["mean_e2el_ms"]
        assert reading.context.model == "tiny"
        assert not any("halves" in note for note in reading.notes)


def test_halved_gaps_of_old_versions_are_put_right_and_said() -> None:
    folder = SAMPLES / "inference_perf" / "0.2.0"
    raw = json.loads((folder / "stage_0_lifecycle_metrics.json").read_text())["successes"]["latency"]
    requests = json.loads((folder / "per_request_lifecycle_metrics.json").read_text())
    reading = read_all(folder / "per_request_lifecycle_metrics.json")[0]
    # of each event and the empty line after it the first, without the end marker
    times = [each["info"]["output_token_times"][::2][:-1] for each in requests[: len(reading.run.requests)]]
    gaps = np.concatenate([np.diff(each) for each in times])
    figures = reading.figures()
    assert figures["mean_itl_ms"] == pytest.approx(1000 * gaps.mean(), rel=1e-9)
    assert figures["median_itl_ms"] == pytest.approx(1000 * float(np.median(gaps)), rel=1e-9)
    assert raw["inter_token_latency"]["median"] < 1e-3 < 0.5e-3 * figures["median_itl_ms"]
    assert 1.9 < figures["mean_tpot_ms"] / (1000 * raw["time_per_output_token"]["mean"]) < 2.2
    assert any("halves ITL and TPOT: put right" in note for note in reading.notes)
    assert figures["mean_ttft_ms"] == pytest.approx(1000 * raw["time_to_first_token"]["mean"], rel=1e-9)


def test_halved_totals_are_put_right_as_far_as_they_tell() -> None:
    folder = SAMPLES / "inference_perf" / "0.2.0"
    whole = read_all(folder / "per_request_lifecycle_metrics.json")
    for number, truth in enumerate(each.figures() for each in whole):
        stage = read(folder / f"stage_{number}_lifecycle_metrics.json")
        for key in ("mean_tpot_ms", "median_tpot_ms", "p95_tpot_ms", "mean_itl_ms"):
            assert stage.reported[key] == pytest.approx(truth[key], rel=0.002), key
        for key in ("median_itl_ms", "p90_itl_ms"):
            assert stage.reported[key] == pytest.approx(truth[key], rel=0.02), key
        assert "p95_itl_ms" not in stage.reported
        assert any("halves" in note for note in stage.notes)


def test_requests_without_stage_reports_are_one_run(tmp_path: Path) -> None:
    source = SAMPLES / "inference_perf" / "0.7.0" / "per_request_lifecycle_metrics.json"
    file = tmp_path / source.name
    file.write_text(source.read_text())
    reading = read(file)
    assert reading.label == "load not stated"
    assert any("all are one run" in note for note in reading.notes)
    assert len(reading.run.requests) == sum(len(each.run.requests) for each in read_all(source))


# llm-d benchmark reports


def test_a_report_says_what_the_stage_report_says() -> None:
    report = read(SAMPLES / "benchmark_report" / "inference-perf.partial.stage_0.yaml")
    stage = read(SAMPLES / "inference_perf" / "0.7.0" / "stage_0_lifecycle_metrics.json")
    shared = stage.reported.keys() & report.reported.keys()
    assert len(shared) > 20
    for key in shared:
        assert report.reported[key] == pytest.approx(stage.reported[key], rel=1e-9), key


def test_a_written_report_reads_back(tmp_path: Path) -> None:
    changes = {
        "sweep": None,
        "workload.arrivals": {"kind": "poisson", "request_rate": 5},
        "workload.num_requests": 60,
    }
    scenario = load("l4-qwen2.5-0.5b", changes)
    deployment = Deployment.of(scenario)
    run = simulate(scenario, deployment=deployment)
    document = result(scenario, deployment, run, what_if={}, ranks=(50, 90, 95, 99))
    file = tmp_path / "report.yaml"
    write_benchmark_report(file, run, document)
    reading = read(file)
    keys = [key for key in reading.reported if key not in ("kv_cache_usage_peak",)]
    assert len(keys) > 25
    for key in keys:
        assert reading.reported[key] == pytest.approx(document[key], rel=1e-9), key
    assert reading.context.model == document["model_id"]
    assert reading.context.request_rate == 5
    assert yaml.safe_load(file.read_text()) == benchmark_report(run, document)


def test_a_report_in_milliseconds_and_percent(tmp_path: Path) -> None:
    document = yaml.safe_load((SAMPLES / "benchmark_report" / "servecast.yaml").read_text())
    ours = read(SAMPLES / "benchmark_report" / "servecast.yaml")
    ttft = document["results"]["request_performance"]["aggregate"]["latency"]["time_to_first_token"]
    for name, value in ttft.items():
        ttft[name] = "ms" if name == "units" else 1000 * value
    usage = document["results"]["observability"]["components"][0]["aggregate"]["kv_cache_usage"]
    usage["units"], usage["max"] = "percent", 100 * usage["max"]
    file = tmp_path / "units.json"
    file.write_text(json.dumps(document))
    assert read(file).reported == pytest.approx(ours.reported)
    usage["units"] = "parsec"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="its unit 'parsec' is not one of"):
        read(file)


# files that cannot be read


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_sample_is_recognised(file: Path) -> None:
    for reading in read_all(file):
        assert reading.figures()["median_ttft_ms"] > 0
        assert reading.source.startswith(str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, file: Path) -> None:
    shares = (0.2, 0.6) if file.suffix == ".yaml" else (0.2, 0.6, 0.97)  # YAML may do without its end
    for share in shares:
        short = cut(file, tmp_path, share=share)
        with pytest.raises(InputError) as error:
            read_all(short)
        assert str(short) in error.value.where


def test_what_is_unknown_or_mixed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"hello": 1, "world": 2}')
    with pytest.raises(InputError, match=r"no known tool \(its fields are hello, world\)") as error:
        read(file)
    assert all(reader.name in error.value.fix for reader in READERS.values())
    file.write_text("")
    with pytest.raises(InputError, match="is empty"):
        read(file)
    file.write_text("not json at all")
    with pytest.raises(InputError, match="not valid JSON"):
        read(file)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "absent.json")
    vllm = (SAMPLES / "vllm" / "vllm-0.32.json").read_text().strip()
    aiperf = (SAMPLES / "aiperf" / "profile_export.jsonl").read_text().splitlines()[0]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(f"{vllm}\n{aiperf}\n")
    with pytest.raises(InputError, match="is aiperf, the lines before it vllm bench serve") as error:
        read_all(mixed)
    assert error.value.where.endswith("line 2")
