"""Readers of load generators' results: what they compute from a sample is what the tool itself reported, and
what cannot be is refused."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from places import SAMPLES

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import samples, summary
from servecast.sim.metrics.saturation import saturation
from servecast.sim.run.benchmark_report import benchmark_report, write_benchmark_report
from servecast.sim.run.results import result
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load
from servecast.validate.readers import READERS, Reading, read, read_all

FILES = sorted(
    file
    for file in SAMPLES.rglob("*")
    if file.suffix in (".json", ".jsonl", ".yaml") and file.name not in ("config.yaml",)
)


Change = Callable[[Any], object]


def agrees(reading: Reading, *, rel: float, keys: Callable[[str], bool] = lambda key: True) -> int:
    """How many of the tool's own figures were compared with those computed from its requests."""
    figures = summary(reading.run, ranks=(50, 75, 90, 95, 99, 99.9))
    for metric in ("ttft", "tpot", "itl", "e2el"):
        values = samples(reading.run, metric)[0] * 1000
        if len(values):
            figures |= {f"min_{metric}_ms": values.min(), f"max_{metric}_ms": values.max()}
    compared = {key: value for key, value in reading.reported.items() if keys(key)}
    for key, value in compared.items():
        assert figures[key] == pytest.approx(value, rel=rel), key
    return len(compared)


def changed(sample: str, folder: Path, *changes: Change) -> Path:
    """A copy of a JSON sample, changed; what lies beside it stays away."""
    document = json.loads((SAMPLES / sample).read_text())
    for change in changes:
        change(document)
    file = folder / Path(sample).name
    file.write_text(json.dumps(document))
    return file


def put(value: object, *path: str | int) -> Change:
    """Sets what lies at a path."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


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
        (put(20, "completed"), "says 20 completed and lists 24"),
        (put("long", "duration"), "duration should be"),
        (put(0, "duration"), "duration should be greater than 0"),
        (put(-1.0, "duration"), "duration should be greater than 0"),
        (put(math.nan, "duration"), "duration should be a finite number"),
        (put(1e9, "duration"), "it took 1.157e\\+04 days"),
        (put(0, "max_concurrency"), "max_concurrency should be greater than or equal to 1"),
        (put(0, "request_rate"), "request_rate should be greater than 0"),
        (put([1.0], "mean_ttft_ms"), "mean_ttft_ms should be a number"),
        (put("fast", "mean_ttft_ms"), "mean_ttft_ms should be"),
        (put([1], "fleet_load"), "fleet_load should be a mapping"),
        (put(math.nan, "start_times", 3), "start_times should be a finite number"),
        (put(math.inf, "latencies", 3), "latencies should be a finite number"),
        (put(-1.0, "latencies", 3), "sending, first and last token are at"),
        (put(1e-5, "latencies", 3), "sending, first and last token are at"),
        (put(1e11, "latencies", 3), "it took 1.157e\\+06 days"),
        (put(-1.0, "itls", 3, 0), "a gap between tokens is -1 s"),
        (put(-4, "output_lens", 3), "a request has -4 output_tokens"),
        (put(0, "output_lens", 3), "a request has 0 output_tokens"),
        (put(2.5, "output_lens", 3), "a request has 2.5 output_tokens"),
        (put(1e30, "output_lens", 3), r"a request has 1e\+30 output_tokens"),
        (put(10**400, "output_lens", 3), "output_lens should be a number"),
        (put(-3, "input_lens", 3), "a request has -3 prompt_tokens"),
        (put(0, "input_lens", 3), "a request has 0 prompt_tokens"),
    ],
)
def test_vllm_what_cannot_be_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    file = changed("vllm/vllm-0.32.json", tmp_path, change)
    with pytest.raises(InputError, match=f"result of vllm bench serve, but .*{message}") as error:
        read(file)
    assert error.value.where.startswith(str(file))


def all_failed(document: dict[str, Any]) -> None:
    count = len(document["errors"])
    document |= {"completed": 0, "failed": count, "errors": ["refused"] * count, "itls": [[]] * count}
    document |= {key: [0.0] * count for key in ("ttfts", "latencies", "output_lens")}
    document |= {key: 0.0 for key in document if key.endswith(("_ms", "throughput"))}


def test_vllm_zeros_of_no_sample_are_no_latencies(tmp_path: Path) -> None:
    """numpy's mean of nothing, as vLLM takes it, is 0."""
    single: dict[str, Any] = {key: 0.0 for key in vllm_document() if key.endswith(("_tpot_ms", "_itl_ms"))}
    single["total_output_tokens"] = 24
    reported = read(changed("vllm/vllm-0.32.json", tmp_path, lambda d: d.update(single))).reported
    assert reported["mean_ttft_ms"] > 0
    assert not any(key.endswith(("_tpot_ms", "_itl_ms")) for key in reported)
    single["total_output_tokens"] = 48
    reported = read(changed("vllm/vllm-0.32.json", tmp_path, lambda d: d.update(single))).reported
    assert reported["mean_tpot_ms"] == 0
    for totals in (lambda d: None, lambda d: d.pop("itls")):
        reading = read(changed("vllm/vllm-0.32.json", tmp_path, all_failed, totals))
        assert not any(key.endswith("_ms") for key in reading.reported)
        assert (reading.figures()["completed"], reading.figures()["failed"]) == (0, 24)


