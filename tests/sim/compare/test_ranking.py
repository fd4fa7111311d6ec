"""Places of routers that saw the same traffic, what explains them, and how the load lay on the replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_epp import EPP
from small_scenarios import open_loop, scenario_file

from servecast.__main__ import main
from servecast.sim.compare.ranking import rank, reasons
from servecast.sim.compare.side_by_side import Side
from servecast.sim.metrics.fleet_load import fleet_load
from servecast.sim.metrics.records import STEP_COLUMNS, Run

PREFIXES: dict[str, Any] = {
    "name": "prefixes",
    "model": {"config": "Llama-3.1-8B-Instruct"},
    "gpu": {"name": "l40s"},
    "engine": {"version": "0.32", "max_model_len": 8192, "num_gpu_blocks_override": 2500},
    "fleet": {"replicas": 4},
    "workload": {
        "stages": [
            {
                "streams": [
                    {
                        **open_loop(request_rate, 60, 100, 40),
                        "content": {"kind": "shared_prefix", "groups": 24, "prefix_tokens": 2000},
                    }
                ]
            }
            for request_rate in (4, 8)
        ]
    },
}


def side(label: str, ttft: tuple[float, ...], **causes: tuple[float, ...]) -> Side:
    """A side with these values, one a seed."""
    results = []
    for seed, value in enumerate(ttft):
        own = {name: values[seed] for name, values in causes.items()}
        results.append({"mean_ttft_ms": value, "prefix_cache_hit_rate": own.pop("hits", None)})
        results[-1]["fleet_load"] = own
    return Side(label, tuple(results))


def test_equals_share_a_place() -> None:
    """Over three seeds b - a is 1, 1, 1.2: beyond doubt. c - a is -1, 1, 1.5: its interval holds 0. c - b is
    -2, 0, 0.3: so does it. So a and c share the first place, and b, behind a alone, has the next.
    """
    sides = [side("b", (11.0, 21.0, 31.2)), side("a", (10.0, 20.0, 30.0)), side("c", (9.0, 21.0, 31.5))]
    (ranking,) = rank(sides)
    assert [(place.label, place.rank) for place in ranking.places] == [("a", 1), ("c", 1), ("b", 2)]
    behind = ranking.of("b")
    assert behind is not None
    assert behind.behind is not None
    assert behind.behind.estimate == pytest.approx(3.2 / 3)
    assert ranking.places[0].behind is None


def test_one_seed_puts_values_in_their_order() -> None:
    (ranking,) = rank([side("a", (2.0,)), side("b", (1.0,)), side("c", (2.0,))])
    assert [(place.label, place.rank) for place in ranking.places] == [("b", 1), ("a", 2), ("c", 2)]
    assert all(place.behind is None for place in ranking.places)


def test_causes_are_those_that_are_worse_by_a_tenth_beyond_doubt() -> None:
    """b has fewer hits (0.4 for 0.9) and more uncached tokens (600 for 100), in every seed. Its KV cache is
    5 % fuller, which is too little, its queue longer in one seed of three only, its imbalance smaller."""
    sides = [
        side(
            "a",
            (10.0, 11.0, 12.0),
            hits=(0.9, 0.91, 0.89),
            uncached_tokens_per_s=(100, 101, 99),
            mean_kv_cache_usage=(0.5, 0.5, 0.5),
            mean_num_waiting=(1, 1, 1),
            token_imbalance=(1.5, 1.5, 1.5),
        ),
        side(
            "b",
            (30.0, 31.0, 32.0),
            hits=(0.4, 0.41, 0.39),
            uncached_tokens_per_s=(600, 601, 599),
            mean_kv_cache_usage=(0.525, 0.525, 0.525),
            mean_num_waiting=(1, 9, 1),
            token_imbalance=(1.1, 1.1, 1.1),
        ),
    ]
    (reason,) = reasons(sides, rank(sides))
    assert reason.to_text() == (
        "b is behind a: prefix hits 40% of prompt tokens, not 90%; "
        "600 uncached prompt tokens a second, not 100"
    )


def test_fleet_load_of_two_replicas() -> None:
    """Ten seconds from the first send to the last finish. Replica 0 has a step of 5 s with 2 running, 1
    waiting and 0.4 of its KV in use, then nothing: 1, 0.5 and 0.2 over time. It computes 150 tokens, replica
    1 50: the busiest has 1.5 times the mean. 100 + 50 - 80 of the prompt tokens were not cached: 7 a second.
    """
    requests = pd.DataFrame(
        {
            "replica": pd.array([0, 1], dtype="Int64"),
            "sent": [0.0, 4.0],
            "finish": [5.0, 10.0],
            "prompt_tokens": [100, 50],
            "cached_tokens": pd.array([80, 0], dtype="Int64"),
            "preemptions": [1, 0],
            "status": ["finished", "failed"],
        }
    )
    rows = [
        (0, 0.0, 5.0, 150, 1, 0, 0, 2, 1, 0.4, 0, 1, 0),
        (1, 4.0, 6.0, 49, 1, 1, 0, 1, 0, 0.1, 0, 1, 0),
    ]
    steps = pd.DataFrame(rows, columns=list(STEP_COLUMNS))
    found = fleet_load(Run(requests, steps, pd.DataFrame(), meta={"replicas": 2}))
    first, second = found.pop("replicas")
    assert found == pytest.approx(
        {
            "send_rate": 0.25,
            "uncached_tokens_per_s": 7.0,
            "mean_kv_cache_usage": (0.2 + 0.06) / 2,
            "mean_num_running": 1.6,
            "mean_num_waiting": 0.5,
            "token_imbalance": 1.5,
        }
    )
    assert (first["requests"], first["failed"], first["computed_tokens"]) == (1, 0, 150)
    assert (second["requests"], second["failed"], second["kv_cache_usage_peak"]) == (1, 1, 0.1)


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    scenario = scenario_file(folder, **PREFIXES)
    (folder / "epp.yaml").write_text(EPP.replace("PREFIX", "precise-prefix-cache-scorer"), "utf-8")
    routers = ["--routers", str(folder / "epp.yaml"), "round-robin"]
    assert main(["compare", str(scenario), *routers, "--jobs", "1", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else {"text": out}


def test_compare_ranks_configurations_and_policies_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 prefixes of 125 blocks do not fit into 2,500, so in turn most are computed again."""
    found = compared(tmp_path, capsys, "--seeds", "3", "--json")
    assert found["labels"] == ["epp", "round-robin"]
    assert [each["stage"] for each in found["ranking"] if each["metric"] == "mean_ttft_ms"] == [
        None,
        "stage 0",
        "stage 1",
    ]
    first = found["ranking"][0]
    assert [(place["label"], place["rank"]) for place in first["places"]] == [("epp", 1), ("round-robin", 2)]
    assert first["places"][1]["behind"]["low"] > 0
    assert found["why"][0]["causes"][0].startswith("prefix hits")
    assert [len(rows) for rows in found["replicas"].values()] == [4, 4]
    rows = {each["metric"]: each for each in found["rows"] if each["stage"] == "stage 1"}
    assert rows["uncached_tokens_per_s"]["values"][0] < rows["uncached_tokens_per_s"]["values"][1]


def test_compare_writes_a_report_with_its_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "routers.html"
    text = compared(tmp_path, capsys, "--seeds", "2", "--report", str(report))["text"]
    assert "Replicas behind epp" in text
    assert "mean_ttft_ms: round-robin is behind epp: prefix hits" in text
    page = report.read_text("utf-8")
    for title in ("Places", "Against the request rate", "Waiting requests", "KV cache in use", "Replicas"):
        assert title in page
    assert page.count("<svg") == 8  # four against the rate, and two a router over time
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "random", "random"], "--routers: a router is named twice"),
        (["--routers", "random", "EPP"], "plugins.1.type: unknown plugin 'que-scorer'"),
    ],
)
def test_bad_comparisons_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = scenario_file(tmp_path, **PREFIXES)
    (tmp_path / "epp.yaml").write_text(EPP.replace("PREFIX", "que-scorer"), "utf-8")
    arguments = [str(tmp_path / "epp.yaml") if each == "EPP" else each for each in arguments]
    assert main(["compare", str(scenario), *arguments]) == 2
    assert message in capsys.readouterr().err
