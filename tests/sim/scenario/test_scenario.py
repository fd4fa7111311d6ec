"""Shipped scenarios, overrides, and what a scenario makes of its parts."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_scenarios import MINIMAL

from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.reported import Reported, ReportedRow, read_rows, stage_of
from servecast.sim.scenario.scenario import Scenario, load, shipped_folder, shipped_scenarios
from servecast.sim.traffic.arrivals import ClosedLoop, Constant, Poisson
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.lengths import Fixed

L4, A6000 = "l4-qwen2.5-0.5b", "a6000-qwen2.5-7b"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def table(scenario: Scenario, name: str) -> Reported:
    return next(table for table in scenario.reported if table.name == name)


def row_at(scenario: Scenario, name: str, **keys: Any) -> ReportedRow:
    return next(row for row in read_rows(table(scenario, name)) if row.keys == keys)


@pytest.mark.parametrize("name", shipped_scenarios())
def test_every_shipped_scenario_says_how_it_was_measured_and_what_it_assumes(name: str) -> None:
    scenario = load(name)
    assert scenario.name == name
    if not scenario.reported:  # a what-if: nobody ran it
        assert scenario.run_context is None
        return
    assert scenario.run_context is not None
    assert all(scenario.run_context.model_dump(exclude={"notes"}).values())
    assert scenario.assumptions
    for assumption in scenario.assumptions:
        value: Any = scenario
        for part in (assumption.field or "").split(".") if assumption.field else []:
            value = getattr(value, part)
        if isinstance(value, Fixed):
            value = value.tokens
        assert value is scenario or value == assumption.value, assumption.name


@pytest.mark.parametrize("name", shipped_scenarios())
def test_every_reported_row_has_its_stage_and_most_are_predicted(name: str) -> None:
    scenario = load(name)
    for reported in scenario.reported:
        rows = read_rows(reported)
        load_of_table = scenario.workload_of(reported)
        if reported.routers:  # a row a router; a warm-up has none
            rows = [row for row in rows if not row.summary]
            for row in rows:
                stage_of(reported.stage_keys(row.keys), load_of_table)
        elif reported.variants or reported.sets:
            stages = {stage_of(reported.stage_keys(row.keys), load_of_table) for row in rows}
            assert stages in ({None}, set(range(len(load_of_table.stages))))
        elif reported.parts:
            assert {stage_of(reported.stage_keys(row.keys), load_of_table) for row in rows} == {None}
        elif reported.keys:
            assert sorted(stage_of(row.keys, load_of_table) or 0 for row in rows) == list(
                range(len(load_of_table.stages))
            )
        most = len(rows) / 2 if reported.variants or reported.sets else 3 if reported.routers else 2
        assert sum(row.fit for row in rows) <= most
        stages = draw(load_of_table, seed=0)
        assert all(stream.requests for stage in stages for stream in stage.streams)


def test_the_l4_sweep_is_the_benchmarks() -> None:
    scenario = load(L4)
    sweep = table(scenario, "sweep")
    counts = [(1, 20), (2, 40), (4, 80), (8, 160), (16, 320), (32, 320)]
    streams = [stage.streams[0] for stage in scenario.stages().stages]
    assert [
        (s.arrivals.concurrency, s.num_requests) for s in streams if isinstance(s.arrivals, ClosedLoop)
    ] == counts
    assert row_at(scenario, "sweep", concurrency=32).values["output_tok_s"] == 3773
    assert row_at(scenario, "sweep", concurrency=16).values["e2e_p95_ms"] == 947
    assert sweep.percentile_law == "linear"
    excluded = {key: set(row.excluded) for row in read_rows(sweep) for key in row.keys.values()}
    assert excluded.pop(1) == {"ttft_p95_ms", "e2e_p95_ms", "req_s", "output_tok_s"}
    assert set().union(*excluded.values()) == set()
    assert row_at(scenario, "peaks").values == {
        "gpu_memory_gib": 13.9,
        "kv_usage_pct": 1.1,
        "running": 31,
        "waiting": 0,
    }


def test_the_a6000_sweep_and_drills_are_the_benchmarks() -> None:
    scenario = load(A6000)
    sweep = table(scenario, "sweep")
    counts = [(c, 12) for c in (1, 2, 4, 8)] + [(c, 512) for c in (64, 128, 256, 512)]
    streams = [stage.streams[0] for stage in scenario.stages().stages]
    assert [
        (s.arrivals.concurrency, s.num_requests) for s in streams if isinstance(s.arrivals, ClosedLoop)
    ] == counts
    assert row_at(scenario, "sweep", concurrency=512).values["goodput_pct"] == 50.0
    assert scenario.goodput_limits == Goodput((("ttft", 1000.0),))
    assert sweep.percentile_law == "exclusive"
    excluded = {key: set(row.excluded) for row in read_rows(sweep) for key in row.keys.values()}
    assert excluded.pop(1) == {"ttft_p95_s", "e2e_p95_s", "e2e_p99_s", "output_tok_s"}
    assert set().union(*excluded.values()) == set()
    assert row_at(scenario, "batching", phase="beside_long").values["ttft_p95_s"] == 0.069
    assert row_at(scenario, "prefill", input_tokens=1024).values["ttft_p95_s"] == 0.150
    assert math.isnan(row_at(scenario, "prefill", input_tokens=512).values["ttft_p95_s"])
    assert row_at(scenario, "decode", max_tokens=256).values["tpot_p50_s"] == 0.022


def test_plans_probe_fresh_open_loop_traffic() -> None:
    stream = load(A6000).open_loop().stages[0].streams[0]
    assert stream.arrivals == Poisson(kind="poisson", request_rate=1.0)
    assert stream.content is not None
    assert (stream.content.kind, stream.max_tokens, stream.prompt_tokens) == ("unique", 128, Fixed(tokens=11))


def test_an_open_loop_scenario_is_planned_as_it_is(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, MINIMAL))
    assert scenario.open_loop() == scenario.stages()
    constant = load(written(tmp_path, MINIMAL), {"plan": {"arrivals": "constant", "duration_s": 30}})
    stream = constant.open_loop().stages[0].streams[0]
    assert stream.arrivals == Constant(kind="constant", request_rate=1.0)
    assert (stream.num_requests, stream.duration_s) == (None, 30)


@pytest.mark.parametrize("field", ["arrivals", "duration_s", "num_requests"])
def test_a_field_of_the_plan_leaves_the_rest_of_the_traffic(tmp_path: Path, field: str) -> None:
    """Twenty prefixes of 3,000 tokens, bursts, and a client that sends at most 50 at once stay."""
    content = "content: {kind: shared_prefix, groups: 20, prefix_tokens: 3000}\n  max_concurrency: 50\n"
    text = MINIMAL.replace("kind: poisson,", "kind: gamma, burstiness: 0.5,") + f"  {content}"
    plain = load(written(tmp_path, text)).open_loop().stages[0].streams[0]
    value = {"arrivals": "poisson", "duration_s": 60, "num_requests": 7}[field]
    planned = load(written(tmp_path, text), {f"plan.{field}": value}).open_loop().stages[0].streams[0]
    assert (planned.content, planned.max_concurrency) == (plain.content, 50)
    assert planned.arrivals == (
        plain.arrivals if field != "arrivals" else Poisson(kind="poisson", request_rate=1)
    )


def test_overrides_replace_single_fields() -> None:
    overrides = {
        "engine.max_num_seqs": 128,
        "sweep.levels.1.num_requests": 7,
        "model.config": "Qwen2.5-32B-Instruct",
        "fleet.replicas": 2,
    }
    scenario = load(L4, overrides)
    assert scenario.engine.max_num_seqs == 128
    assert scenario.stages().stages[1].streams[0].num_requests == 7
    assert scenario.config_file().name == "Qwen2.5-32B-Instruct.json"
    assert scenario.fleet.replicas == 2
    assert load(L4).engine.max_num_seqs is None


def test_paths_are_relative_to_the_scenarios_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.json").write_text("{}")
    text = MINIMAL.replace("Qwen2.5-7B-Instruct", "models/tiny.json") + "profile: mine.json\n"
    scenario = load(written(tmp_path, text))
    assert scenario.config_file() == tmp_path / "models" / "tiny.json"
    with pytest.raises(InputError, match=r"mine\.yaml: profile: there is no profile 'mine\.json'"):
        scenario.profile_file()
    (tmp_path / "mine.json").write_text("{}")
    assert scenario.profile_file() == tmp_path / "mine.json"


def test_a_model_may_be_a_folder_or_lie_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub lays its cache out: refs/main names the snapshot, of links to blobs."""
    config = (shipped_folder() / "models" / "Qwen3-4B.json").read_text().replace("_name_or_path", "said")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(config)
    scenario = load(written(tmp_path, MINIMAL.replace("Qwen2.5-7B-Instruct", "mine")))
    assert scenario.config_file() == tmp_path / "mine" / "config.json"

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    hub = tmp_path / "home" / "hub" / "models--some--Qwen3-4B"
    wanted = load(written(tmp_path, MINIMAL.replace("Qwen2.5-7B-Instruct", "some/Qwen3-4B")))
    with pytest.raises(InputError, match=r"hf download some/Qwen3-4B config\.json"):
        wanted.config_file()
    for revision in ("aaa", "bbb"):
        (hub / "snapshots" / revision).mkdir(parents=True)
        (hub / "blobs").mkdir(exist_ok=True)
        (hub / "blobs" / revision).write_text(config)
        (hub / "snapshots" / revision / "config.json").symlink_to(hub / "blobs" / revision)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("bbb")
    assert wanted.config_file() == hub / "snapshots" / "bbb" / "config.json"
    assert ModelShape.from_config(wanted.config_file()).name == "some/Qwen3-4B"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="there is no model 'some/Qwen3-4B'"):
        wanted.config_file()


