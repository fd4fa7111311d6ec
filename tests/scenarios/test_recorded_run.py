"""A recorded run beside a simulated one: its clocks, parts of its requests, a cold engine, data elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_scenarios import scenario_file

from servecast.scenarios.make.recorded_run import fit_host, read_run, table_of
from servecast.sim.hardware.profile import Profile
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import latencies
from servecast.sim.reproduce.reproduce import reproduce
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import load

WALL, MONOTONIC = 1_700_000_000.0, 500.0
REQUESTS = [  # arrival, queued, first token, last token (s from the start), prompt, output
    (0.5, 0.75, 1.0, 2.0, 100, 11),
    (1.0, 1.0, 2.0, 4.0, 50, 21),
    (2.0, 2.5, 6.0, 6.0, 30, 1),
]
COLUMNS = {
    "makespan_s": {"metric": "makespan", "unit": "s"},
    "e2e_mean_ms": {"metric": "e2el", "statistic": "mean", "unit": "ms"},
    "ttft_mean_ms": {"metric": "ttft", "statistic": "mean", "unit": "ms"},
}
PARTS = [
    {"row": {"requests": "first-1"}, "requests": [0, 1]},
    {"row": {"requests": "last-2"}, "requests": [1, 3]},
]


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recorded(folder: Path) -> Path:
    lines(
        folder / "workload.jsonl",
        [
            {
                "arrival_time_ns": int(1e9 * arrival),
                "input_toks": prompt,
                "output_toks": output,
                "hash_ids": list(range(prompt // 16)),
            }
            for arrival, _, _, _, prompt, output in REQUESTS
        ],
    )
    lines(
        folder / "requests.jsonl",
        [
            {
                "request_id": f"bench-{number}",
                "input_toks": prompt,
                "output_toks": output,
                "arrival_time": WALL + arrival,
                "queued_ts": MONOTONIC + queued,
                "scheduled_ts": MONOTONIC + queued,
                "first_token_ts": MONOTONIC + first,
                "last_token_ts": MONOTONIC + last,
            }
            for number, (arrival, queued, first, last, prompt, output) in enumerate(REQUESTS)
        ],
    )
    return folder


def scenario(folder: Path, **changes: Any) -> Path:
    """The recorded traffic, simulated; its one reported table has a row for each part."""
    recorded(folder)
    (folder / "table.csv").write_text(
        "requests,makespan_s,e2e_mean_ms,ttft_mean_ms\nall,5.5,1,1\nfirst-1,1,1,1\nlast-2,1,1,1\n"
    )
    sections: dict[str, Any] = {
        "name": "recorded",
        "workload": {"trace": {"format": "llmservingsim", "path": "workload.jsonl", "first_at_zero": False}},
        "reported": [
            {
                "table": "table.csv",
                "keys": ["requests"],
                "columns": COLUMNS,
                "parts": PARTS,
                "fit_rows": [{"requests": "first-1"}],
            }
        ],
    }
    return scenario_file(folder, **sections | changes)


def test_the_two_clocks_are_aligned_where_a_request_was_queued_soonest(tmp_path: Path) -> None:
    """The second was queued at once; the table is in seconds of the workload."""
    requests = read_run(recorded(tmp_path)).requests
    for name, at in (("sent", 0), ("queued", 1), ("first_token", 2), ("finish", 3)):
        assert requests[name].to_list() == pytest.approx([row[at] for row in REQUESTS], abs=1e-6), name
    assert latencies(requests)["tpot"].to_list()[:2] == pytest.approx([0.1, 0.1], abs=1e-6)


def test_the_reported_table_is_summed_up_from_the_run(tmp_path: Path) -> None:
    loaded = load(scenario(tmp_path))
    rows = table_of(read_run(tmp_path), loaded.reported[0], Deployment.of(loaded))
    assert rows == [
        {"requests": "all", "makespan_s": "5.5", "e2e_mean_ms": "2833.33", "ttft_mean_ms": "1833.33"},
        {"requests": "first-1", "makespan_s": "1.5", "e2e_mean_ms": "1500", "ttft_mean_ms": "500"},
        {"requests": "last-2", "makespan_s": "5", "e2e_mean_ms": "3500", "ttft_mean_ms": "2500"},
    ]


def test_a_row_is_about_its_part_of_the_requests(tmp_path: Path) -> None:
    loaded = load(scenario(tmp_path))
    sent = simulate(loaded).requests
    took = (sent["finish"] - sent["sent"]).to_list()
    table = reproduce(loaded, seeds=1).tables[0]
    found = {(str(c.keys["requests"]), c.metric): c.predicted for c in table.cells}
    assert found["all", "e2e_mean_ms"] == pytest.approx(1000 * sum(took) / 3)
    assert found["first-1", "e2e_mean_ms"] == pytest.approx(1000 * took[0])
    assert found["last-2", "e2e_mean_ms"] == pytest.approx(500 * sum(took[1:]))
    assert found["last-2", "makespan_s"] == pytest.approx(sent["finish"].max() - 1.0)
    assert table.rows("fit") == [{"requests": "first-1"}]


@pytest.mark.parametrize(
    ("requests", "message"),
    [([3, 3], "reported.0.parts.0.requests: a part without requests"), ([3, 9], "leaves none of 3 requests")],
)
def test_a_part_without_requests_is_refused(requests: list[int], message: str, tmp_path: Path) -> None:
    path = scenario(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["reported"][0]["parts"] = [{"row": {"requests": "first-1"}, "requests": requests}, *PARTS[1:]]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=message):
        reproduce(load(path), seeds=1)


def spoil(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        change(records)
        lines(folder / name, records)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "requests.jsonl").unlink(), "requests.jsonl: cannot be read"),
        (lambda folder: (folder / "requests.jsonl").write_text('{"a": '), "requests.jsonl: cannot be read"),
        (lambda folder: (folder / "requests.jsonl").write_text(""), "no 'arrival_time'"),
        (
            spoil("requests.jsonl", lambda rows: [row.pop("queued_ts") for row in rows]),
            "no 'queued_ts'",
        ),
        (spoil("requests.jsonl", lambda rows: rows.pop()), "hold different requests"),
        (spoil("workload.jsonl", lambda rows: rows[0].update(input_toks=7)), "hold different requests"),
        (spoil("requests.jsonl", lambda rows: rows[1].update(last_token_ts=None)), "without 'last_token_ts'"),
    ],
)
def test_a_run_that_is_wrong_is_refused(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    change(recorded(tmp_path))
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)


def test_a_cold_start_delays_the_first_step_and_the_decision_of_the_second(tmp_path: Path) -> None:
    """The second request, sent half a second after the first, is there when the second step is decided."""
    warm, cold = (
        simulate(load(scenario(tmp_path, fleet={"cold_start_s": seconds}))) for seconds in (0.0, 0.6)
    )
    assert cold.requests["scheduled"][0] == pytest.approx(warm.requests["scheduled"][0] + 0.6)
    assert cold.steps["duration"][0] == warm.steps["duration"][0]
    assert cold.steps["decodes"][1] + cold.steps["prefill_requests"][1] == 2
    assert warm.steps["decodes"][1] + warm.steps["prefill_requests"][1] == 1


def test_host_times_are_recovered_from_the_first_requests(tmp_path: Path) -> None:
    """From a simulated run with known host times."""
    loaded = load(scenario(tmp_path))
    typical = Deployment.of(loaded).profile
    made = typical.model_dump() | {"efficiencies": {**typical.model_dump()["efficiencies"]}}
    made["efficiencies"]["host_fixed_s"] = 2e-3
    cold = load(scenario(tmp_path, fleet={"cold_start_s": 0.4}))
    run = simulate(Deployment.of(cold, Profile.model_validate(made)))
    found = fit_host(loaded, typical, run, first=2)
    assert found.host_fixed_s == pytest.approx(2e-3, rel=0.02)
    assert found.cold_start_s == pytest.approx(0.4, rel=0.02)


def test_a_scenario_replays_the_recorded_traffic(tmp_path: Path) -> None:
    requests = simulate(load(scenario(tmp_path))).requests
    assert requests["arrival"].to_list() == pytest.approx([row[0] for row in REQUESTS])
    assert requests["prompt_tokens"].to_list() == [row[4] for row in REQUESTS]


def test_a_trace_that_is_absent_is_missed_at_once(tmp_path: Path) -> None:
    path = scenario(tmp_path, workload={"trace": {"format": "llmservingsim", "path": "elsewhere.jsonl"}})
    with pytest.raises(InputError, match=r"there is no file .*elsewhere.jsonl.* relative to the scenario"):
        load(path)
