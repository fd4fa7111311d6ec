"""``servecast explain``: each cause is named where it is made to be the one, with numbers and its flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_scenarios import open_loop, scenario_file, small

import servecast
from servecast.__main__ import main
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import lasts
from servecast.sim.metrics.slow_ttft import PARTS
from servecast.sim.run.explain import explain

CLOSED: dict[str, Any] = {
    "arrivals": {"kind": "closed_loop", "concurrency": 32},
    "num_requests": 320,
    "prompt_tokens": 64,
    "output_tokens": 64,
}
FOUR_SLOTS = {"version": "0.32", "max_num_seqs": 4}


@pytest.mark.parametrize(
    ("cause", "sections", "advice"),
    [
        ("max_num_seqs", {"workload": CLOSED, "engine": FOUR_SLOTS}, "--max-num-seqs"),
        (
            "kv_blocks",
            {
                "workload": CLOSED | {"prompt_tokens": 900, "num_requests": 96},
                "engine": {"version": "0.32", "max_model_len": 1024, "num_gpu_blocks_override": 200},
            },
            "--gpu-memory-utilization",
        ),
        (
            "passed_over",  # the third adapter waits until none of the other two is used
            {
                "workload": CLOSED | {"lora_traffic_split": {"a": 0.4, "b": 0.4, "c": 0.2}},
                "engine": {"version": "0.32", "enable_lora": True, "max_loras": 1, "max_cpu_loras": 3},
            },
            "--max-loras, now 1",
        ),
        (
            "passed_over",
            {
                "workload": CLOSED | {"structured_outputs": {"share": 1.0, "grammars": 32}},
                "engine": {"version": "0.32", "grammar_compile_s": 5.0},
            },
            "engine.host_cores",
        ),
        (
            "token_budget",
            {
                "workload": CLOSED | {"prompt_tokens": 2000, "output_tokens": 2, "num_requests": 96},
                "engine": {"version": "0.32", "max_num_batched_tokens": 2048},
            },
            "--max-num-batched-tokens",
        ),
        ("prefill", {"workload": open_loop(0.5, 40, 8000, 2)}, "shared prefixes"),
        (
            "client_concurrency",
            {"workload": open_loop(20, 100, 64, 64) | {"max_concurrency": 1}},
            "--max-concurrency",
        ),
        (
            "cold_start",
            {"workload": open_loop(20, 40, 64, 8), "fleet": {"cold_start_s": 30.0}},
            "fleet.cold_start_s is 30",
        ),
    ],
)  # fmt: skip
def test_the_cause_that_was_made_is_named(
    cause: str, sections: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    found = explain(small(tmp_path, **sections))
    assert found.cause == cause
    assert advice in " ".join(found.advice)


def test_the_front_end_is_named_where_its_cost_is_most(tmp_path: Path) -> None:
    """32 requests at once: the API server of the L4's benchmark prepares them one after the other."""
    found = explain(servecast.load("l4-qwen2.5-0.5b"), stage="concurrency=32")
    assert found.cause == "front_end"
    assert "--api-server-count" in found.advice[0]


def test_the_parts_add_up_to_the_ttft_of_the_slow_requests(tmp_path: Path) -> None:
    scenario = small(tmp_path, workload=CLOSED, engine=FOUR_SLOTS)
    for statistic in ("mean", "p95"):
        slow = explain(scenario, statistic=statistic).slow
        assert set(slow.parts) == set(PARTS)
        assert sum(slow.parts.values()) == pytest.approx(slow.ttft_s, rel=1e-9)
        assert all(seconds >= -1e-9 for seconds in slow.parts.values())
    found = servecast.simulate(scenario)
    run, ttft = found.result, found.requests["first_token"] - found.requests["sent"]
    assert 1000 * explain(scenario, statistic="mean").slow.ttft_s == pytest.approx(run["mean_ttft_ms"])
    assert 1000 * slow.threshold_s == pytest.approx(run["p95_ttft_ms"])
    assert slow.ttft_s >= slow.threshold_s
    assert slow.requests == (ttft >= slow.threshold_s).sum() >= 16  # 5 % of 320


def test_a_grammar_is_waited_for_in_an_idle_engine(tmp_path: Path) -> None:
    """One request, one grammar of 5 s: that is what its first token waits for."""
    workload = CLOSED | {"num_requests": 1, "structured_outputs": {"share": 1.0, "grammars": 1}}
    engine = {"version": "0.32", "grammar_compile_s": 5.0}
    slow = explain(small(tmp_path, workload=workload, engine=engine)).slow
    assert slow.parts["passed_over"] == pytest.approx(5.0, abs=0.01)
    assert sum(slow.parts.values()) == pytest.approx(slow.ttft_s, rel=1e-9)


def test_text_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario_file(tmp_path, workload=CLOSED, engine=FOUR_SLOTS)
    assert main(["explain", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cause"] == "max_num_seqs"
    assert sum(document["parts_ms"].values()) == pytest.approx(document["mean_ttft_ms"])
    assert main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Cause: in the queue while all sequence slots are taken (max_num_seqs)" in text
    assert all(f"To change it: {each}" in text for each in document["advice"])
    assert main(["explain", str(path), "--max-num-seqs", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] != "max_num_seqs"


def test_a_run_shorter_than_its_answers_is_not_called_too_much() -> None:
    """One answer takes 20 s: of arrivals over 30 s hardly any is done at the last one, over 50 s most are."""

    def taking(over_s: float) -> Run:
        arrival = np.linspace(0, over_s, 31)
        requests = pd.DataFrame(
            {"arrival": arrival, "scheduled": arrival, "first_token": arrival, "finish": arrival + 20}
        )
        return Run(requests, pd.DataFrame(), pd.DataFrame())

    assert (lasts(taking(30)), lasts(taking(50))) == (False, True)