def test_shipped_configs_are_found_in_any_case(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, MINIMAL.replace("Qwen2.5-7B", "qwen2.5-7b")))
    assert scenario.config_file().name == "Qwen2.5-7B-Instruct.json"
    assert scenario.profile_file() is None


def test_tokens_that_would_be_streamed_in_lots_are_told(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, MINIMAL), {"engine.stream_interval": 4})
    (note,) = scenario.notes
    assert note.startswith("stream_interval 4 is not modelled: every token is streamed")
    assert load(written(tmp_path, MINIMAL), {"engine.stream_interval": 1}).notes == ()


def test_a_pasted_command_is_engine_configuration(tmp_path: Path) -> None:
    command = (
        '{version: "0.32", command: "vllm serve q --max-num-seqs 64 --no-enable-prefix-caching --port 80"}'
    )
    scenario = load(
        written(tmp_path, MINIMAL.replace('{version: "0.32"}', command)), {"engine.max_num_seqs": 32}
    )
    engine = scenario.engine
    assert (engine.max_num_seqs, engine.enable_prefix_caching) == (32, False)
    assert scenario.notes == ("flags without effect here: --port",)
    assert engine.serve_command is not None
    assert engine.serve_command.model == "q"


def test_slos_are_parsed() -> None:
    assert load(A6000).slos == (SLO("ttft", 95.0, 500.0), SLO("tpot", 95.0, 60.0))
    assert [str(SLO.parse(text)) for text in ("TTFT:P99.9:5e2", "e2e:mean:1500.5")] == [
        "ttft:p99.9:500",
        "e2el:mean:1500.5",
    ]
    assert str(Goodput.parse("ttft:500 tpot:50.5")) == "ttft:500 tpot:50.5"