def test_vllm_ramp_is_no_rate(tmp_path: Path) -> None:
    ramp = {
        "request_rate": "inf",
        "ramp_up_strategy": "linear",
        "ramp_up_start_rps": 1,
        "ramp_up_end_rps": 20,
    }
    reading = read(changed("vllm/vllm-0.32.json", tmp_path, lambda d: d.update(ramp)))
    assert reading.context.request_rate is None
    assert reading.context.ramp == (1, 20)
    assert reading.label == "ramp 1->20/s, concurrency 8"
    assert "ramp 1->20/s, concurrency 8: the rate rose during the run (linear)" in reading.notes


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
    first, second = (each.run.requests for each in readings)
    assert [each.planned for each in readings] == [True, False]
    assert first["arrival"].between(first["sent"] - 1, first["sent"]).all()
    assert second["arrival"].isna().all()  # of another clock, in the file
    assert any("another clock" in note for note in readings[1].notes)


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
    document["metadata"]["version"] = 3
    file = tmp_path / "old.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="schema version 3 of guidellm, this servecast reads 1 and 2"):
        read_all(file)


def test_guidellm_what_cannot_be_is_refused(tmp_path: Path) -> None:
    timings = ("benchmarks", 0, "requests", "successful", 2, "info", "timings")
    for change, message in (
        (put(0.0, *timings, "request_start"), "it took .* days"),
        (put(0.0, *timings, "last_token_iteration"), "sending, first and last token"),
        (put(0, "benchmarks", 0, "config", "profile", "max_concurrency"), "max_concurrency should be"),
        (put(-1, "benchmarks", 0, "requests", "successful", 0, "prompt_tokens"), "-1 prompt_tokens"),
        (put(0.5, "benchmarks", 0, "requests", "successful", 0, "cached_tokens"), "0.5 cached_tokens"),
    ):
        with pytest.raises(InputError, match=f"result of guidellm, but .*{message}"):
            read_all(changed("guidellm/benchmarks.json", tmp_path, change))


# aiperf


def test_aiperf_figures_are_its_own(tmp_path: Path) -> None:
    file = SAMPLES / "aiperf" / "profile_export.jsonl"
    reading = read(file)
    other = ("request_throughput", "output_throughput")  # over a phase that begins before the first request
    assert agrees(reading, rel=1e-6, keys=lambda key: key not in other) == 40
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


def test_aiperf_summary_of_another_run_is_refused(tmp_path: Path) -> None:
    lines = (SAMPLES / "aiperf" / "profile_export.jsonl").read_text().splitlines()
    file = tmp_path / "profile_export.jsonl"
    file.write_text("\n".join(lines))
    beside = changed("aiperf/profile_export_aiperf.json", tmp_path)
    assert read(file).reported["completed"] == 12
    file.write_text("\n".join(lines[:-2]))
    with pytest.raises(
        InputError, match=r"says 12 requests, and profile_export\.jsonl lists 10 finished"
    ) as error:
        read(file)
    assert error.value.where == f"{beside}: request_count"


