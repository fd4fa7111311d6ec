"""Trace formats: reading, writing, and replaying in a workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import DATA
from small_scenarios import small
from trace_formats import WRITERS, read_azure, read_burstgpt, read_mooncake, read_timed_trace

import servecast
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.traffic import trace_spec
from servecast.sim.traffic.arrivals import Poisson
from servecast.sim.traffic.content import Same
from servecast.sim.traffic.draw import draw, with_request_rate
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.spec import Level, PlanSpec, StreamSpec, Sweep
from servecast.sim.traffic.trace_notes import trace_notes
from servecast.sim.traffic.trace_spec import TraceColumns, TraceSpec
from servecast.sim.traffic.trace_writers import from_requests, write_timed_trace
from servecast.sim.traffic.traces import Columns, Format, Trace, read_trace

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
    trace = read_timed_trace(path, seconds_per_unit=1e-9, columns=Columns("ns", "in", "out", "ids"))
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


def table(folder: Path, text: str, **fields: Any) -> Trace:
    """A trace out of a file with that text, as a scenario reads it."""
    path = folder / "trace"
    path.write_text(text)
    return parse(TraceSpec, {"path": str(path), **fields}, source="test").read()


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (("1764547200", "1764547201"), [0, 1]),
        (("1764547200000", "1764547200250"), [0, 0.25]),
        (("1764547200000000", "1764547200250000"), [0, 0.25]),
        (("1764547200000000000", "1764547200250000000"), [0, 0.25]),
        (("1764547200.5", "1764547203.25"), [0, 2.75]),
        (("2025-12-01T00:00:00Z", "2025-12-01T00:00:01.5Z"), [0, 1.5]),
        (("2025-12-01 00:00", "2025-12-01 00:01"), [0, 60]),
        # 02:30 at +02:00 is 00:30 in UTC, before 01:00
        (("2025-12-01 02:30:00+02:00", "2025-12-01 01:00:00+00:00"), [0, 1800]),
        (("2025-12-01 01:00:00+00:00", "2025-12-01 02:30:00+02:00"), [0, 1800]),
        (("2025-12-01 02:30:00+0200", "2025-12-01T03:00:00+02"), [0, 1800]),
    ],
)
def test_the_first_time_is_zero_and_the_others_are_in_true_order(
    times: tuple[str, str], seconds: list[float], tmp_path: Path
) -> None:
    text = AZURE + "".join(f"{time},100,{place}\n" for place, time in enumerate(times, start=1))
    assert table(tmp_path, text, format="azure").times_s.tolist() == pytest.approx(seconds, abs=1e-6)


def test_mixed_zones_put_requests_in_true_order_and_tell(tmp_path: Path) -> None:
    text = AZURE + "2025-12-01T01:00:00Z,100,1\n2025-12-01T02:30:00+02:00,200,2\n"
    trace = table(tmp_path, text, format="azure")
    assert trace.prompt_tokens.tolist() == [200, 100]
    assert trace.notes == ("trace: times of 2 zones, put in their true order",)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mooncake", '{"timestamp": %s000, "input_length": 20, "output_length": 1, "hash_ids": [1]}'),
        ("bailian", '{"timestamp": %s, "input_length": 20, "output_length": 1, "hash_ids": [1, 2]}'),
        ("timed_trace", '{"timestamp": %s, "input_length": 20, "output_length": 1}'),
        ("llmservingsim", '{"arrival_time_ns": %s000000000, "input_toks": 20, "output_toks": 1}'),
        ("burstgpt", "%s,M,20,1,21,API log"),
        ("vidur", "%s,20,1"),
    ],
)
def test_every_format_begins_at_zero(name: str, line: str, tmp_path: Path) -> None:
    headers = {
        "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
        "vidur": "arrived_at,num_prefill_tokens,num_decode_tokens\n",
    }
    text = headers.get(name, "") + "\n".join(line % second for second in (5_000_000, 5_000_051))
    assert table(tmp_path, text, format=name).times_s.tolist() == [0, 51]
    kept = table(tmp_path, text, format=name, first_at_zero=False)
    assert kept.times_s.tolist() == pytest.approx([5_000_000, 5_000_051])


def test_a_table_with_columns_of_its_own_and_no_format(tmp_path: Path) -> None:
    columns = {"timestamp": "at", "input_tokens": "in", "output_tokens": "out", "session": "user"}
    rows = [("a", 10), ("b", 20), ("a", 30)]
    csv_text = "at,in,out,user\n" + "\n".join(f"{i},{n},{n + 1},{u}" for i, (u, n) in enumerate(rows))
    lines = [json.dumps({"at": i, "in": n, "out": n + 1, "user": u}) for i, (u, n) in enumerate(rows)]
    for text in (csv_text, "\n".join(lines)):
        trace = table(tmp_path, text, columns=columns)
        assert trace.times_s.tolist() == [0, 1, 2]
        assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([10, 20, 30], [11, 21, 31])
        assert trace.sessions is not None
        assert trace.sessions.tolist() == [0, 1, 0]
    requests = replayed({"trace": {"path": str(tmp_path / "trace"), "columns": columns}})
    assert [request.group for request in requests] == [0, 1, 0]


def test_a_window_is_cut_out_by_seconds_or_by_dates(tmp_path: Path) -> None:
    rows = [f"2025-12-01T08:00:{second:02}Z,{second + 1},1" for second in (0, 10, 20, 30)]
    text = AZURE + "\n".join(rows)
    cut = table(tmp_path, text, format="azure", **{"from": 10, "to": 30})
    assert (cut.times_s.tolist(), cut.prompt_tokens.tolist()) == ([0, 10], [11, 21])
    cut = table(tmp_path, text, format="azure", **{"from": "2025-12-01T09:00:20+01:00"})
    assert cut.prompt_tokens.tolist() == [21, 31]
    with pytest.raises(InputError, match="none of its 4 requests"):
        table(tmp_path, text, format="azure", **{"from": 31})


def test_times_are_scaled_and_requests_thinned_by_whole_sessions(tmp_path: Path) -> None:
    text = "t,i,o,s\n" + "\n".join(f"{n},5,5,{n % 500}" for n in range(1000))
    columns = {"timestamp": "t", "input_tokens": "i", "output_tokens": "o", "session": "s"}
    assert table(tmp_path, text, columns=columns, time_scale=0.5).times_s[-1] == 499.5
    thinned = table(tmp_path, text, columns=columns, keep_share=0.3)
    assert thinned.sessions is not None
    assert np.bincount(thinned.sessions, minlength=500).tolist().count(1) == 0  # none or both of its two
    assert 250 < len(thinned) < 350


def test_what_has_no_output_is_told_and_left_out(tmp_path: Path) -> None:
    text = AZURE + "2025-12-01 00:00:00,10,5\n2025-12-01 00:00:01,10,0\n2025-12-01 00:00:02,0,7\n"
    trace = table(tmp_path, text, format="azure")
    assert len(trace) == 1
    assert trace.notes == (
        "trace: 1 requests without output tokens left out",
        "trace: 1 requests without prompt tokens left out",
    )
    with pytest.raises(InputError, match="none of its 1 requests has prompt and output tokens"):
        table(tmp_path, AZURE + "2025-12-01 00:00:01,10,0\n", format="azure")


def test_image_counts_are_told(tmp_path: Path) -> None:
    header = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    text = header + "2025-01-01 00:00:00,2,10,5\n2025-01-01 00:00:01,0,9,5\n"
    (note,) = table(tmp_path, text, format="azure").notes
    assert "1 requests have images (2 in all)" in note


def test_token_ids_keep_their_prefixes(tmp_path: Path) -> None:
    shared = list(range(32))
    prompts = [shared + [900] * 8, shared + [901] * 20, [7, *shared[1:]]]
    lines = [
        {"arrival_time_ns": i, "input_toks": len(ids), "output_toks": 1, "input_tok_ids": ids}
        for i, ids in enumerate(prompts)
    ]
    trace = table(tmp_path, "\n".join(map(json.dumps, lines)), format="llmservingsim")
    # two full blocks of 16 are equal; the last prompt differs in its first token, and so in both blocks
    assert trace.hash_ids == [(0, 1), (0, 1, 2), (3, 4)]


def test_bailian_has_blocks_of_16_tokens_seconds_and_chains_of_turns(tmp_path: Path) -> None:
    lines = [
        {"chat_id": 5, "parent_chat_id": -1, "timestamp": 60, "turn": 1, "ids": [1, 2, 3]},
        {"chat_id": 6, "parent_chat_id": -1, "timestamp": 61.5, "turn": 1, "ids": [9, 8, 7]},
        {"chat_id": 7, "parent_chat_id": 5, "timestamp": 70, "turn": 2, "ids": [1, 2, 4]},
    ]
    text = "\n".join(
        json.dumps({**line, "hash_ids": line.pop("ids"), "input_length": 40, "output_length": 3})
        for line in lines
    )
    trace = table(tmp_path, text, format="bailian")
    assert (trace.block_tokens, trace.times_s.tolist()) == (16, [0, 1.5, 10])
    assert trace.sessions is not None
    assert trace.sessions.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="Its format is bailian"):
        table(tmp_path, text, format="mooncake")


def test_a_search_repeats_a_trace_and_says_so(tmp_path: Path) -> None:
    WRITERS["mooncake"](TRACE, tmp_path / "trace.jsonl")
    stream = {"trace": {"format": "mooncake", "path": str(tmp_path / "trace.jsonl")}}
    load = expand(parse(StreamSpec, stream, source="test"), None)
    probed = with_request_rate(load, 2.0, num_requests=10)
    requests = draw(probed, seed=0)[0].streams[0].requests
    assert [r.prompt_tokens for r in requests] == [700, 1, 512, 1025, 700, 1, 512, 1025, 700, 1]
    assert requests[-1].arrival_s == pytest.approx(5)  # 10 requests at 2 requests/s
    assert requests[4].content != requests[0].content  # a round has prompts of its own
    assert requests[4].content[0] == requests[6].content[0]  # which share as those of the trace do
    stretched, repeated = trace_notes(probed)
    assert "its own arrivals, stretched to 2 requests/s" in stretched
    assert "4 requests, repeated to 10" in repeated
    with pytest.raises(InputError, match="the trace has 4 requests, 5 are wanted"):
        replayed({**stream, "num_requests": 5})


def test_a_plan_keeps_the_arrivals_and_prompts_of_a_trace_unless_told_otherwise(tmp_path: Path) -> None:
    WRITERS["mooncake"](TRACE, tmp_path / "trace.jsonl")
    stream = parse(
        StreamSpec, {"trace": {"format": "mooncake", "path": str(tmp_path / "trace.jsonl")}}, source="test"
    )
    assert PlanSpec().of(stream).arrivals is None
    assert PlanSpec(num_requests=3).of(stream).own_arrivals
    other = PlanSpec(arrivals="poisson").of(stream)
    assert isinstance(other.arrivals, Poisson)
    levels = Sweep(levels=(Level(request_rate=4.0),)).of(stream)
    requests = draw(levels, seed=0)[0].streams[0].requests
    assert [r.arrival_s for r in requests] == pytest.approx((TRACE.times_s / 7.125).tolist())
    with pytest.raises(InputError, match="which has its own"):
        PlanSpec(content=Same(kind="same")).of(stream)


def test_requests_all_at_once_have_no_rate_to_change(tmp_path: Path) -> None:
    columns = {"timestamp": "t", "input_tokens": "i", "output_tokens": "o"}
    (tmp_path / "trace").write_text("t,i,o\n3,5,5\n3,5,5\n")
    with pytest.raises(InputError, match="all its requests come at once"):
        replayed({"trace": {"path": str(tmp_path / "trace"), "columns": columns}}, rate=1.0)


OFFSET = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "{0}00.0,a,4,M,900,40,940,Conversation log\n{0}51.0,b,2,M,36,29,65,Conversation log\n"
    "{1}44.0,c,3,M,935,78,1013,Conversation log\n"
)


@pytest.mark.parametrize("offset", [("50000", "50001"), ("194400", "194401")])
def test_a_clock_that_is_far_off_changes_nothing(offset: tuple[str, str], tmp_path: Path) -> None:
    """Times of 0, 51 and 144 s: the last answer comes about 145 s after the first request."""
    (tmp_path / "trace.csv").write_text(OFFSET.format(*offset))
    trace = {"format": "burstgpt", "path": "trace.csv"}
    found = servecast.simulate(small(tmp_path, workload={"trace": trace})).result
    assert 144 < found["duration"] < 146
    assert found["request_throughput"] == pytest.approx(0.02, abs=0.001)
    stretched = small(tmp_path, workload={"trace": trace | {"request_rate": 0.05}})
    arrivals = servecast.simulate(stretched).requests["arrival"]
    assert arrivals.tolist() == pytest.approx([0, 51 / 144 * 60, 60])  # 3 requests at 0.05 a second


def test_an_endless_trace_is_refused(tmp_path: Path) -> None:
    """A run's clock counts picoseconds in 63 bits, 106 days."""
    (tmp_path / "trace.csv").write_text("t,i,o\n0,5,5\n9000000,5,5\n")
    columns = {"timestamp": "t", "input_tokens": "i", "output_tokens": "o"}
    scenario = small(tmp_path, workload={"trace": {"path": "trace.csv", "columns": columns}})
    with pytest.raises(InputError, match=r"requests arrive over 104\.2 days .* a window"):
        servecast.simulate(scenario)


def test_a_trace_is_read_anew_only_where_its_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three askings of one request, then two of a file that has another more."""
    path, rows, readings = tmp_path / "trace.csv", ["0,5,2\n", "1,7,3\n"], list[Path]()

    def reading(path: Path, form: Format) -> Trace:
        readings.append(path)
        return read_trace(path, form)

    monkeypatch.setattr(trace_spec, "read_trace", reading)
    columns = TraceColumns(timestamp="t", input_tokens="in", output_tokens="out")
    path.write_text("t,in,out\n" + rows[0], "utf-8")
    spec = TraceSpec(path=path, columns=columns)
    assert [len(spec.read()) for _ in range(3)] == [1, 1, 1]
    path.write_text("t,in,out\n" + "".join(rows), "utf-8")
    assert [spec.read().prompt_tokens.tolist() for _ in range(2)] == [[5, 7], [5, 7]]
    assert readings == [path, path]
