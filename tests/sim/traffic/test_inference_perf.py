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
from servecast.sim.traffic.inference_perf.file import LoadSweep
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
        ("load.stages", [{"rate": 1}], "duration is missing in a stage of a constant load"),
        (
            "load.stages",
            [{"rate": 1, "duration": 3, "num_requests": 9}],
            "num_requests in a stage of a constant",
        ),
        ("load.type", "concurrent", "num_requests is missing in a stage of a concurrent load"),
        ("load.type", "trace_session_replay", "type cannot be.*constant, poisson, concurrent"),
        ("load.sweep", {"type": "cubic"}, "load.sweep.type.*geometric, linear"),
        ("load.lora_traffic_split", [{"name": "a", "split": 1.0}], "LoRA adapters are not modelled"),
        ("data.type", "random", "data.input_distribution.*random data needs it"),
        ("data.type", "shareGPT", "data.type shareGPT is not modelled: it downloads its prompts"),
        ("data.type", "cnn_dailymail", "data.type cnn_dailymail is not modelled: it downloads"),
        ("data.type", "conversation_replay", "as workload.sessions"),
        ("data.type", "sharedPrefix", "Did you mean 'shared_prefix'"),
        ("data.multimodal", {"image": {"count": 1}}, "multimodal inputs are not modelled"),
        ("data.shared_prefix.system_prompt_len", {"mean": 9}, "prefixes of different lengths are not"),
        ("data.shared_prefix.num_unique_system_prompts", 3, "num_unique_system_prompts beside num_groups"),
        ("api.response_format", {"type": "json_object"}, "guided decoding is not modelled"),
        ("data.shared_prefix.num_group", 3, "unknown field 'num_group'.*Did you mean 'num_groups'"),
        ("api.type", "chat", "Give it as workload.chat_template_tokens"),
        ("api.type", "anthropic_messages", "type cannot be 'anthropic_messages'"),
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


DATA = {"input_distribution": {"min": 10, "max": 100, "mean": 50, "std_dev": 10, "total_count": 10},
        "output_distribution": {"min": 10, "max": 100, "mean": 50, "std_dev": 10}}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    {
        "names of today": {
            "data.shared_prefix.num_groups": None,
            "data.shared_prefix.num_prompts_per_group": None,
            "data.shared_prefix.num_unique_system_prompts": 3,
            "data.shared_prefix.num_users_per_system_prompt": 2,
        },
        "nulls": {
            "load.sweep": None,
            "load.request_timeout": None,
            "load.num_workers": None,
            "load.circuit_breakers": [],
            "api.headers": None,
            "data.path": None,
            "data.input_distribution": None,
            "data.shared_prefix.multimodal": None,
            "data.shared_prefix.enable_multi_turn_chat": False,
            "data.conversation_replay": {"num_conversations": 200},
            "data.use_chat_template": False,
            "metrics": None,
        },
        "client": {"load.base_seed": 42, "data.shared_prefix.seed": 7, "load.worker_max_tcp_connections": 10},
        "a word for the API": {"api": "completion"},
    }.items(),
    ids=lambda change: change[0],
)
def test_other_spellings_of_one_file_are_the_same_requests(
    tmp_path: Path, change: tuple[str, dict[str, Any]]
) -> None:
    """What inference-perf of today writes when it resolves its defaults, and fields that are the client's."""
    stages = drawn(scenario(tmp_path, FILE))
    file: dict[str, Any] = yaml.safe_load(yaml.safe_dump(FILE))
    for path, value in change[1].items():
        node = file
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
    other = drawn(scenario(tmp_path, file))
    assert other[0].streams[0].requests == stages[0].streams[0].requests


def test_what_has_no_effect_is_told(tmp_path: Path) -> None:
    file = changed("load.base_seed", 42)
    file["load"]["circuit_breakers"] = ["slow"]
    assert scenario(tmp_path, file).notes[-1] == (
        "perf.yaml: without effect here: load.base_seed (the scenario has the seed); "
        "load.circuit_breakers (no stage is cut short)"
    )