def test_aiperf_run_of_which_all_failed(tmp_path: Path) -> None:
    """What has no sample is not in its summary."""
    kept = ("aiperf_version", "input_config")
    file = changed(
        "aiperf/profile_export_aiperf.json",
        tmp_path,
        lambda d: [d.pop(key) for key in list(d) if key not in kept],
    )
    assert read(file).reported == {"completed": 0}
    lines = [json.loads(line) for line in (SAMPLES / "aiperf" / "profile_export.jsonl").open()]
    records = tmp_path / "profile_export.jsonl"
    records.write_text("\n".join(json.dumps({**line, "metrics": {}, "error": "refused"}) for line in lines))
    figures = read(records).figures()
    assert (figures["completed"], figures["failed"], figures["mean_ttft_ms"]) == (0, 12, None)
    part = changed("aiperf/profile_export_aiperf.json", tmp_path, lambda d: d.pop("request_latency"))
    with pytest.raises(InputError, match="of request_count and request_latency only one is there"):
        read(part)


# inference-perf


def test_inference_perf_figures_are_its_own() -> None:
    readings = read_all(SAMPLES / "inference_perf" / "0.7.0" / "per_request_lifecycle_metrics.json")
    assert [each.context.request_rate for each in readings] == [10, 20]
    for reading in readings:
        assert (
            agrees(reading, rel=1e-9, keys=lambda key: key.endswith(("ttft_ms", "tpot_ms", "itl_ms"))) == 27
        )
        assert agrees(reading, rel=0.02, keys=lambda key: key.endswith(("throughput", "e2el_ms"))) == 12
        assert reading.figures()["mean_e2el_ms"] < reading.reported["mean_e2el_ms"]
        assert reading.context.model == "tiny"
        assert not reading.halved
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
    assert reading.halved
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
        assert stage.halved
        assert any("halves" in note for note in stage.notes)


def test_gaps_of_nothing_are_halved_only_by_old_versions(tmp_path: Path) -> None:
    """Two tokens in an event have no gap between them either."""
    latency = ("successes", "latency")
    new, old = (f"inference_perf/{version}/stage_0_lifecycle_metrics.json" for version in ("0.7.0", "0.2.0"))
    median = (*latency, "inter_token_latency", "median")
    reading = read(changed(new, tmp_path, put(1e-5, *median)))
    assert not reading.halved
    assert reading.reported["median_itl_ms"] == 0.01
    tpot = json.loads((SAMPLES / old).read_text())["successes"]["latency"]["time_per_output_token"]["mean"]
    right = read(changed(old, tmp_path, put(2 * tpot, *latency, "time_per_output_token", "mean")))
    assert not right.halved  # its gaps add up to twice the latency if all of them are between tokens
    assert right.reported["mean_tpot_ms"] == pytest.approx(2000 * tpot)

    def two_an_event(requests: list[dict[str, Any]]) -> None:
        for each in requests:
            metrics = each["info"]["response_metrics"]
            metrics["output_token_times"] = np.repeat(metrics["output_token_times"][::2], 2).tolist()

    reading = read(changed("inference_perf/0.7.0/per_request_lifecycle_metrics.json", tmp_path, two_an_event))
    assert not reading.halved
    assert len(reading.run.itl) == 7 * len(reading.run.requests)


def test_inference_perf_failed_requests_have_no_gaps(tmp_path: Path) -> None:
    name = "inference_perf/0.7.0/per_request_lifecycle_metrics.json"
    reading = read(changed(name, tmp_path, put({"error_type": "timeout"}, 1, "error")))
    done = reading.run.requests["status"] == "finished"
    assert (~done).sum() == 1
    assert len(reading.run.itl) == 7 * done.sum()


@pytest.mark.parametrize("key", ["output_tokens", "prompt_tokens"])
def test_inference_perf_missing_counts_are_not_zero(tmp_path: Path, key: str) -> None:
    name = "inference_perf/0.7.0/per_request_lifecycle_metrics.json"

    def forget(requests: list[dict[str, Any]]) -> None:
        info = requests[1]["info"]
        if key == "output_tokens":
            del info["response_metrics"]["output_tokens"]
        else:
            info["request_metrics"], info["input_tokens"] = None, None

    with pytest.raises(InputError, match=f"a request has nan {key}"):
        read(changed(name, tmp_path, forget))
    failed = read(changed(name, tmp_path, forget, put({"error_type": "timeout"}, 1, "error")))
    assert (failed.run.requests["status"] == "failed").sum() == 1


