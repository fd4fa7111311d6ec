"""The engine makes the plain model's decisions, step by step, on random workloads and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import pytest
from engine_log import Abort, Engine, StepLog, in_python, installed, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_engine import PlainEngine

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.speculation import METHODS, speculation
from servecast.validate.parity.parity import Recorded, compare, our_decisions
from servecast.validate.parity.remote import draw_remote
from servecast.validate.parity.scenarios import recorded_picks, with_drafts


def first_difference(one: list[StepLog], other: list[StepLog]) -> str:
    """Where two logs part, "" if they do not."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        for name in (f.name for f in fields(StepLog)):
            if getattr(a, name) != getattr(b, name):
                return f"step {number}, {name}:\n  {getattr(a, name)}\n  {getattr(b, name)}"
    return "" if len(one) == len(other) else f"{len(one)} steps against {len(other)}"


@dataclass(frozen=True, slots=True)
class Case:
    config: EngineConfig
    requests: list[Request]
    arrive_step: list[int]
    aborts: list[Abort]
    told: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)  # accepted, proposed drafts

    def run(self, engine: Engine, *, trace: bool = True) -> list[StepLog]:
        if engine.drafts is not None:
            engine.drafts.told = self.told
        return run(
            engine,
            self.requests,
            self.arrive_step,
            self.aborts,
            async_scheduling=self.config.async_scheduling,
            trace=trace,
        )


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    """Small engines, most of them short of blocks; always large enough for one sequence."""
    version = draw(st.sampled_from(["0.33", "0.32", "0.28", "0.27", "0.24", "0.23"]))
    block_size = draw(st.sampled_from([4, 1, 2, 8, 16]))
    max_model_len = draw(st.integers(4, draw(st.sampled_from([96, 96, 96, 400]))))
    one_sequence = -(-max_model_len // block_size)
    max_num_seqs = draw(st.integers(1, 12))
    chunked = draw(st.sampled_from([True, True, True, False]))
    least_tokens = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    options: dict[str, Any] = {}
    if version >= "0.24":
        options["watermark"] = draw(st.sampled_from([0.0, 0.0, 0.1, 0.4]))
    if version >= "0.31":
        options["long_prefill_token_threshold_adaptive"] = draw(st.booleans())
        options["max_num_active_seqs"] = draw(st.none() | st.integers(1, max_num_seqs))
    if version >= "0.33":
        options["prefill_schedule_interval"] = draw(st.sampled_from([1, 1, 2, 5]))
    return EngineConfig(
        version=version,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_tokens + draw(st.integers(0, draw(st.sampled_from([6, 60])))),
        max_model_len=max_model_len,
        num_gpu_blocks=1 + one_sequence + draw(st.integers(0, one_sequence)),
        block_size=block_size,
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        enable_chunked_prefill=chunked,
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        async_scheduling=draw(st.booleans()),
        scheduler_reserve_full_isl=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 3, 10])),
        **options,
    )


@st.composite
def contents(draw: st.DrawFn, prompt_tokens: int, ends: list[int]) -> tuple[tuple[int, int], ...]:
    """A path down a tree of shared parts: equal ids mean equal paths; the last part may be cut short."""
    parts: list[tuple[int, int]] = []
    content_id = 0
    for end in ends[: draw(st.integers(0, len(ends)))]:
        content_id = content_id * 3 + draw(st.integers(1, 2))
        parts.append((content_id, min(end, prompt_tokens)))
        if end >= prompt_tokens:
            break
    return tuple(parts)


