"""Sessions from scenarios, from inference-perf's multi-turn chat, and from recorded traces."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_scenarios import small

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.routing.prompt_blocks import PromptBlocks
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.sessions import SessionRequest, SessionStream
from servecast.sim.traffic.spec import StreamSpec


def requests_of(stream: dict[str, Any], seed: int = 0) -> list[SessionRequest]:
    load = expand(parse(StreamSpec, stream, source="test"), None)
    sent = draw(load, seed)[0].streams[0]
    assert isinstance(sent, SessionStream)
    return [each for each in sent.requests if isinstance(each, SessionRequest)]


def fields(requests: list[SessionRequest], *names: str) -> list[Any]:
    return [tuple(getattr(each, name) for name in names) for each in requests]


DRAWN: dict[str, Any] = {
    "arrivals": {"kind": "poisson", "request_rate": 1.0},
    "num_requests": 40,
    "prompt_tokens": {"p50": 100, "p95": 900},
    "output_tokens": {"p50": 50, "p95": 400},
    "sessions": {"turns": {"p50": 4, "p95": 20}, "think_s": {"mean": 10}},
}


def recorded(tmp_path: Path, lines: list[dict[str, Any]], **trace: Any) -> list[SessionRequest]:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return requests_of({"trace": {"path": str(path), **trace}})


def test_more_sessions_begin_with_the_same_ones_at_any_rate() -> None:
    few, more = requests_of(DRAWN), requests_of(DRAWN | {"num_requests": 80})
    assert len(more) > len(few)
    said = ("prompt_tokens", "output_tokens", "after", "delay_s", "turn", "group")
    assert fields(few, *said) == fields(more[: len(few)], *said)
    fast = requests_of(DRAWN | {"arrivals": {"kind": "poisson", "request_rate": 4.0}})
    assert fields(fast, *said) == fields(few, *said)
    assert requests_of(DRAWN, 1) != few


def test_every_prompt_is_what_was_said_before_and_more() -> None:
    before: dict[int | None, SessionRequest] = {}
    for request in requests_of(DRAWN | {"system_prompt_tokens": 300, "suffix_tokens": 5}):
        last = before.get(request.group)
        said = 300 if last is None else last.prompt_tokens + last.output_tokens
        assert request.prompt_tokens >= said + 1 + 5
        assert request.content[0][1] == 300
        assert request.content[-1][1] == request.prompt_tokens + request.output_tokens
        assert last is None or (request.after, request.turn) == ((last.request_id,), last.turn + 1)
        before[request.group] = request
    assert len({request.content[0][0] for request in before.values()}) == 1  # one system prompt
    assert len({request.content[-1][0] for request in before.values()}) == 40


def test_routers_see_the_blocks_of_a_prompt_and_none_of_its_output() -> None:
    turns = requests_of(DRAWN | {"prompt_tokens": 33, "output_tokens": 40, "sessions": {"turns": 2}})[:2]
    blocks = [PromptBlocks(16).all(each) for each in turns]
    assert [len(each) for each in blocks] == [33 // 16, (33 + 40 + 33) // 16]
    assert blocks[1][:2] == blocks[0]


def test_multi_turn_chat_of_inference_perf(tmp_path: Path) -> None:
    """v0.6: request n is of user n mod users; a turn is all before it and, again, prefix and question."""
    data = {"num_groups": 2, "num_prompts_per_group": 2, "system_prompt_len": 100, "question_len": 50}
    file = {
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": 5}]},
        "data": {
            "type": "shared_prefix",
            "shared_prefix": data | {"output_len": 4, "enable_multi_turn_chat": True},
        },
        "server": {"ignore_eos": True},
    }
    (tmp_path / "perf.yaml").write_text(yaml.safe_dump(file))
    spec = parse(InferencePerfWorkload, {"inference_perf": str(tmp_path / "perf.yaml")}, source="test")
    sent = [
        each for each in draw(spec.workload(), 0)[0].streams[0].requests if isinstance(each, SessionRequest)
    ]
    assert [each.prompt_tokens for each in sent] == [150] * 4 + [304] * 4 + [458] * 2
    assert [each.after for each in sent] == [()] * 4 + [(i,) for i in range(6)]
    assert all(a.arrival_s < b.arrival_s for a, b in pairwise(sent))
    prefixes = {each.group: each.content[0] for each in sent}
    assert sorted(end for _, end in prefixes.values()) == [100] * 4
    assert len({content for content, _ in prefixes.values()}) == 2


def test_sessions_of_aiperf_add_to_what_was_said_and_wait_for_it(tmp_path: Path) -> None:
    lines = [
        {"session_id": "a", "timestamp": 1000, "input_length": 600, "output_length": 40, "hash_ids": [7, 8]},
        {"session_id": "a", "delay": 2000, "input_length": 150, "output_length": 20},
        {"session_id": "b", "timestamp": 500, "input_length": 600, "output_length": 4, "hash_ids": [7, 9]},
    ]
    sent = recorded(tmp_path, lines, format="aiperf")
    said = ("arrival_s", "after", "delay_s", "prompt_tokens", "output_tokens", "turn")
    assert fields(sent, *said) == [
        (0.0, (), 0.0, 600, 4, 1),  # the first request is sent at once
        (0.5, (), 0.0, 600, 40, 1),
        (0.0, (1,), 2.0, 640 + 150, 20, 2),
    ]
    assert sent[0].content[0] == sent[1].content[0] == sent[2].content[0]  # block 7, of 512 tokens
    assert sent[0].content[0][1] == 512
    assert sent[1].content[:2] == sent[2].content[:2]


def test_recorded_prompts_name_the_blocks_of_the_answer_before(tmp_path: Path) -> None:
    """Blocks of 512: 600 tokens and 500 of output are the first 1,100 of the next prompt, whose blocks 0, 1
    and 2 they fill up to there; the turn after that begins anew, and has no answer in it."""
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 500, "hash_ids": [1, 2], "session_id": 5},
        {"timestamp": 9000, "input_length": 1500, "output_length": 9, "hash_ids": [1, 3, 4], "session_id": 5},
        {"timestamp": 9500, "input_length": 700, "output_length": 9, "hash_ids": [6, 7], "session_id": 5},
    ]
    columns = {"session": "session_id"}
    sent = recorded(tmp_path, lines, format="mooncake", columns=columns, turns="wait")
    ends = [[end for _, end in each.content] for each in sent]
    assert ends == [[512, 1024, 1100], [512, 1024, 1500], [512, 700]]
    assert [part for part, _ in sent[0].content] == [part for part, _ in sent[1].content]
    assert fields(sent, "arrival_s", "after", "delay_s") == [
        (0.0, (), 0.0), (9.0, (0,), 0.0), (9.5, (1,), 0.0)
    ]  # fmt: skip


def test_whole_prompts_without_blocks_begin_with_what_was_said_unless_they_are_shorter(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("t,i,o,s\n0,100,20,a\n5,150,10,a\n9,140,10,a\n", "utf-8")
    columns = {"timestamp": "t", "input_tokens": "i", "output_tokens": "o", "session": "s"}
    sent = requests_of({"trace": {"path": str(path), "columns": columns, "turns": "wait"}})
    assert [each.content[0][1] for each in sent] == [120, 160, 150]
    first, second, third = (each.content[0][0] for each in sent)
    assert first == second != third


def test_sessions_of_a_trace_arrive_as_a_law_says_and_are_repeated(tmp_path: Path) -> None:
    lines = [{"session_id": s, "input_length": 9, "output_length": 3} for s in ("a", "b", "a")]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    trace = {"path": str(path), "format": "aiperf", "repeat": True}
    loop = {"kind": "closed_loop", "concurrency": 2}
    load = expand(
        parse(StreamSpec, {"trace": trace, "arrivals": loop, "num_requests": 5}, source="test"), None
    )
    sent = draw(load, 0)[0].streams[0]
    assert isinstance(sent, SessionStream)
    assert (sent.max_sessions, sent.max_concurrency) == (2, None)
    assert [each.turn for each in sent.requests if isinstance(each, SessionRequest)] == [
        1,
        2,
        1,
        1,
        2,
        1,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sessions": {}}, "a session needs one of turns and users"),
        ({"sessions": {"turns": 2, "users": 3}}, "a session needs one of turns and users"),
        ({"sessions": {"turns": 0}}, "turns"),
        ({"sessions": {"turns": 2, "think_s": -1}}, "think_s"),
        ({"sessions": {"turns": 2, "think_s": "5s"}}, "think_s"),
        ({"sessions": {"turns": 2, "think_s": {"p50": 9, "p95": 3}}}, "p95 3 is below p50 9"),
        ({"sessions": {"turns": 2, "think_s": {"mean": 9, "p50": 3, "p95": 5}}}, "a time needs one law"),
        ({"sessions": {"turns": 2, "think": 3}}, "Did you mean 'think_s'?"),
        ({"sessions": {"turns": 2, "sub_agents": {"share": 1, "prompt_tokens": 1}}}, "agents without tools"),
        ({"sessions": {"users": 2, "tools": {"calls": 1, "result_tokens": 1}}}, "that arrive by themselves"),
        ({"content": "same"}, "content same of sessions"),
        ({"length_correlation": 0.5}, "a correlation of turns is not modelled"),
        ({"content": {"kind": "shared_prefix", "groups": 2, "prefix_tokens": 9, "prompts_per_group": 2}},
         "prompts_per_group of sessions"),
        ({"sessions": {"turns": 2, "prefix_again": True}}, "prefix_again without users"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_session_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as error:
        requests_of(DRAWN | changes)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("line", "trace", "what"),
    [
        ({"delay": -1}, {"format": "aiperf"}, "delay is -1, not a time of at least 0"),
        ({"delay": "soon"}, {"format": "aiperf"}, "delay is 'soon', not a time"),
        ({"timestamp": 0, "hash_ids": []}, {"format": "mooncake", "turns": "wait"}, "have no sessions"),
        (
            {},
            {"format": "aiperf", "turns": "as_recorded", "history": "added"},
            "history of turns that do not wait",
        ),
        ({"input_length": None, "turns": []}, {"format": "aiperf"}, "Texts have no lengths"),
    ],
)
def test_what_cannot_be_a_recorded_session_is_refused(
    tmp_path: Path, line: dict[str, Any], trace: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError) as error:
        recorded(tmp_path, [{"input_length": 9, "output_length": 3} | line], **trace)
    assert what in str(error.value)


def test_a_plan_of_sessions_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sweep --vary workload\.arrivals\.concurrency"):
        small(tmp_path, workload=DRAWN).open_loop()