def test_inference_perf_stage_of_which_all_failed(tmp_path: Path) -> None:
    def fail(document: dict[str, Any]) -> None:
        done = document["successes"]
        document["failures"]["count"], done["count"] = done["count"], 0
        done["latency"] = dict.fromkeys(done["latency"])
        done["throughput"] = dict.fromkeys(done["throughput"], 0.0)
        done["prompt_tokens"], done["output_len"] = {"total": 0.0, "cached": 0.0, "uncached": 0.0}, None

    name = "inference_perf/0.7.0/stage_0_lifecycle_metrics.json"
    reported = read(changed(name, tmp_path, fail)).reported
    assert (reported["completed"], reported["failed"]) == (0, 6)
    assert not any(key.endswith("_ms") for key in reported)
    with pytest.raises(InputError, match="request_latency or output_len is missing"):
        read(changed(name, tmp_path, fail, put(6, "successes", "count")))


@pytest.mark.parametrize(
    "config",
    [b"", b"- a list", b"server: 0.0.0.0", b"port: 80", b"\xff\xfe\x00", b"a: [", b"a: 2024-02-30"],
)
def test_another_config_beside_inference_perf_says_nothing(tmp_path: Path, config: bytes) -> None:
    file = changed("inference_perf/0.7.0/stage_0_lifecycle_metrics.json", tmp_path)
    (tmp_path / "config.yaml").write_bytes(config)
    reading = read(file)
    assert reading.context.model is None
    assert "the config.yaml beside it is no inference-perf's: model not stated" in reading.notes


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
    run = simulate(deployment)
    document = result(deployment, run, ranks=(50, 90, 95, 99))
    file = tmp_path / "report.yaml"
    write_benchmark_report(file, run, document)
    reading = read(file)
    keys = [key for key in reading.reported if key in document and key != "kv_cache_usage_peak"]
    assert len(keys) > 25
    assert reading.reported["max_e2el_ms"] == pytest.approx(1000 * samples(run, "e2el")[0].max())
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "date: 2024-02-30", "is not YAML: day is out of range"),
        ("x.yaml", "!!int ''", "is not YAML"),
        ("x.yaml", "[" * 5000, "is not YAML"),
        ("x.json", "[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    ],
)
def test_what_no_parser_takes_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read(file)


ODD: list[Any] = [
    None,
    -1,
    0,
    0.5,
    -1e9,
    1e12,
    1e300,
    10**400,
    math.nan,
    math.inf,
    "text",
    True,
    [],
    {},
    [1, "x"],
]


