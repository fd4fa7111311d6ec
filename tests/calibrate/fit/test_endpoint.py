"""Calibration by a server's answers: the plan, the report that it writes, and the fit that can use it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from servecast.calibrate.fit import endpoint as black_box
from servecast.calibrate.fit.endpoint import COLUMNS, WARM_UP, Endpoint, Level, levels_for, measure_endpoint
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import statistic
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.warmup import select
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import load
from servecast.sim.traffic.spec import StageSpec, StreamSpec, Workload
from servecast.sim.traffic.trace_spec import TraceSpec

SCENARIO = load("a6000-qwen2.5-7b")
LEVELS = [Level(1, 256, 32), Level(1, 1024, 8), Level(8, 256, 32)]
SERVER = Endpoint("http://127.0.0.1:1", "m", "t")


def simulated_bench(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """In place of ``run_bench``: what the shipped profile predicts, saved as vLLM's benchmark saves it."""
    trace, flags = args[1], kwargs["args"]
    limit = int(flags[flags.index("--max-concurrency") + 1])
    stream = StreamSpec(trace=TraceSpec(format="timed_trace", path=trace), max_concurrency=limit)
    run = simulate(SCENARIO, workload=Workload(stages=(StageSpec(streams=(stream,)),)))
    return as_saved(run)


def as_saved(run: Run) -> dict[str, Any]:
    requests = run.requests
    ttfts = requests["first_token"] - requests["sent"]
    gap = (requests["finish"] - requests["first_token"]) / (requests["output_tokens"] - 1)
    return {
        "start_times": requests["sent"].tolist(),
        "ttfts": ttfts.tolist(),
        "itls": [[g] * (n - 1) for g, n in zip(gap, requests["output_tokens"], strict=True)],
        "output_lens": requests["output_tokens"].tolist(),
        "errors": [""] * len(requests),
    }


def test_the_plan_asks_for_one_a_long_prompt_and_rising_concurrency() -> None:
    assert levels_for(SCENARIO) == [
        Level(1, 256, 64),
        Level(1, 2048, 8),
        Level(8, 256, 64),
        Level(32, 256, 64),
        Level(128, 256, 64),
    ]
    assert levels_for(SCENARIO, [2, 4])[2:] == [Level(4, 256, 64)]
    assert levels_for(load("a6000-qwen2.5-7b", {"engine.max_num_seqs": 16}))[-1].concurrency == 8


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"concurrency": [0]}, "--concurrency"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"output_tokens": 1}, "--output-tokens"),
        ({"prompt_tokens": 40_000}, "--prompt-tokens"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        levels_for(SCENARIO, **changes)


def test_the_report_is_what_the_server_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table's medians are those of the run that stood in for the server, without its first requests,
    and the scenario beside it has the same load and names every row for the fit."""
    monkeypatch.setattr(black_box, "run_bench", simulated_bench)
    report = measure_endpoint(SCENARIO, SERVER, LEVELS, tmp_path)
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["level"] for row in rows] == ["0", "1", "2"]
    stages = report.stages().stages
    assert [len(stage.streams) for stage in stages] == [1, 1, 1]
    assert [row["level"] for row in report.reported[0].fit_rows] == [0, 1, 2]
    assert len(report.reported[0].columns) == len(COLUMNS)

    again = simulate(report.model_copy(update={"profile": str(SCENARIO.profile_file())}))
    for number, row in enumerate(rows):
        level = select(again, stage=number)
        assert float(row["tpot_p50_ms"]) == pytest.approx(1e3 * statistic(level, "tpot", "p50"), rel=0.05)
        assert float(row["ttft_p50_ms"]) == pytest.approx(1e3 * statistic(level, "ttft", "p50"), rel=0.15)


def test_the_first_requests_of_a_level_do_not_count() -> None:
    slow = {
        "start_times": [0.0, 5.0, 10.0, 11.0],
        "ttfts": [4.0, 4.0, 0.1, 0.1],
        "itls": [[1.0], [1.0], [0.02], [0.02]],
        "output_lens": [2, 2, 2, 2],
        "errors": [""] * 4,
    }
    cells = black_box._statistics(slow)
    assert WARM_UP == 2
    assert cells["ttft_p95_ms"] == pytest.approx(100)
    assert cells["tpot_p50_ms"] == pytest.approx(20)
    assert cells["output_tok_s"] == pytest.approx(4 / 1.12)


def test_levels_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = iter(range(9))

    def bench(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if next(calls) == 1:
            raise InputError("ended with code 1", "vllm bench serve", "Does the server answer?")
        return simulated_bench(*args, **kwargs)

    monkeypatch.setattr(black_box, "run_bench", bench)
    with pytest.raises(InputError, match="ended with code 1"):
        measure_endpoint(SCENARIO, SERVER, LEVELS, tmp_path)
    assert len(list(csv.DictReader((tmp_path / "report.csv").open()))) == 1


def test_failed_requests_are_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        black_box, "run_bench", lambda *a, **k: simulated_bench(*a, **k) | {"errors": ["refused", ""]}
    )
    with pytest.raises(InputError, match="1 requests failed; the first error: refused"):
        measure_endpoint(SCENARIO, SERVER, LEVELS, tmp_path)
    assert not (tmp_path / "report.csv").exists()


def test_the_key_is_never_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret")
    monkeypatch.setattr(black_box, "run_bench", simulated_bench)
    measure_endpoint(
        SCENARIO, Endpoint("http://127.0.0.1:1", "m", "t", api_key_env="SECRET_KEY"), LEVELS[:2], tmp_path
    )
    written = " ".join(path.read_text() for path in tmp_path.iterdir())
    assert "sk-very-secret" not in written