def contended(config: EngineConfig) -> EngineConfig:
    """Priorities, seats for all, small steps, and blocks for little more than one sequence."""
    one_sequence = -(-config.max_model_len // config.block_size)
    return replace(
        config,
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
        enable_chunked_prefill=True,
        max_num_seqs=12,
        max_num_active_seqs=None,
        max_num_batched_tokens=12 + config.max_num_batched_tokens % 7,
        num_gpu_blocks=1 + one_sequence + config.num_gpu_blocks % 3,
        watermark=0.0,
    )


@st.composite
def cases(draw: st.DrawFn, *, contend: bool = False) -> Case:
    """Random workloads. With ``contend`` the requests that come later are the more important ones, so that
    priority victims stand before those who need their blocks, and outputs are short."""
    config = contended(draw(configs())) if contend else draw(configs())
    longest_prompt = draw(st.sampled_from([min(12, config.max_model_len - 1), config.max_model_len - 1]))
    gaps = draw(st.lists(st.integers(1, 30), max_size=4))
    ends = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    requests: list[Request] = []
    arrive_step: list[int] = []
    aborts: list[Abort] = []
    now = 0
    for request_id in range(draw(st.integers(1, 16))):
        now += draw(st.sampled_from([0, 0, 1, 4, 20]))
        prompt_tokens = draw(st.integers(1, longest_prompt))
        max_tokens = draw(st.integers(1, 12 if contend else draw(st.sampled_from([40, 40, 300]))))
        stops_early = draw(st.sampled_from([False, False, True]))
        requests.append(
            Request(
                request_id=request_id,
                arrival_s=0.0,
                prompt_tokens=prompt_tokens,
                output_tokens=draw(st.integers(1, max_tokens)) if stops_early else max_tokens,
                max_tokens=max_tokens,
                content=draw(contents(prompt_tokens, ends)),
                priority=-request_id // 2 if contend else draw(st.integers(0, 2)),
            )
        )
        arrive_step.append(now)
        if draw(st.integers(0, 5)) == 5:
            moment: Literal["schedule", "complete"] = draw(st.sampled_from(["schedule", "complete"]))
            aborts.append(Abort(now + draw(st.integers(0, 40)), moment, request_id))
    return Case(config, requests, arrive_step, aborts)


@st.composite
def drafting(draw: st.DrawFn) -> Case:
    """As ``cases``, with drafts: by every method, of which none, some or all are accepted."""
    case = draw(cases(contend=draw(st.booleans())))
    version, rules = case.config.version, draft_rules_for(case.config.version)
    method = draw(st.sampled_from([name for name, known in METHODS.items() if known.since <= version]))
    k = draw(st.integers(1, 4))
    by_batch: list[tuple[int, int]] = []
    if rules.by_batch and draw(st.integers(0, 3)) == 3:
        by_batch = [(1, draw(st.integers(0, k)))]
        for gap in draw(st.lists(st.integers(1, 3), max_size=3)):
            by_batch.append((by_batch[-1][0] + gap, draw(st.integers(0, k))))
    drafts = speculation(version, method, k, (0.5,) * k, by_batch=tuple(by_batch))
    counts = st.lists(st.integers(0, k), min_size=1, max_size=5)
    told = {
        request.request_id: (draw(counts), draw(counts) if METHODS[method].may_miss else [k])
        for request in case.requests
    }
    most = case.config.max_num_seqs
    config = replace(
        case.config,
        speculation=drafts,
        max_num_batched_tokens=case.config.max_num_batched_tokens + most * (drafts.draft_slots + 1),
        num_gpu_blocks=case.config.num_gpu_blocks + -(-drafts.lookahead // case.config.block_size),
        long_prefill_token_threshold=case.config.long_prefill_token_threshold and k + 1,
    )
    return replace(case, config=config, told=told)


CONNECTED = ("0.33", "0.32", "0.30", "0.27", "0.24", "0.23")


def connected(index: int, seed: int = 0) -> Recorded:
    """A random scenario with a KV connector, one in three with drafts, and what the plain model decides."""
    version, pick = CONNECTED[index % len(CONNECTED)], recorded_picks(seed, index)[0]
    scenario = draw_remote(pick, version, f"connected-{version}-{seed}-{index}")
    if index % 3 == 2:
        scenario = with_drafts(pick, scenario)
    return Recorded(scenario, json.dumps(list(our_decisions(scenario, version, PlainEngine))))


def random_cases(number: int) -> settings:
    slow = [HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=slow)


@random_cases(300)
@given(cases())
def test_the_engine_follows_the_plain_model(case: Case) -> None:
    plain = case.run(PlainEngine(case.config))
    assert first_difference(case.run(installed(case.config)), plain) == ""


@random_cases(400)
@given(cases(contend=True))
def test_the_engine_follows_the_plain_model_under_contention(case: Case) -> None:
    plain = case.run(PlainEngine(case.config))
    assert first_difference(case.run(installed(case.config)), plain) == ""


@random_cases(500)
@given(drafting())
def test_drafts_follow_the_plain_model(case: Case) -> None:
    plain = case.run(PlainEngine(case.config))
    assert first_difference(case.run(installed(case.config)), plain) == ""


def test_connectors_follow_the_plain_model() -> None:
    """External hits, loads in the step and beside it, held blocks, failed loads under both policies."""
    seen: Counter[str] = Counter()
    for one in map(connected, range(48)):
        mismatch = compare(one, one.scenario.config.version)
        assert mismatch is None, str(mismatch)
        for event in one.events():
            seen["waiting"] += bool(event.get("waiting_blocks"))
            seen["hits"] += event.get("external", (0, 0))[1] > 0
    assert min(seen.values()) > 1000


@random_cases(60)
@given(cases() | cases(contend=True) | drafting())
def test_the_source_decides_as_what_was_compiled_of_it(case: Case) -> None:
    assert first_difference(case.run(in_python(case.config)), case.run(installed(case.config))) == ""


@pytest.mark.parametrize("make", [PlainEngine, installed])
@random_cases(80)
@given(case=cases())
def test_nothing_is_lost(make: Callable[[EngineConfig], Engine], case: Case) -> None:
    """Blocks, tokens and requests balance, by replaying the log with nothing but addition."""
    config = replace(case.config, scheduler_reserve_full_isl=True)  # with the gate every request ends
    log = case.run(make(config))
    usable = list(range(1, config.num_gpu_blocks))
    by_id = {request.request_id: request for request in case.requests}
    computed: dict[int, int] = {}
    for step in log:
        for request_id in step.preempted:
            computed[request_id] = 0
        computed.update(step.cached_tokens)
        assert list(step.cached_tokens) == [i for i, _ in step.scheduled if i in step.admitted + step.resumed]
        context = 0
        for request_id, tokens in step.scheduled:
            assert tokens > 0
            if computed[request_id] < by_id[request_id].prompt_tokens:
                assert (tokens, computed[request_id]) in step.chunks
            context += tokens * (computed[request_id] + 1)
            computed[request_id] += tokens
            assert computed[request_id] < config.max_model_len
        assert sum(tokens for tokens, _ in step.chunks) + step.decodes == step.total_tokens
        assert sum(tokens * (before + 1) for tokens, before in step.chunks) + step.decode_context == context
        assert step.total_tokens == sum(tokens for _, tokens in step.scheduled)
        assert step.total_tokens <= config.max_num_batched_tokens
        assert step.emitted <= step.samples <= len(step.scheduled) <= config.max_num_seqs
        for state in (step.after_schedule, step.after_complete):
            held = {block for blocks in state.block_ids.values() for block in blocks}
            assert state.free_blocks == len(state.free_list)
            assert sorted([*held, *state.free_list]) == usable
            assert len(state.running) <= config.max_num_seqs
        for request_id in step.after_schedule.running:
            held_tokens = len(step.after_schedule.block_ids[request_id]) * config.block_size
            assert 0 <= held_tokens - computed[request_id] < config.block_size

    finished = {i for step in log for i in step.finished}
    aborted = {abort.request_id for abort in case.aborts}
    firsts = [i for step in log for i in step.first_tokens]
    outputs = {
        i: min(request.output_tokens, config.max_model_len - request.prompt_tokens)
        for i, request in by_id.items()
    }
    assert len(firsts) == len(set(firsts))
    assert finished <= set(firsts)
    assert finished | aborted == set(by_id)
    assert sum(outputs[i] for i in finished) <= sum(step.emitted for step in log) <= sum(outputs.values())
    for request_id in finished:
        final = by_id[request_id].prompt_tokens + outputs[request_id]
        wasted = computed[request_id] - (final - 1)
        early = outputs[request_id] < by_id[request_id].max_tokens
        assert wasted in ((0, 1) if config.async_scheduling and early else (0,)) or computed[request_id] == 0
    last = log[-1].after_complete
    assert (last.running, last.waiting, last.has_requests) == ([], [], False)
    assert last.free_blocks == len(usable)


@random_cases(80)
@given(case=cases())
def test_tracing_changes_nothing(case: Case) -> None:
    traced = case.run(Scheduler(case.config, trace=True))
    for step in traced:
        step.scheduled = []
    assert first_difference(case.run(Scheduler(case.config), trace=False), traced) == ""
