"""The parts of a live session, and the session itself against a server and a load generator that are not
vLLM: truth, telemetry, refusals, loads, verdicts, and what is kept when something breaks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from live_fakes import METRICS, SAYS_ONLY_ITS_BLOCKS, SCENARIO, FakeServer, fake_python

from servecast.__main__ import main
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load
from servecast.validate.compare.series import growth
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.live.loads import KINDS, Loads
from servecast.validate.live.misfit import refuse_misfit, replaced
from servecast.validate.live.own_server import serve_flags
from servecast.validate.live.result import document, judge
from servecast.validate.live.search import meets
from servecast.validate.live.session import Session
from servecast.validate.live.target import Target, proxy_latency_s
from servecast.validate.live.telemetry import (
    Prometheus,
    Sampler,
    cache_config,
    parse_metrics,
    scraper,
)
from servecast.validate.live.truth import Truth, read_truth

CPU = {"gpu": "cpu", "gpu_count": 0, "driver": None, "host_cpu": "x86"}
INFO = {
    "scheduler_config": {"max_num_seqs": 8, "async_scheduling": False, "policy": "fcfs", "watermark": 0.0},
    "model_config": {"enforce_eager": True},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def file(tmp_path: Path, model: Path) -> Path:
    """A scenario on a GPU that a file describes, which a machine without one may serve."""
    find_gpu("L4").save(tmp_path / "gpu.json")
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO + "profile: physics\n")
    return path


# telemetry


def test_metrics_are_summed_over_engines_and_what_is_absent_is_not_a_number() -> None:
    found = parse_metrics(METRICS)
    assert found["running"] == 7
    assert found["kv_usage"] == pytest.approx(0.6)
    assert (found["preemptions"], found["queue_s"], found["queued"]) == (2, 0.2, 4)
    assert math.isnan(found["prefix_hits"])
    assert cache_config(METRICS)["num_gpu_blocks"] == "900"
    assert parse_metrics("vllm:gpu_cache_usage_perc 0.25\n")["kv_usage"] == 0.25  # an older vLLM's name


def test_growth_needs_two_readings() -> None:
    frame = pd.DataFrame({"a": [1.0, math.nan, 4.0], "b": [math.nan, 2.0, math.nan]})
    assert growth(frame["a"].to_numpy()) == 3
    assert math.isnan(growth(frame["b"].to_numpy()))
    assert math.isnan(growth(pd.Series(dtype=float).to_numpy()))


def test_a_sampler_goes_on_after_a_failure() -> None:
    values: list[Any] = [{"a": 1.0}, OSError(), {"a": 2.0}]

    def read() -> dict[str, float]:
        value = values.pop(0) if values else {"a": 3.0}
        if isinstance(value, OSError):
            raise value
        return dict(value)

    sampler = Sampler(read, 0.001)
    with sampler:
        while len(sampler.rows) < 3:
            pass
    assert sampler.failures == 1
    assert sampler.frame()["a"].tolist()[:3] == [1, 2, 3]
    assert sampler.frame()["time_s"].is_monotonic_increasing


def test_scraping_a_server() -> None:
    with FakeServer() as server:
        scrape = scraper(f"{server.url}/metrics", interval_s=0.01)
        with scrape:
            while not scrape.rows:
                pass
    assert scrape.rows[0]["running"] == 7


def test_a_server_that_is_no_prometheus_is_refused() -> None:
    with FakeServer() as server, pytest.raises(InputError, match="does not answer as Prometheus does"):
        Prometheus(server.url)


# the truth about a server


def test_the_truth_is_read_from_the_server_and_replaces_the_scenario(file: Path) -> None:
    with FakeServer(info=INFO) as server:
        truth = read_truth(Target(server.url, "tiny", "tiny", own=True), CPU)
    assert truth.version == "0.32.0"
    assert truth.gpu == "cpu"
    assert truth.flags["max_num_seqs"] == 8
    assert truth.flags["max_model_len"] == 1024
    found = load(file, truth.overrides())
    assert found.engine.num_gpu_blocks_override == 900
    assert found.engine.block_size == 32
    assert found.engine.async_scheduling is False
    other = replaced(truth, load(file, {"engine.max_num_seqs": 64}))
    assert other == ["the server's max_num_seqs is 8, the scenario says 64: the server's was taken"]


def test_a_server_that_says_little_is_noted(file: Path, model: Path) -> None:
    with FakeServer(version=None, metrics=None) as server:
        truth = read_truth(Target(server.url, "tiny", "tiny"), CPU)
    scenario = load(file)
    notes = " ".join(refuse_misfit(truth, Deployment.of(scenario), None))
    for missing in ("config.json", "KV blocks", "version", "scheduler's flags", "gpu.json"):
        assert missing in notes


def test_another_model_name_and_no_server_are_refused() -> None:
    with FakeServer() as server:
        with pytest.raises(InputError, match="serves tiny, not 'large'"):
            read_truth(Target(server.url, "large", "tiny"), CPU)
        gone = server.url
    with pytest.raises(InputError, match="does not answer"):
        read_truth(Target(gone, "tiny", "tiny"), CPU)


def test_the_key_reaches_the_front_and_not_the_engine_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONT_KEY", "sk-secret")
    with FakeServer("alias", key="sk-secret") as front, FakeServer(info=INFO) as engine:
        target = Target(front.url, "alias", "tiny", engine_url=engine.url, api_key_env="FRONT_KEY")
        truth = read_truth(target, CPU)
        assert truth.served_model == "tiny"
        assert truth.num_gpu_blocks == 900
        assert abs(proxy_latency_s(target, truth.served_model, times=3)) < 1
    assert ("/v1/completions", "Bearer sk-secret") in front.asked
    assert {key for _, key in engine.asked} == {None}


def test_a_profile_of_another_gpu_and_another_model_are_refused(file: Path, model: Path) -> None:
    truth = Truth("0.32.0", 900, {"max_num_seqs": 8}, "cpu", "tiny")
    on_l4 = load(file, {"gpu": {"name": "L4"}})
    with pytest.raises(InputError, match="is of L4, the server runs on cpu"):
        refuse_misfit(truth, Deployment.of(on_l4), model)
    ours = load(file)
    assert refuse_misfit(truth, Deployment.of(ours), model)
    larger = write_tiny_model(model.parent / "larger", layers=4)
    with pytest.raises(InputError, match=r"in layers \(2, not 4\)"):
        refuse_misfit(truth, Deployment.of(ours), larger)


def test_flags_of_a_server_that_is_started(file: Path) -> None:
    flags = serve_flags(load(file).engine)
    assert "--no-async-scheduling" in flags
    assert flags[flags.index("--num-gpu-blocks-override") + 1] == "900"
    assert not any("version" in flag for flag in flags)


# loads


@pytest.fixture
def loads(file: Path) -> Loads:
    scenario = load(file)
    return Loads(Deployment.of(scenario), max_rate=200.0, duration_s=2.0)


def test_every_kind_gives_loads_that_can_be_sent(loads: Loads) -> None:
    for name, kind in KINDS.items():
        found = kind(loads)
        assert found, name
        for each in found:
            trace = each.requests
            assert len(trace.times_s) >= 20
            assert (trace.prompt_tokens + trace.output_tokens).max() <= 1024
            assert (each.request_rate is None) == (name == "concurrency")
            if each.max_concurrency is not None:
                assert not trace.times_s.any()


def test_rates_span_the_predicted_largest_one(loads: Loads) -> None:
    rates = [each.request_rate or 0.0 for each in KINDS["rate"](loads)]
    assert min(rates) < loads.max_rate < max(rates)


def test_the_kv_load_asks_for_a_server_with_too_few_blocks(loads: Loads) -> None:
    (asked,) = KINDS["kv"](loads)
    few = loads.scenario.changed({f"engine.{name}": value for name, value in asked.engine.items()})
    from servecast.sim.run.simulate import simulate

    run = simulate(few, stages=asked.stages())
    assert run.requests["preemptions"].sum() > 0


def test_the_prefix_load_shares_prompts(loads: Loads) -> None:
    (asked,) = KINDS["prefix"](loads)
    assert asked.requests.hash_ids is not None
    firsts = [ids[0] for ids in asked.requests.hash_ids]
    assert 1 < len(set(firsts)) <= 8


def test_the_mixed_load_has_long_prompts_beside_short_ones(loads: Loads) -> None:
    (asked,) = KINDS["mixed"](loads)
    prompts = asked.requests.prompt_tokens
    assert prompts.max() > 5 * prompts.min()


# the session, with a load generator that simulates


@pytest.fixture
def run_session(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Session, dict[str, Any]]]:
    monkeypatch.setenv("FAKE_SCENARIO", str(file))

    def run(out: str = "out", **options: Any) -> tuple[Session, dict[str, Any]]:
        scenario: Scenario = load(file)
        with FakeServer(info=INFO, metrics=SAYS_ONLY_ITS_BLOCKS) as server:
            session = Session(
                scenario,
                Target(server.url, "tiny", str(tmp_path / "tiny")),
                tmp_path / out,
                python=str(fake_python(tmp_path)),
                machine=CPU,
                **{"duration_s": 2.0, "seeds": 2, **options},
            )
            session.run()
        limits = Tolerances.load()
        return session, document(session, judge(session, limits), tolerances=limits)

    return run


def test_a_right_prediction_passes_and_was_on_disk_before(
    run_session: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept = run_session(kinds=("rate", "concurrency", "kv"), rates=(20.0, 60.0), concurrency=(4,))
    assert kept["verdict"] == "pass", kept["reasons"]
    assert [each["name"] for each in kept["loads"]] == ["rate-20", "rate-60", "concurrency-4"]
    assert any("left out: it needs a server with num_gpu_blocks_override" in note for note in kept["notes"])
    for each in kept["loads"]:
        prediction = tmp_path / "out" / each["name"] / "prediction.json"
        assert hashlib.sha256(prediction.read_bytes()).hexdigest() == each["prediction_sha256"]
        assert each["predicted_at"] <= each["started_at"]
        assert prediction.stat().st_mtime <= (prediction.parent / "bench.json").stat().st_mtime
    assert str(tmp_path) not in json.dumps(kept)


def test_a_wrong_prediction_fails(run_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOWER", "1.5")
    _, kept = run_session(rates=(20.0,))
    assert kept["verdict"] == "fail"
    assert any("median_tpot_ms" in reason for reason in kept["reasons"])


def test_streams_that_break_off_have_failed(
    run_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUT", "5")
    session, kept = run_session(rates=(20.0,))
    measured = session.outcomes[0].measured
    assert measured.run.requests["status"].tolist()[:6] == ["failed"] * 5 + ["finished"]
    assert kept["verdict"] == "inconclusive"
    assert any("5 of 40 requests failed" in reason for reason in kept["reasons"])
    assert any("5 requests failed: each ended before its last token" in note for note in measured.notes)
    monkeypatch.setenv("FAKE_CUT", "40")
    session, _ = run_session(rates=(20.0,), out="all")
    assert session.outcomes[0].measured is None
    assert "every request ended before its last token" in str(session.outcomes[0].problem)


def test_the_largest_rate_is_searched_for(run_session: Callable[..., Any], file: Path) -> None:
    session, kept = run_session(kinds=("slo",), duration_s=1.5)
    good = [meets([each.measured.run], session.scenario) for each in session.outcomes]
    rates = [each.load.request_rate for each in session.outcomes]
    assert {True, False} == set(good)
    low = max(rate for rate, holds in zip(rates, good, strict=True) if holds)
    high = min(rate for rate, holds in zip(rates, good, strict=True) if not holds)
    assert high <= 1.04 * low
    (row,) = [row for row in kept["sweep"] if row["metric"] == "max_request_rate"]
    assert low <= row["measured"] <= high


def test_a_time_budget_leaves_loads_out(run_session: Callable[..., Any]) -> None:
    session, kept = run_session(rates=(20.0, 40.0), time_budget_s=5.0)
    assert session.outcomes == []
    assert kept["verdict"] == "inconclusive"
    assert sum("time budget" in note for note in kept["notes"]) == 2


def test_a_load_generator_that_fails_is_inconclusive_and_the_key_is_not_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SAYS", "no such endpoint, key KEY")
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    out = tmp_path / "out"
    with FakeServer(info=INFO, key="sk-very-secret") as server:
        code = main(
            [
                *("validate", "live", str(file), "--base-url", server.url, "--model", "tiny"),
                *("--tokenizer", str(tmp_path / "tiny"), "--api-key-env", "A_KEY", "--rates", "20"),
                *("--duration", "1", "--seeds", "2", "--out", str(out)),
                *("--vllm-python", str(fake_python(tmp_path))),
            ]
        )
    said = capsys.readouterr()
    assert code == 3
    assert "no such endpoint, key ***" in said.out
    written = [path.read_text() for path in out.rglob("*") if path.is_file()]
    assert not any("sk-very-secret" in text for text in [said.out, said.err, *written])
    assert json.loads((out / "result.json").read_text())["verdict"] == "inconclusive"
    assert (out / "report.html").exists()


def test_ctrl_c_keeps_what_is_done(run_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from servecast.validate.live import drive as live_drive

    real, count = live_drive.run_bench, [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(live_drive, "run_bench", interrupted)
    session, kept = run_session(rates=(20.0, 40.0, 60.0))
    assert len(session.outcomes) == 1
    assert kept["loads"][0]["rows"]
    assert kept["verdict"] == "inconclusive"
    assert "stopped by hand" in kept["reasons"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no server"),
        (("--base-url", "http://127.0.0.1:1"), "no model is named"),
        (("--base-url", "http://127.0.0.1:1", "--model", "m"), "does not answer"),
        (("--base-url", "http://127.0.0.1:1", "--model", "m", "--recorder"), "started here"),
        (("--base-url", "http://127.0.0.1:1", "--model", "m", "--api-key-env", "NO_KEY"), "no NO_KEY"),
        (("--base-url", "nowhere", "--model", "m"), "does not answer"),
        (("--serve", "tiny", "--model", "m"), "run already"),
        (("--serve", "."), "has no config.json"),
        (("--serve", "tiny", "--plan", "rates"), "there is no plan 'rates'"),
        (("--serve", "tiny", "--plan", "slo", "--set", "slo=[]"), "there is no SLO"),
        (("--serve", "tiny", "--replicas", "2"), "2 replicas"),
        (("--serve", "tiny", "--rates", "0"), "numbers above 0"),
        (("--serve", "tiny", "--concurrency", "1.5"), "1.5"),
        (("--serve", "tiny", "--duration", "0"), "is no time"),
        (("--serve", "tiny", "--seeds", "0"), "0 seeds"),
        (("--serve", "tiny", "--time-budget", "-1"), "is no time"),
        (("--serve", "tiny", "--prometheus-label", "job=x"), "job=x"),
        (("--serve", "tiny", "--prometheus-url", "http://127.0.0.1:1"), "as Prometheus does"),
        (("--serve", "tiny", "--vllm-python", "/no/python"), "cannot start"),
        (("--serve", "tiny", "--tolerances", "none.yaml"), "cannot be read"),
    ],
)
def test_wrong_input(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_KEY", raising=False)
    assert main(["validate", "live", str(file), *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not (tmp_path / "out" / "live-tiny" / "result.json").exists()
