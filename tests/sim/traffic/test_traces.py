"""Trace formats: reading, writing, and replaying in a workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import DATA

from servecast.sim.engine.request import Request
from servecast.sim.inputs.schema import parse
from servecast.sim.traffic.draw import draw, with_request_rate
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.spec import StreamSpec
from servecast.sim.traffic.trace_writers import WRITERS, from_requests, write_timed_trace
from servecast.sim.traffic.traces import (
    Trace,
    TraceSpec,
    read_azure,
    read_burstgpt,
    read_mooncake,
    read_timed_trace,
)

READERS = {
    "mooncake": read_mooncake,
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "timed_trace": lambda path: read_timed_trace(path, block_tokens=512),
}
TRACE = Trace(
    times_s=np.array([0.0, 0.25, 0.25, 7.125]),
    prompt_tokens=np.array([700, 1, 512, 1025]),
    output_tokens=np.array([1, 20, 3, 400]),
    hash_ids=[(0, 1), (2,), (0,), (0, 1, 9)],
)


def replayed(stream: dict[str, Any], rate: float | None = None) -> list[Request]:
    load = expand(parse(StreamSpec, stream, source="test"), None)
    if rate is not None:
        load = with_request_rate(load, rate)
    return draw(load, seed=0)[0].streams[0].requests


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    WRITERS[name](TRACE, path)
    again = READERS[name](path)
    assert again.times_s.tolist() == TRACE.times_s.tolist()
    assert again.prompt_tokens.tolist() == TRACE.prompt_tokens.tolist()
    assert again.output_tokens.tolist() == TRACE.output_tokens.tolist()
    assert again.hash_ids == (TRACE.hash_ids if name in ("mooncake", "timed_trace") else None)


def test_azure_times_count_from_the_first_request_to_100_ns(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319601,3180,8"
    )
    trace = read_azure(path)
    assert trace.times_s.tolist() == [0.0, 0.0520001]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4808, 3180], [10, 8])


def test_azure_times_may_carry_a_time_zone(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2024-05-10 00:00:0{second}.009930+00:00,10,5" for second in (0, 2)]
    path.write_text("\n".join(rows))
    assert read_azure(path).times_s.tolist() == [0.0, 2.0]


def test_burstgpt_requests_that_failed_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45.0,GPT-4,100,0,100,API log\n"
        "118,GPT-4,1087,230,1317,API log\n"
    )
    trace = read_burstgpt(path)
    assert trace.times_s.tolist() == [5.0, 118.0]
    assert trace.output_tokens.tolist() == [18, 230]


def test_timed_trace_takes_the_names_and_units_that_vllms_options_give(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"ns": 5e8, "in": 20, "out": 3, "ids": [7, 8]}\n\n{"ns": 2e9, "in": 4, "out": 1, "ids": [7]}\n'
    )
    trace = read_timed_trace(path, seconds_per_unit=1e-9, columns=("ns", "in", "out", "ids"))
    assert trace.times_s.tolist() == [0.5, 2.0]
    assert trace.hash_ids == [(7, 8), (7,)]


def test_timed_trace_gives_every_block_an_id_because_vllm_builds_prompts_from_them(tmp_path: Path) -> None:
    bare = Trace(TRACE.times_s, TRACE.prompt_tokens, TRACE.output_tokens, block_tokens=16)
    write_timed_trace(bare, tmp_path / "trace.jsonl")
    records = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [len(record["hash_ids"]) for record in records] == [44, 1, 32, 65]
    ids = [i for record in records for i in record["hash_ids"]]
    assert len(set(ids)) == len(ids)


def test_a_replayed_trace_keeps_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    WRITERS["mooncake"](TRACE, tmp_path / "trace.jsonl")
    spec = {"format": "mooncake", "path": str(tmp_path / "trace.jsonl")}
    requests = replayed({"trace": spec})
    assert [r.arrival_s for r in requests] == TRACE.times_s.tolist()
    assert [r.prompt_tokens for r in requests] == TRACE.prompt_tokens.tolist()
    assert [[end for _, end in r.content] for r in requests] == [[512, 700], [1], [512], [512, 1024, 1025]]
    assert requests[0].content[0] == requests[2].content[0] == requests[3].content[0]
    assert requests[1].content[0][0] != requests[0].content[0][0]
    assert [r.content for r in replayed({"trace": spec, "content": "unique"})] == [()] * 4


def test_a_replayed_trace_is_cut_filtered_and_stretched(tmp_path: Path) -> None:
    WRITERS["mooncake"](TRACE, tmp_path / "trace.jsonl")
    spec = {"format": "mooncake", "path": str(tmp_path / "trace.jsonl")}
    assert len(replayed({"trace": spec, "num_requests": 3})) == 3
    assert len(replayed({"trace": spec, "duration_s": 1.0})) == 3
    assert [r.prompt_tokens for r in replayed({"trace": {**spec, "max_total_tokens": 701}})] == [700, 1, 512]
    stretched = replayed({"trace": spec}, rate=2.0)
    assert [r.arrival_s for r in stretched] == pytest.approx((TRACE.times_s * 2 / 7.125).tolist())
    law = {"kind": "poisson", "request_rate": 3.0}
    poisson = replayed({"trace": spec, "arrivals": law})
    assert [r.output_tokens for r in poisson] == TRACE.output_tokens.tolist()
    assert poisson[1].arrival_s > poisson[0].arrival_s > 0


def test_the_trace_of_requests_has_equal_ids_where_blocks_are_equal() -> None:
    requests = [
        Request(0, 0.0, 40, 3, 3, content=((5, 20), (6, 40))),
        Request(1, 1.5, 50, 4, 4, content=((5, 20), (7, 36))),
        Request(2, 2.0, 32, 4, 4, content=((5, 20), (7, 32))),
        Request(3, 2.0, 40, 4, 4, content=((5, 20), (6, 40))),
    ]
    trace = from_requests(requests)
    assert trace.hash_ids == [(0, 1, 2), (0, 3, 4, 5), (0, 3), (0, 1, 2)]
    assert trace.times_s.tolist() == [0.0, 1.5, 2.0, 2.0]
    assert (trace.block_tokens, trace.prompt_tokens.tolist()) == (16, [40, 50, 32, 40])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("conversation_trace.jsonl", 7_814), ("synthetic_trace.jsonl", 7_352)],
)
def test_reads_mooncakes_traces(name: str, blocks: int) -> None:
    trace = read_mooncake(DATA / "mooncake" / name)
    assert len(trace) == 300
    assert trace.hash_ids is not None
    assert len({i for ids in trace.hash_ids for i in ids}) == blocks


@pytest.mark.parametrize(("name", "last_s"), [("code", 232.8010870), ("conv", 129.0124740)])
def test_reads_azures_traces(name: str, last_s: float, tmp_path: Path) -> None:
    trace = read_azure(DATA / "azure" / f"AzureLLMInferenceTrace_{name}.csv")
    assert len(trace) == 500
    assert trace.times_s[-1] == pytest.approx(last_s, abs=1e-7)
    WRITERS["azure"](trace, tmp_path / "again.csv")
    assert read_azure(tmp_path / "again.csv").times_s.tolist() == trace.times_s.tolist()


def test_a_public_trace_runs_as_a_workload() -> None:
    spec = {
        "format": "mooncake",
        "path": str(DATA / "mooncake" / "conversation_trace.jsonl"),
        "max_total_tokens": 32_768,
    }
    requests = replayed({"trace": spec, "num_requests": 200})
    assert len(requests) == 200
    assert max(r.prompt_tokens + r.output_tokens for r in requests) <= 32_768
    assert TraceSpec.model_validate(spec).read().hash_ids is not None