@pytest.mark.parametrize("kind", ["random", "synthetic"])
def test_random_and_synthetic_data_have_lengths_of_their_own(tmp_path: Path, kind: str) -> None:
    """2,000 lengths of 10 to 100 tokens, mean 50 and standard deviation 10: the mean of 2,000 is off by 0.22.
    No two prompts have anything in common."""
    file = changed("data", {"type": kind, **DATA})
    file["load"]["stages"] = [{"rate": 100, "duration": 20}]
    (stage,) = drawn(scenario(tmp_path, file))
    requests = stage.streams[0].requests
    for lengths in ([each.prompt_tokens for each in requests], [each.output_tokens for each in requests]):
        assert min(lengths) >= 10
        assert max(lengths) <= 100
        assert np.mean(lengths) == pytest.approx(50, abs=0.9)
        assert np.std(lengths) == pytest.approx(10, abs=0.7)
    assert {each.content for each in requests} == {()}


@pytest.mark.parametrize(
    ("law", "mean", "std"),
    [
        ({"type": "uniform", "min": 10, "max": 110}, 60, 100 / 12**0.5),
        ({"type": "lognormal", "min": 10, "max": 9999, "mean": 60, "std_dev": 25}, 60, 25),
        ({"type": "fixed", "min": 1, "max": 2, "mean": 60}, 60, 0),
        ({"type": "normal", "min": 1, "max": 999, "mean": 60, "variance": 25}, 60, 200),
    ],
)
def test_lengths_follow_their_law(tmp_path: Path, law: dict[str, Any], mean: float, std: float) -> None:
    """A uniform between 10 and 110 has a mean of 60 and a standard deviation of 100 / sqrt(12). A fixed one
    ignores its bounds. A variance stands for std_dev, 5 for 25."""
    file = changed("data", {"type": "random", "input_distribution": law, "output_distribution": law})
    file["load"]["stages"] = [{"rate": 500, "duration": 10}]
    (stage,) = drawn(scenario(tmp_path, file))
    lengths = [each.prompt_tokens for each in stage.streams[0].requests]
    assert np.mean(lengths) == pytest.approx(mean, abs=1.5)
    assert np.std(lengths) == pytest.approx(5 if "variance" in law else std, abs=1.5)


def test_the_first_releases_ignored_std(tmp_path: Path) -> None:
    """Their own examples write ``std: 10``, a field that is not read, so that std_dev stays 200: of a normal
    of mean 50 cut to 10..100, 0.421 lie below 10 and 0.401 above 100."""
    law = {"min": 10, "max": 100, "mean": 50, "std": 10}
    file = changed("data", {"type": "random", "input_distribution": law, "output_distribution": law})
    file["load"]["stages"] = [{"rate": 500, "duration": 10}]
    found = scenario(tmp_path, file)
    lengths = [each.prompt_tokens for each in drawn(found)[0].streams[0].requests]
    assert lengths.count(10) / 5000 == pytest.approx(0.421, abs=0.03)
    assert lengths.count(100) / 5000 == pytest.approx(0.401, abs=0.03)
    assert "std (inference-perf does not read it: std_dev is 200 unless written)" in found.notes[-1]


def test_questions_and_outputs_may_follow_a_law(tmp_path: Path) -> None:
    """Six prompts of 20 to 40 tokens behind 100 of prefix; the older field says the same."""
    law = {"type": "uniform", "min": 20, "max": 40}
    for field in ("question_len", "question_distribution"):
        (stage,) = drawn(scenario(tmp_path, changed(f"data.shared_prefix.{field}", law)))
        lengths = [each.prompt_tokens - 100 for each in stage.streams[0].requests]
        assert len(set(lengths)) > 1
        assert min(lengths) >= 20
        assert max(lengths) <= 40
        assert lengths[6:12] == lengths[:6]