def spoil(document: Any, rng: random.Random) -> None:
    """Puts one odd value somewhere, or takes one away."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        steps: Iterator[Any] = iter(value if isinstance(value, dict) else range(len(value)))
        for step in steps:
            places.append((value, step))
            if isinstance(value[step], dict | list):
                visit(value[step])

    visit(document)
    holder, step = rng.choice(places)
    if rng.random() < 0.2:
        del holder[step]
    else:
        holder[step] = rng.choice(ODD)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of huge numbers
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_spoiled_files_are_read_or_refused(tmp_path: Path, file: Path) -> None:
    rng = random.Random(file.name)
    text = file.read_text()
    for each in file.parent.iterdir():
        shutil.copy(each, tmp_path)
    target = tmp_path / file.name
    for _ in range(25):
        if file.suffix == ".yaml":
            document = yaml.safe_load(text)
            spoil(document, rng)
            target.write_text(yaml.safe_dump(document))
        else:
            lines = text.splitlines() if file.suffix == ".jsonl" else [text]
            number = rng.randrange(len(lines))
            document = json.loads(lines[number])
            spoil(document, rng)
            lines[number] = json.dumps(document)
            target.write_text("\n".join(lines))
        with contextlib.suppress(InputError):
            for reading in read_all(target):
                reading.figures()


# -- older releases, sweeps, and other tools' names for the same --------------------------------------


def old_guidellm(version: str) -> dict[str, Any]:
    """The sample as guidellm 0.3, 0.4 or 0.6 would have written it (by the models in their packages)."""
    document: dict[str, Any] = json.loads((SAMPLES / "guidellm" / "benchmarks.json").read_text())
    document["benchmarks"] = document["benchmarks"][:1]
    if version == "0.6.0":
        return document | {"metadata": {"version": 1, "guidellm_version": version}, "args": {}}
    benchmark = document["benchmarks"][0] | {"type_": "generative_benchmark"}
    if version == "0.4.0":
        return {"args": {}, "benchmarks": [benchmark]}
    config, metrics = benchmark.pop("config"), benchmark.pop("metrics")
    start, length = benchmark["start_time"], benchmark.pop("duration")
    benchmark |= {
        "args": {"strategy": config["strategy"]},
        "worker": {"backend_type": "openai_http", "backend_model": "tiny"},
        "run_stats": {"start_time": start, "end_time": start + length},
        "end_time": start + length,
        "request_totals": metrics.pop("request_totals"),
        "metrics": metrics,
    }
    for status, requests in benchmark["requests"].items():
        benchmark["requests"][status] = requests and [
            {
                **{name: each[name] for name in ("prompt_tokens", "output_tokens")},
                "start_time": each["info"]["timings"]["request_start"],
                "first_token_time": each["info"]["timings"]["first_token_iteration"],
                "last_token_time": each["info"]["timings"]["last_token_iteration"],
                "scheduler_info": {"targeted_start_time": each["info"]["timings"]["targeted_start"]},
            }
            for each in requests
        ]
    return {"benchmarks": [benchmark]}


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "0.6.0"])
def test_older_guidellm_says_the_same(version: str, tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.json"
    file.write_text(json.dumps(old_guidellm(version)))
    old, new = read(file), read_all(SAMPLES / "guidellm" / "benchmarks.json")[0]
    assert old.figures() == pytest.approx(new.figures(), nan_ok=True)
    assert (old.context.request_rate, old.context.burstiness) == (10, 1.0)
    assert old.planned
    assert old.run.requests["arrival"].tolist() == new.run.requests["arrival"].tolist()


def test_the_head_of_an_old_guidellm_file_is_refused_by_name_and_version(tmp_path: Path) -> None:
    file = tmp_path / "stub.json"
    document = old_guidellm("0.6.0")
    document["benchmarks"] = [{"type_": "generative_benchmark", "config": {"strategy": {"type_": "x"}}}]
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"result of guidellm 0\.6\.0 \(schema version 1\), but"):
        read(file)


def test_vllm_details_before_start_times_are_totals(tmp_path: Path) -> None:
    later = ("start_times", "latencies", "queue_times")
    reading = read(changed("vllm/vllm-0.32.json", tmp_path, lambda d: [d.pop(key, None) for key in later]))
    assert not reading.has_requests
    assert reading.reported["mean_ttft_ms"] == vllm_document()["mean_ttft_ms"]
    assert any("does not save when each request was sent" in note for note in reading.notes)


def test_the_summaries_of_a_vllm_sweep_are_a_run_a_row(tmp_path: Path) -> None:
    """vLLM's sweep writes summary.json, a list of results, and summary.csv, a row a result (pandas)."""
    runs = [json.loads(line) for line in (SAMPLES / "vllm" / "vllm-0.23.jsonl").read_text().splitlines()]
    as_list, as_table = tmp_path / "summary.json", tmp_path / "summary.csv"
    as_list.write_text(json.dumps([run | {"run_number": number} for number, run in enumerate(runs)]))
    pd.DataFrame(runs).to_csv(as_table)
    truth = read_all(SAMPLES / "vllm" / "vllm-0.23.jsonl")
    for file in (as_list, as_table):
        for reading, true in zip(read_all(file), truth, strict=True):
            assert reading.label == true.label
            assert reading.reported == pytest.approx(true.reported)


def test_a_benchmark_report_of_0_1_says_the_same(tmp_path: Path) -> None:
    """The same statistics where llm-d-benchmark's schema_v0_1.py has them."""
    file = tmp_path / "report.yaml"
    latency = {"units": "ms", "mean": 100.0, "p50": 90.0, "p99": 210.0}
    report = {
        "version": "0.1",
        "scenario": {
            "model": {"name": "some/model"},
            "platform": {"engine": [{"name": "vllm", "version": "0.9.0.1"}]},
            "load": {"name": "vllm-benchmark", "args": {"max_concurrency": 8}},
        },
        "metrics": {
            "time": {"duration": 10.0, "start": 1749570583.5},
            "requests": {
                "total": 12,
                "failures": 2,
                "incomplete": None,
                "output_length": {"units": "count", "mean": 30.0},
            },
            "latency": {"time_to_first_token": latency, "request_latency": {"units": "s", "mean": 3.0}},
            "throughput": {
                "requests_per_sec": 1.0,
                "output_tokens_per_sec": 30.0,
                "total_tokens_per_sec": 31,
            },
        },
    }
    file.write_text(yaml.safe_dump(report))
    reading = read(file)
    assert (reading.context.model, reading.context.max_concurrency) == ("some/model", 8)
    expected = {
        "completed": 10, "failed": 2, "mean_ttft_ms": 100, "median_ttft_ms": 90, "mean_e2el_ms": 3000,
        "request_throughput": 1, "output_throughput": 30, "total_output_tokens": 300,
    }  # fmt: skip
    assert {key: reading.reported[key] for key in expected} == pytest.approx(expected)
    file.write_text(yaml.safe_dump(report | {"version": "0.3"}))
    with pytest.raises(
        InputError, match=r"version '0\.3' of the llm-d Benchmark Report, this servecast reads"
    ):
        read(file)


