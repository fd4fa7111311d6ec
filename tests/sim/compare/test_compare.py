"""Results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_scenarios import open_loop, scenario_file

from servecast.__main__ import main
from servecast.sim.compare.side_by_side import Row, Side, SideBySide, side_by_side
from servecast.sim.inputs.errors import InputError

VLLM_BENCH = {  # as vllm bench serve --save-result writes it
    "date": "20261122-120000",
    "backend": "openai-chat",
    "model_id": "Qwen/Qwen2.5-0.5B-Instruct",
    "num_prompts": 100,
    "request_rate": 5.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 20.0,
    "completed": 100,
    "total_input_tokens": 6400,
    "total_output_tokens": 800,
    "output_throughput": 40.0,
    "p99_ttft_ms": 30.0,
}


def result(**changes: Any) -> dict[str, Any]:
    return {**VLLM_BENCH, **changes}


def row(found: SideBySide, metric: str, stage: str | None = None) -> Row:
    (match,) = [each for each in found.rows if (each.stage, each.metric) == (stage, metric)]
    return match


def test_metrics_stand_side_by_side_with_their_ratio_to_the_first() -> None:
    found = side_by_side([Side("a", (result(),)), Side("b", (result(p99_ttft_ms=45.0, p50_itl_ms=5.0),))])
    assert row(found, "p99_ttft_ms").values == (30.0, 45.0)
    assert row(found, "p99_ttft_ms").ratios == (1.0, 1.5)
    assert row(found, "p99_ttft_ms").differences == (None, None)
    assert "p50_itl_ms" not in [each.metric for each in found.rows]  # only one side has it
    assert found.differences == ()


def test_what_differs_is_listed_with_what_it_may_explain() -> None:
    a = result(engine={"dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 256})
    b = result(engine={"dtype": "float16", "max_model_len": 8192}, total_output_tokens=1600)
    found = side_by_side([Side("a", (a,)), Side("b", (b,))])
    differs = {each.field: each for each in found.differences}
    assert set(differs) == {"engine.dtype", "mean_output_tokens"}
    assert differs["engine.dtype"].values == ("bfloat16", "float16")
    assert "step time" in differs["engine.dtype"].may_explain
    assert differs["mean_output_tokens"].values == (8.0, 16.0)
    assert found.unstated == ("engine.max_num_seqs",)


def test_seeds_are_compared_in_pairs() -> None:
    a = Side("a", tuple(result(p99_ttft_ms=value) for value in (10.0, 20.0, 30.0)))
    b = Side("b", tuple(result(p99_ttft_ms=value) for value in (11.0, 22.0, 33.0)))
    difference = row(side_by_side([a, b]), "p99_ttft_ms").differences[1]
    assert difference is not None
    assert difference.estimate == pytest.approx(2.0)
    half = 4.302653 * 1.0 / 3**0.5  # Student's t at 2 degrees of freedom, 97.5 %
    assert (difference.low, difference.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_a_metric_missing_for_one_seed_has_no_mean() -> None:
    a = Side("a", (result(), result()))
    b = Side("b", (result(), result(p99_ttft_ms=None)))
    assert row(side_by_side([a, b]), "p99_ttft_ms").values == (30.0, None)


def test_stages_are_matched_by_name_and_one_can_be_chosen() -> None:
    stages = [{"stage": f"concurrency={n}", "output_throughput": 10.0 * n} for n in (1, 2)]
    a, b = Side("a", (result(stages=stages),)), Side("b", (result(stages=stages[1:]),))
    assert row(side_by_side([a, b]), "output_throughput", "concurrency=2").values == (20.0, 20.0)
    live = Side("live", (result(),))
    with pytest.raises(InputError, match="no stage that all have"):
        side_by_side([a, live])
    chosen = side_by_side([a, live], stage="concurrency=2")
    assert row(chosen, "output_throughput").values == (20.0, 40.0)
    with pytest.raises(InputError, match="a has no stage 'concurrency=3'"):
        side_by_side([a, live], stage="concurrency=3")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compare", *arguments, "--json", "--jobs", "1"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    lengths = {"kind": "lognormal", "mean": 30, "std": 30}
    return str(scenario_file(tmp_path, workload=open_loop(40, 60, 64, lengths)))


def test_a_live_result_and_the_scenario_that_predicts_it(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = tmp_path / "live.json"
    live.write_text(json.dumps(VLLM_BENCH))
    found = run(capsys, str(live), tiny, "--seeds", "1", "--request-rate", "5", "--num-requests", "100")
    assert found["labels"] == [str(live), tiny]
    fields = [each["field"] for each in found["differences"]]
    assert "mean_output_tokens" in fields
    assert "request_rate" not in fields  # both 5
    assert "engine.max_model_len" in found["unstated"]


def test_routers_see_the_same_traffic(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    routers = ("--routers", "round_robin", "least_outstanding")
    found = run(capsys, tiny, "--replicas", "3", "--seeds", "3", *routers)
    assert found["labels"] == ["round_robin", "least_outstanding"]
    assert [each["field"] for each in found["differences"]] == ["fleet.router"]
    rows = {each["metric"]: each for each in found["rows"]}
    assert rows["completed"]["values"] == [60.0, 60.0]
    assert rows["mean_ttft_ms"]["differences"][1]["samples"] == 3
    assert rows["mean_ttft_ms"]["values"][0] != rows["mean_ttft_ms"]["values"][1]


def test_a_scenario_before_and_after_a_what_if(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, tiny, "--set", "engine.max_num_seqs=1", "--set", "workload.prompt_tokens=128")
    differs = {each["field"]: each["values"] for each in found["differences"]}
    assert differs["engine.max_num_seqs"] == [256, 1]
    assert differs["workload.prompt_tokens"] == ["as in the scenario", 128]
    rows = {each["metric"]: each for each in found["rows"]}
    assert rows["p99_ttft_ms"]["ratios"][1] > 2
    assert rows["p99_ttft_ms"]["differences"][1]["low"] > 0


def test_text_names_both_sides(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", tiny, "--gpu", "h100", "--seeds", "2", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["metric", tiny, "what-if", "ratio", "difference", "(95%)"]
    assert "What differs between the runs" in out
    assert "FLOP/s, bandwidth and memory" in out
