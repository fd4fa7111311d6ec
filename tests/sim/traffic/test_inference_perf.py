"""inference-perf: its workload file, and its report's columns, each case worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from small_scenarios import small

from servecast.sim.engine.request import Stage
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import gauges_at
from servecast.sim.metrics.records import STEP_COLUMNS, Run
from servecast.sim.reproduce import inference_perf as inference_perf_report
from servecast.sim.reproduce.values import summed_up
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.reported import Column
from servecast.sim.scenario.scenario import Scenario, load
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.spec import Polling

FILE: dict[str, Any] = {
    "load": {"type": "constant", "interval": 2.0, "stages": [{"rate": 2, "duration": 10}]},
    "api": {"type": "completion", "streaming": True},
    "server": {"type": "vllm", "model_name": "m", "base_url": "<endpoint>", "ignore_eos": True},
    "tokenizer": {"pretrained_model_name_or_path": "m"},
    "data": {
        "type": "shared_prefix",
        "shared_prefix": {
            "num_groups": 3,
            "num_prompts_per_group": 2,
            "system_prompt_len": 100,
            "question_len": 50,
            "output_len": 4,
        },
    },
    "report": {"request_lifecycle": {"summary": True}},
    "storage": {"local_storage": {"path": "/workspace"}},
}


def scenario(tmp_path: Path, file: dict[str, Any], **more: Any) -> Scenario:
    (tmp_path / "perf.yaml").write_text(yaml.safe_dump(file))
    return small(tmp_path, name="scenario", workload={"inference_perf": "perf.yaml", **more})


def changed(path: str, value: Any) -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load(yaml.safe_dump(FILE))
    node = file
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return file


def drawn(of: Scenario) -> list[Stage]:
    return draw(of.stages(), seed=1)


def test_the_report_s_own_file_loads_as_written() -> None:
    """Rates and durations of the llm-d report; 9 x 30 = 270 requests of warm-up, then 630, 720, ... 1,000."""
    found = load("llmd-4x-llama-3.1-70b-tp4-h100", {"profile": None}).stages()
    assert [stage.row for stage in found.stages] == [{"qps": q} for q in (9, 3, 4, 5, 6, 8, 10, 12, 15, 20)]
    stages = drawn(load("llmd-4x-llama-3.1-70b-tp4-h100", {"profile": None}))
    sizes = [len(stage.streams[0].requests) for stage in stages]
    assert sizes == [270, 630, 720, 600, 720, 720, 700, 720, 750, 1000]
    request = stages[0].streams[0].requests[0]
    assert (request.prompt_tokens, request.output_tokens) == (9396, 1000)
    assert [end for _, end in request.content] == [8352, 9396]


def test_prompts_are_shuffled_once_and_start_anew_in_every_stage(tmp_path: Path) -> None:
    """Six prompts, 20 requests: prompt n mod 6. A second stage starts with the first prompt again."""
    stages = [{"rate": 2, "duration": 10}, {"rate": 1, "duration": 8}]
    first, second = drawn(scenario(tmp_path, changed("load.stages", stages)))
    prompts = [request.content for request in first.streams[0].requests]
    assert len(set(prompts)) == 6
    assert prompts == (prompts[:6] * 4)[:20]
    assert [request.content for request in second.streams[0].requests] == prompts[:8]
    assert sorted(request.group or 0 for request in first.streams[0].requests[:6]) == [0, 0, 1, 1, 2, 2]


def test_constant_load_ends_with_its_duration_after_a_second_of_pause(tmp_path: Path) -> None:
    """20 exponential gaps rescaled to 10 s: the last request comes at 11 s, the gaps are not equal."""
    (stage,) = drawn(scenario(tmp_path, FILE))
    times = [request.arrival_s for request in stage.streams[0].requests]
    assert len(times) == 20
    assert times[0] > 1.0
    assert times[-1] == pytest.approx(11.0)
    assert np.std(np.diff(times)) > 0.2


def test_the_next_stage_waits_for_the_drain_a_look_and_the_interval(tmp_path: Path) -> None:
    """Sends until 11 s, then looks at 11, 12, ... s; with ``interval: 2`` the next stage starts 2 s after the
    look that finds all done."""
    polling = Polling(after_s=11.0, every_s=1.0, pause_s=2.0)
    assert polling.end_s(10.5) == 13.0
    assert polling.end_s(11.0) == 13.0
    assert polling.end_s(11.01) == 14.0
    stages = [{"rate": 2, "duration": 10}, {"rate": 2, "duration": 10}]
    run = simulate(scenario(tmp_path, changed("load.stages", stages)))
    first = run.requests[run.requests["stage"] == 0]
    assert 11.0 < first["finish"].max() < 12.0
    assert run.meta["stage_starts_s"] == [0.0, 14.0]


def test_workers_bound_what_is_in_flight(tmp_path: Path) -> None:
    """2 workers of 3: six requests in flight. Without num_workers nothing says how many there are."""
    file = changed("load.num_workers", 2)
    file["load"]["worker_max_concurrency"] = 3
    (stage,) = drawn(scenario(tmp_path, file))
    assert stage.streams[0].max_concurrency == 6
    (stage,) = drawn(scenario(tmp_path, FILE))
    assert stage.streams[0].max_concurrency is None


def test_lengths_are_those_of_the_text_encoded_again(tmp_path: Path) -> None:
    """1.1 tokens each: 110 of prefix, 55 of question."""
    (stage,) = drawn(scenario(tmp_path, FILE, prompt_tokens_each=1.1))
    request = stage.streams[0].requests[0]
    assert request.prompt_tokens == 165
    assert request.content[0][1] == 110


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("load.stages", [], "load.stages"),
        ("load.stages", [{"rate": -1, "duration": 3}], "load.stages.0.rate"),
        ("load.stages", [{"rate": 1, "durations": 3}], "unknown field 'durations'.*Did you mean 'duration'"),
        ("load.type", "concurrent", "type cannot be 'concurrent'.*constant, poisson"),
        ("load.sweep", {"type": "linear"}, "unknown field 'sweep'"),
        ("data.type", "random", "type cannot be 'random'.*shared_prefix"),
        ("data.shared_prefix.num_group", 3, "unknown field 'num_group'.*Did you mean 'num_groups'"),
        ("data.shared_prefix.enable_multi_turn_chat", True, "enable_multi_turn_chat"),
        ("api.type", "chat", "type cannot be 'chat'"),
        ("server.ignore_eos", False, "without ignore_eos"),
        ("vllm", {}, "unknown field 'vllm'"),
    ],
)
def test_what_is_wrong_or_not_modelled_is_refused(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        scenario(tmp_path, changed(field, value))
    assert "perf.yaml" in str(raised.value)


def test_no_sweep_over_a_file(tmp_path: Path) -> None:
    scenario(tmp_path, FILE)
    with pytest.raises(InputError, match="a sweep over several stages"):
        load(tmp_path / "scenario.yaml", {"sweep": {"levels": [{"request_rate": 1.0}]}})


def made_run() -> Run:
    """Two requests. The first is sent at 1 s, gets its 4 tokens at 2, 3, 4 and 5 s; the second is sent at 3 s
    and gets 2 tokens at 6 and 10 s. One engine, a step a token, and nothing to do between 6 and 9 s."""
    requests = pd.DataFrame(
        {
            "arrival": [1.0, 3.0],
            "sent": [1.0, 3.0],
            "first_token": [2.0, 6.0],
            "finish": [5.0, 10.0],
            "output_tokens": [4, 2],
            "status": ["finished", "finished"],
        }
    )
    itl = pd.DataFrame({"stage": [0, 0], "gap": [1.0, 4.0], "weight": [3.0, 1.0]})
    steps = pd.DataFrame(0, index=range(6), columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)
    steps["start"], steps["duration"], steps["emitted"] = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], 1.0, 1
    steps["waiting"] = [0, 0, 1, 1, 0, 0]
    return Run(requests, steps, itl, meta={"replicas": 2})


def reported(metric: str, statistic: str | None = None) -> float:
    column = Column.model_validate(
        {"metric": metric, "statistic": statistic, "unit": "s" if statistic else "req/s"}
    )
    return inference_perf_report.measure(made_run(), column, output_tokens_each=0.5)


def true(metric: str, statistic: str | None = None) -> float:
    column = Column.model_validate(
        {"metric": metric, "statistic": statistic, "unit": "s" if statistic else "req/s"}
    )
    return inference_perf_report.true_value(made_run(), column)


def test_a_time_for_each_line_halves_the_gaps() -> None:
    """Four tokens are 10 lines, 9 gaps: 3 of 1 s and 6 of 0; two tokens are 6 lines, 5 gaps: one of 4 s, 4 of
    0. The mean of the 14 is 7 / 14 s, their median 0; the true ones are 7 / 4 s and 1 s."""
    assert reported("itl", "mean") == pytest.approx(0.5)
    assert reported("itl", "p50") == 0.0
    assert true("itl", "mean") == pytest.approx(7 / 4)
    assert true("itl", "p50") == 1.0


def test_tpot_is_over_the_lines() -> None:
    """3 s over 9 gaps and 4 s over 5; truly over 3 and 1."""
    assert reported("tpot", "mean") == pytest.approx((3 / 9 + 4 / 5) / 2)
    assert true("tpot", "mean") == pytest.approx((1.0 + 4.0) / 2)


def test_throughput_has_the_drain_in_it() -> None:
    """6 tokens, of which half is counted, from 1 to 10 s. While requests were sent, 1 to 3 s: two tokens."""
    assert reported("output_throughput") == pytest.approx(3 / 9)
    assert true("output_throughput") == pytest.approx(2 / 2)


def test_requests_a_second_are_those_sent() -> None:
    """Two requests, 2 s apart: 1 a second. They were served in 9 s."""
    assert reported("request_throughput") == pytest.approx(1.0)
    assert true("request_throughput") == pytest.approx(2 / 9)


def test_gauges_at_given_times() -> None:
    """The waiting request is seen at 3.5 s, not before and after; an engine without a step shows 0."""
    seen = gauges_at(made_run(), "waiting", np.array([0.5, 1.5, 3.5, 7.0, 9.5]))
    assert seen.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_summary_rows() -> None:
    """Two stages of 100 and 300 requests at 2 and 6 a second: 400 in 100 s. Throughputs count alike, the
    latency by requests."""
    table = load("llmd-4x-llama-3.1-70b-tp4-h100", {"profile": None}).reported[0]
    columns = ["output_tok_s", "req_s", "ttft_mean_s", "itl_mean_s"]
    first = {
        "output_tok_s": (10.0, None),
        "req_s": (2.0, 1.0),
        "ttft_mean_s": (1.0, None),
        "itl_mean_s": (1.0, 2.0),
    }
    second = {
        "output_tok_s": (20.0, None),
        "req_s": (6.0, 3.0),
        "ttft_mean_s": (3.0, None),
        "itl_mean_s": (2.0, 4.0),
    }
    stages = [(100, first), (300, second)]
    found = summed_up(columns, table, stages)
    assert found["output_tok_s"] == (15.0, None)
    assert found["req_s"] == (pytest.approx(4.0), pytest.approx(2.0))
    assert found["ttft_mean_s"] == (pytest.approx(2.5), None)
    assert found["itl_mean_s"] == (pytest.approx(1.75), pytest.approx(3.5))