EIGHT = {"concurrency": 8}


def summary_of(config: dict[str, Any], **metrics: Any) -> dict[str, Any]:
    """A summary of aiperf or genai-perf: 3.4 requests/s of 2,190 ms."""
    latency = {"unit": "ms", "avg": 2190.0, "p50": 2100.0, "p99": 2900.0}
    return {
        "request_throughput": {"unit": "requests/sec", "avg": 3.4},
        "request_latency": latency,
        "time_to_first_token": {"unit": "ms", "avg": 118.0, "p99": 130.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 775.2},
        "input_config": config,
        **metrics,
    }


@pytest.mark.parametrize(
    ("config", "tool", "load"),
    [
        ({"models": {"items": [{"name": "m"}]}, "phases": [{"rate": 4.0}]}, "aiperf", (4, None)),
        ({"endpoint": {"model_names": ["m"]}, "loadgen": EIGHT}, "aiperf", (math.inf, 8)),
        ({"model_names": ["m"], "perf_analyzer": {"stimulus": EIGHT}}, "genai-perf", (math.inf, 8)),
        ({"model": ["m"], "concurrency": 8, "request_rate": None}, "genai-perf", (math.inf, 8)),
        ({"model": ["m"], "concurrency": None, "request_rate": 4.0}, "genai-perf", (4, None)),
    ],
)  # fmt: skip
def test_aiperf_and_genai_perf_say_their_load_in_several_ways(
    config: dict[str, Any], tool: str, load: tuple[float, int | None], tmp_path: Path
) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary_of(config)))
    reading = read(file)
    assert (reading.context.tool, reading.context.model) == (tool, "m")
    assert (reading.context.request_rate, reading.context.max_concurrency) == load
    assert reading.reported["p99_e2el_ms"] == 2900


def test_gamma_arrivals_of_aiperf_have_a_burstiness(tmp_path: Path) -> None:
    phase = {"kind": "profiling", "type": "gamma", "rate": 4.0, "smoothness": 2.5}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary_of({"phases": [phase]}, aiperf_version="0.13.0")))
    assert read(file).context.burstiness == 2.5


def test_a_sweep_of_aiperf_is_a_run_a_combination(tmp_path: Path) -> None:
    """By aiperf 0.13's AggregateSweepJsonExporter: a mean for each metric and statistic, and the aggregate of
    repeated runs the same without parameters."""

    def metrics(latency: float) -> dict[str, Any]:
        flat = {
            "request_throughput_avg": 3.4,
            "request_latency_avg": latency,
            "request_latency_p99": 2 * latency,
        }
        return {name: {"mean": value, "std": 0.0, "unit": "ms"} for name, value in flat.items()}

    file = tmp_path / "profile_export_aiperf_sweep.json"
    combinations = [{"parameters": {"concurrency": n}, "metrics": metrics(100.0 * n)} for n in (1, 8)]
    file.write_text(json.dumps({"aggregation_type": "sweep", "per_combination_metrics": combinations}))
    first, second = read_all(file)
    assert (first.context.max_concurrency, second.context.max_concurrency) == (1, 8)
    assert second.reported["mean_e2el_ms"] == 800
    assert second.reported["p99_e2el_ms"] == 1600
    assert second.reported["request_throughput"] == 3.4
    aggregate = {"aiperf_version": "0.13.0", "metadata": {}, "metrics": metrics(100.0)}
    file.write_text(json.dumps(aggregate))
    assert read(file).reported["mean_e2el_ms"] == 100


def test_what_has_no_token_counts_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "profile_export.json"
    file.write_text(json.dumps({"service_kind": "openai", "experiments": [{"requests": []}]}))
    with pytest.raises(InputError, match="genai-perf's raw profile, which has no token counts"):
        read(file)