def test_a_concurrent_load_is_a_closed_loop(tmp_path: Path) -> None:
    """40 requests, never more than 8 in flight; a client that resolved the file adds rate and duration."""
    stage = {"num_requests": 40, "concurrency_level": 8, "rate": 40, "duration": 1}
    file = changed("load", {"type": "concurrent", "stages": [stage, {**stage, "concurrency_level": 2}]})
    found = scenario(tmp_path, file)
    assert [each.row for each in found.stages().stages] == [{"concurrency": 8}, {"concurrency": 2}]
    run = simulate(found)
    first = run.requests[run.requests["stage"] == 0]
    assert len(first) == 40
    assert first["sent"].min() == 1.0
    in_flight = [((first["sent"] <= at) & (first["finish"] > at)).sum() for at in first["sent"]]
    assert max(in_flight) == 8


def test_a_timeout_is_the_client_s_patience(tmp_path: Path) -> None:
    (stage,) = drawn(scenario(tmp_path, changed("load.request_timeout", 30)))
    assert {each.abort_after_s for each in stage.streams[0].requests} == {30.0}


def test_a_chat_template_s_tokens_are_part_of_each_prompt(tmp_path: Path) -> None:
    (stage,) = drawn(scenario(tmp_path, changed("api.type", "chat"), chat_template_tokens=12))
    assert {each.prompt_tokens for each in stage.streams[0].requests} == {162}


@pytest.mark.parametrize(
    ("kind", "rates"), [("linear", [1, 10.75, 20.5, 30.25, 40]), ("geometric", [1, 25.09, 34.68, 38.49, 40])]
)
def test_a_sweep_goes_up_to_the_saturation_rate(tmp_path: Path, kind: str, rates: list[float]) -> None:
    """Five stages to 40 requests/s: equal steps, or 1 + 40 - 40^(k/4): 2.51, 6.32, 15.91 for k = 1, 2, 3."""
    load_of = {"type": "constant", "sweep": {"type": kind, "stage_duration": 10}}
    found = scenario(tmp_path, changed("load", load_of), saturation_rate=40.0).stages()
    assert [each.row["qps"] for each in found.stages if each.row] == rates
    assert {each.streams[0].duration_s for each in found.stages} == {10.0}


def test_the_saturation_rate_is_how_fast_the_burst_drains() -> None:
    """Ten requests in flight at once, of which one is done each 0.1 s from 1 s on: requests in flight fall by
    5 in each half second, 10 a second. With one request there are no two falls."""
    sweep = LoadSweep(type="linear")
    sent = np.zeros(10)
    assert sweep.saturation_rate(sent, 1.05 + 0.1 * np.arange(10)) == 10.0
    assert sweep.saturation_rate(sent[:1], np.array([1.0])) is None


def test_a_sweep_asks_the_simulated_server(tmp_path: Path) -> None:
    """Four at a time, 100 tokens each: the server drains the burst of 200 requests at one rate, and the last
    stage is at the rate at which requests of a closed loop of four come through, within a tenth."""
    sweep = {"type": "linear", "num_requests": 200, "num_stages": 2, "stage_duration": 1,
             "saturation_percentile": 50}  # fmt: skip
    file = changed("load", {"type": "constant", "sweep": sweep})
    file["data"]["shared_prefix"]["output_len"] = 100
    engine = {"version": "0.32", "max_num_seqs": 4}
    (tmp_path / "perf.yaml").write_text(yaml.safe_dump(file))
    found = small(tmp_path, name="sweep", engine=engine, workload={"inference_perf": "perf.yaml"})
    run = simulate(found)
    assert run.stages == simulate(found, seed=5).stages
    assert run.stages[0] == "stage 0 qps=1"
    last = float(run.stages[-1].removeprefix("stage 1 qps="))
    (tmp_path / "perf.yaml").write_text(
        yaml.safe_dump(
            file | {"load": {"type": "concurrent", "stages": [{"num_requests": 200, "concurrency_level": 4}]}}
        )
    )
    closed = simulate(small(tmp_path, name="closed", engine=engine, workload={"inference_perf": "perf.yaml"}))
    took = closed.requests["finish"].max() - closed.requests["sent"].min()
    assert last == pytest.approx(200 / took, rel=0.1)


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