def test_scenarios_are_frozen_and_cross_processes() -> None:
    scenario = load(A6000)
    again = pickle.loads(pickle.dumps(scenario))
    assert again == scenario
    assert again.source == scenario.source
    with pytest.raises(ValueError, match="frozen"):
        scenario.seed = 3  # type: ignore[misc]


def test_no_key_may_come_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 11: not valid YAML: the key 'name' comes twice"):
        load(written(tmp_path, MINIMAL + "name: again\n"))


def test_the_json_schema_knows_fields_and_short_forms() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "servecast.sim.scenario.scenario"], capture_output=True, text=True, check=True
    )
    schema = json.loads(printed.stdout)
    assert schema == Scenario.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(EngineFlags.model_fields) == set(schema["$defs"]["EngineFlags"]["properties"])
    text = json.dumps(schema["$defs"])
    assert '{"minimum": 1, "type": "integer"}' in json.dumps(schema, sort_keys=True)
    assert '{"enum": ["repeat"]}' in text


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (L4, "workload.suffix_tokens"),
        (A6000, "engine.max_num_seqs"),
        ("llmd-4x-llama-3.1-70b-tp4-h100", "fleet.replicas"),
    ],
)
def test_a_change_is_what_the_file_would_be_with_it(name: str, field: str) -> None:
    """Also beside a length in short, or beside the path of a router's configuration."""
    assert load(name).changed({field: 3}) == load(name, {field: 3})


@pytest.mark.parametrize(("field", "value"), [("sets", {"conc": ["seed"]}), ("groups", ["gpu"])])
def test_columns_that_a_table_lacks_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match="there is no column"):
        load(L4, {f"reported.0.{field}": value})
