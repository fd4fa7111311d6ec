"""Each scheduling rule as a literal log worked out by hand, for the engine and its plain model.

A line is a step: ``a32`` is 32 tokens of request a; then ``+a`` admitted, ``^a`` resumed (both with the
prefix hit in brackets, if any), ``-a`` preempted, ``.a`` finished by the step. Blocks hold 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_log import ENGINES, Abort, Engine, StepLog, run

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request

BASE = EngineConfig(
    version="0.32",
    max_num_seqs=8,
    max_num_batched_tokens=96,
    max_model_len=512,
    num_gpu_blocks=101,
    async_scheduling=False,
)
A, B, C, D, E = range(5)
Make = Callable[..., Any]


@pytest.fixture(params=ENGINES, ids=["plain", "installed", "in Python"])
def engine(request: pytest.FixtureRequest) -> Make:
    """Makes an engine: ``engine(usable=8, watermark=0.2)`` changes BASE; usable blocks leave out block 0."""

    def make(config: EngineConfig = BASE, *, usable: int | None = None, **changes: Any) -> Any:
        if usable is not None:
            changes["num_gpu_blocks"] = usable + 1
        return request.param(replace(config, **changes))

    return make


def ask(
    request_id: int,
    prompt: int,
    outputs: int,
    *,
    max_tokens: int | None = None,
    content: tuple[tuple[int, int], ...] = (),
    priority: int = 0,
) -> Request:
    return Request(
        request_id=request_id,
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=outputs,
        max_tokens=outputs if max_tokens is None else max_tokens,
        content=content,
        priority=priority,
    )


def simulate(
    engine: Engine,
    requests: Sequence[Request],
    at: dict[int, int] | None = None,
    aborts: Sequence[Abort] = (),
    *,
    async_scheduling: bool = False,
) -> list[StepLog]:
    arrive_step = [(at or {}).get(request.request_id, 0) for request in requests]
    return run(engine, requests, arrive_step, aborts, async_scheduling=async_scheduling)


def name(request_id: int) -> str:
    return "abcde"[request_id]


def lines(log: list[StepLog]) -> list[str]:
    def line(step: StepLog) -> str:
        def admission(mark: str, request_id: int) -> str:
            hit = step.cached_tokens[request_id]
            return f"{mark}{name(request_id)}" + (f"({hit})" if hit else "")

        words = [f"{name(i)}{tokens}" for i, tokens in step.scheduled]
        words += [admission("+", i) for i in step.admitted]
        words += [admission("^", i) for i in step.resumed]
        words += [f"-{name(i)}" for i in step.preempted]
        words += [f".{name(i)}" for i in step.finished]
        return " ".join(words)

    return [line(step) for step in log]


# ---- the token budget


def test_running_first_then_the_last_admitted_takes_the_rest_as_a_partial_chunk(engine: Make) -> None:
    """96 tokens a step: a 40, so b gets 56 of its 100; then a decodes first, b gets its last 44, c
    (arrived at step 1) 51 of its 60."""
    log = simulate(engine(), [ask(A, 40, 3), ask(B, 100, 1), ask(C, 60, 1)], at={C: 1})
    assert lines(log) == ["a40 b56 +a +b", "a1 b44 c51 +c .b", "a1 c9 .a .c", ""]
    assert [step.chunks for step in log] == [[(40, 0), (56, 0)], [(44, 56), (51, 0)], [(9, 51)], []]
    assert [(step.decodes, step.decode_context) for step in log] == [(0, 0), (1, 41), (1, 42), (0, 0)]
    assert [step.samples for step in log] == [1, 2, 2, 0]
    assert [step.emitted for step in log] == [1, 2, 2, 0]
    assert [step.first_tokens for step in log] == [[A], [B], [C], []]


def test_a_long_prefill_that_is_running_starves_admission(engine: Make) -> None:
    """a's chunks take the whole budget for two steps; b, here since step 1, enters beside its third."""
    log = simulate(engine(), [ask(A, 200, 1), ask(B, 10, 1)], at={B: 1})
    assert lines(log) == ["a96 +a", "a96", "a8 b10 +b .a .b", ""]


def test_a_one_token_chunk_that_ends_a_prompt_is_no_decode(engine: Make) -> None:
    log = simulate(engine(), [ask(A, 97, 2)])
    assert lines(log) == ["a96 +a", "a1", "a1 .a", ""]
    assert [step.chunks for step in log] == [[(96, 0)], [(1, 96)], [], []]
    assert [step.decode_context for step in log] == [0, 0, 98, 0]


def test_seats_are_limited_by_max_num_seqs(engine: Make) -> None:
    log = simulate(engine(max_num_seqs=2), [ask(A, 5, 1), ask(B, 5, 2), ask(C, 5, 1)])
    assert lines(log) == ["a5 b5 +a +b .a", "b1 c5 +c .b .c", ""]


def test_seats_are_limited_further_by_max_num_active_seqs(engine: Make) -> None:
    log = simulate(engine(max_num_seqs=4, max_num_active_seqs=1), [ask(A, 5, 2), ask(B, 5, 1)])
    assert lines(log) == ["a5 +a", "a1 .a", "b5 +b .b", ""]


def test_without_chunked_prefill_the_head_waits_for_a_step_that_holds_it_whole(engine: Make) -> None:
    """50 of 96 tokens are gone, b's 60 do not fit, and c's 5 stay behind b."""
    requests = [ask(A, 50, 2), ask(B, 60, 1), ask(C, 5, 1)]
    log = simulate(engine(enable_chunked_prefill=False), requests)
    assert lines(log) == ["a50 +a", "a1 b60 c5 +b +c .a .b .c", ""]


# ---- long_prefill_token_threshold


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.23", ["a10 +a", "a10 b10 +b", "a10 b10", "a10 b5 .b", "a10 .a", ""]),
        ("0.32", ["a50 +a .a", "b25 +b .b", ""]),
    ],
)
def test_threshold_spares_a_lone_request_only_in_032(engine: Make, version: str, expected: list[str]) -> None:
    """a 50 and, from step 1, b 25 tokens; both versions would cap them at 10 together."""
    log = simulate(
        engine(version=version, long_prefill_token_threshold=10), [ask(A, 50, 1), ask(B, 25, 1)], at={B: 1}
    )
    assert lines(log) == expected


def test_threshold_caps_running_and_waiting_alike(engine: Make) -> None:
    """Together until b is done after step 1; then a is alone and 0.32 lets it finish at once."""
    log = simulate(engine(long_prefill_token_threshold=10), [ask(A, 50, 1), ask(B, 15, 1)])
    assert lines(log) == ["a10 b10 +a +b", "a10 b5 .b", "a30 .a", ""]


def test_adaptive_threshold_is_at_least_a_fair_share_of_the_budget(engine: Make) -> None:
    """96 // 3 = 32 each while three are there; 96 // 2 = 48 once c is done; then a is alone."""
    log = simulate(
        engine(long_prefill_token_threshold=10, long_prefill_token_threshold_adaptive=True),
        [ask(A, 200, 1), ask(B, 60, 1), ask(C, 10, 1)],
    )
    assert lines(log) == ["a32 b32 c10 +a +b +c .c", "a48 b28 .b", "a96", "a24 .a", ""]


def test_adaptive_threshold_never_lowers_the_threshold(engine: Make) -> None:
    log = simulate(
        engine(long_prefill_token_threshold=60, long_prefill_token_threshold_adaptive=True),
        [ask(A, 70, 1), ask(B, 20, 1)],
    )
    assert lines(log) == ["a60 b20 +a +b .b", "a10 .a", ""]


# ---- admission and blocks


def test_head_of_line_blocking(engine: Make) -> None:
    """8 blocks: a holds 4, then 5; b needs 6, so c, which needs 1, waits behind it until a is gone."""
    requests = [ask(A, 64, 2), ask(B, 90, 1), ask(C, 6, 1)]
    log = simulate(engine(usable=8), requests)
    assert lines(log) == ["a64 +a", "a1 .a", "b90 c6 +b +c .b .c", ""]
    assert [step.after_schedule.waiting for step in log] == [[B, C], [B, C], [], []]
    assert [step.after_schedule.free_blocks for step in log] == [4, 3, 1, 8]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (True, ["a80 +a .a", "b64 +b .b", ""]),
        (False, ["a80 b16 +a +b .a", "b48 .b", ""]),
    ],
)
def test_full_length_gate(engine: Make, gate: bool, expected: list[str]) -> None:
    """8 blocks: a takes 5; b's first chunk of 16 needs 1 block of the 3 left, its whole prompt 4."""
    requests = [ask(A, 80, 1), ask(B, 64, 1)]
    assert lines(simulate(engine(usable=8, scheduler_reserve_full_isl=gate), requests)) == expected


@pytest.mark.parametrize(
    ("version", "tail"),
    [
        ("0.32", ["b64 ^b(32) .b", ""]),
        ("0.23", ["b16 ^b(32)", "b16", "b16", "b16 .b", ""]),
    ],
)
def test_the_gate_reserves_nothing(engine: Make, version: str, tail: list[str]) -> None:
    """8 blocks, chunks of 16. Both prompts of 6 blocks pass the gate at step 0 (b: 6 of 7 free), and at
    step 4 all 8 blocks are held: a's next chunk preempts b. b (blocks b0..b3 freed as b3 b2 b1 b0, two
    of them taken by a) finds b0 b1 at step 5, but needs 4 + those 2 of the 2 free blocks."""
    log = simulate(
        engine(version=version, usable=8, max_num_batched_tokens=64, long_prefill_token_threshold=16),
        [ask(A, 96, 1), ask(B, 96, 1)],
    )
    assert lines(log) == ["a16 b16 +a +b", *["a16 b16"] * 3, "a16 -b", "a16 .a", *tail]


def test_watermark_keeps_blocks_free_while_others_run(engine: Make) -> None:
    """int(0.25 * 10) = 2 blocks: a, alone, may take 8 of 9; b (4 blocks) has to leave 2 of 5 beside c."""
    lone = simulate(engine(num_gpu_blocks=10, watermark=0.25, max_num_batched_tokens=128), [ask(A, 128, 1)])
    assert lines(lone) == ["a128 +a .a", ""]
    requests = [ask(C, 64, 2), ask(B, 60, 1)]
    without = simulate(engine(num_gpu_blocks=10, max_num_batched_tokens=128), requests)
    assert lines(without) == ["c64 b60 +c +b .b", "c1 .c", ""]
    kept = simulate(engine(num_gpu_blocks=10, watermark=0.25, max_num_batched_tokens=128), requests)
    assert lines(kept) == ["c64 +c", "c1 .c", "b60 +b .b", ""]


def test_watermark_does_not_hold_for_running_requests(engine: Make) -> None:
    """a's decode takes the last free block although the watermark is 2."""
    log = simulate(engine(usable=3, watermark=0.5), [ask(A, 32, 2)])
    assert lines(log) == ["a32 +a", "a1 .a", ""]
    assert log[1].after_schedule.free_blocks == 0


def test_a_block_is_taken_when_computed_tokens_fill_the_last_one(engine: Make) -> None:
    """a: 15 tokens; the 16th at step 1 fits the block, the 17th at step 2 needs another. The last
    sampled token is never computed: b's 16 prompt tokens and one output hold one block."""
    log = simulate(engine(), [ask(A, 15, 3), ask(B, 16, 1)])
    assert lines(log) == ["a15 b16 +a +b .b", "a1", "a1 .a", ""]
    assert [step.after_schedule.block_ids for step in log] == [{A: [1], B: [2]}, {A: [1]}, {A: [1, 3]}, {}]


def test_block_0_is_never_used(engine: Make) -> None:
    made = engine(usable=3)
    assert (made.free_blocks, made.free_list(3)) == (3, [1, 2, 3])
    log = simulate(made, [ask(A, 47, 1)])
    assert log[0].after_schedule.block_ids == {A: [1, 2, 3]}
    assert log[0].after_schedule.free_list == []


# ---- preemption


def test_fcfs_preempts_the_last_admitted(engine: Make) -> None:
    """6 blocks, 2 each: at step 1 a's 33rd token preempts c, whose 2 blocks serve a and b. c comes back
    with its output when they are done, its blocks all overwritten."""
    log = simulate(engine(usable=6), [ask(A, 32, 3), ask(B, 32, 3), ask(C, 32, 3)])
    assert lines(log) == ["a32 b32 c32 +a +b +c", "a1 b1 -c", "a1 b1 .a .b", "c33 ^c", "c1 .c", ""]
    assert [step.after_schedule.waiting for step in log] == [[], [C], [C], [], [], []]
    assert [step.after_schedule.cached_blocks for step in log] == [6, 4, 4, 5, 5, 5]
    assert log[3].chunks == [(33, 0)]
    assert [step.first_tokens for step in log] == [[A, B, C], [], [], [], [], []]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_request_that_is_last_preempts_itself(engine: Make, policy: str) -> None:
    """3 blocks: a's 20 tokens hold 2, b's 16 the third. At step 1 b needs one and is itself the last (under
    equal priorities the latest arrival). At step 2 its own block is a hit, but it needs that one and
    another, and one is free. Its recomputed last token is a chunk of one, not a decode."""
    log = simulate(engine(usable=3, scheduling_policy=policy), [ask(A, 20, 3), ask(B, 16, 3)])
    assert lines(log) == ["a20 b16 +a +b", "a1 -b", "a1 .a", "b1 ^b(16)", "b1 .b", ""]
    assert [step.chunks for step in log] == [[(20, 0), (16, 0)], [], [], [(1, 16)], [], []]
    assert [step.decode_context for step in log] == [0, 21, 22, 0, 18, 0]


def test_several_victims_return_in_their_order(engine: Make) -> None:
    """7 blocks: a's third chunk needs 2 and gets them from d and c (1 each); c then leads the queue, and
    is ahead of e, which arrived at step 2. A step that preempts admits nobody."""
    requests = [ask(A, 96, 1), ask(B, 8, 6), ask(C, 8, 3), ask(D, 8, 3), ask(E, 8, 1)]
    log = simulate(
        engine(usable=7, max_num_batched_tokens=64, long_prefill_token_threshold=32), requests, at={E: 2}
    )
    assert lines(log) == [
        "a32 b8 c8 d8 +a +b +c +d",
        "a32 b1 c1 d1",
        "a32 b1 -d -c .a",
        "b1 c10 d10 e8 +e ^c ^d .c .d .e",
        "b1",
        "b1 .b",
        "",
    ]
    assert log[2].after_schedule.waiting == [C, D, E]
    assert log[2].after_schedule.running == [A, B]


def test_a_waiting_request_never_preempts_a_worse_one(engine: Make) -> None:
    requests = [ask(A, 40, 3, priority=9), ask(B, 40, 1)]
    log = simulate(engine(usable=4, scheduling_policy="priority"), requests, at={B: 1})
    assert lines(log) == ["a40 +a", "a1", "a1 .a", "b40 +b .b", ""]


def test_priority_queue_order(engine: Make) -> None:
    """By (priority, arrival): c and e before a and d, b last."""
    requests = [ask(i, 4, 1, priority=p) for i, p in [(A, 1), (B, 2), (C, 0), (D, 1), (E, 0)]]
    log = simulate(engine(scheduling_policy="priority", max_num_seqs=2), requests)
    assert lines(log) == ["c4 e4 +c +e .c .e", "a4 d4 +a +d .a .d", "b4 +b .b", ""]
    assert log[0].after_schedule.waiting == [A, D, B]


def test_a_priority_victim_queues_by_its_priority(engine: Make) -> None:
    """3 blocks. b is preempted at step 1 and goes behind c, which came in that step and needs all 3."""
    requests = [ask(A, 20, 3), ask(B, 16, 2, priority=1), ask(C, 40, 1)]
    log = simulate(engine(usable=3, scheduling_policy="priority"), requests, at={C: 1})
    assert lines(log) == ["a20 b16 +a +b", "a1 -b", "a1 .a", "c40 +c .c", "b17 ^b .b", ""]
    assert log[1].after_schedule.waiting == [C, B]


def test_priority_victim_gives_its_tokens_back(engine: Make) -> None:
    """4 blocks, 12 tokens a step. b (20 tokens, 2 blocks, admitted first) has the worst priority. At step
    4 b has been given its token when a, at 16 tokens, needs a second block: b is dropped, and c gets the
    11 tokens that a leaves, not 10."""
    requests = [ask(B, 20, 4, priority=5), ask(A, 16, 2), ask(C, 24, 1)]
    log = simulate(
        engine(
            usable=4,
            scheduling_policy="priority",
            max_num_batched_tokens=12,
            scheduler_reserve_full_isl=False,
        ),
        requests,
        at={A: 1, C: 2},
    )
    assert lines(log) == [
        "b12 +b",
        "b8 a4 +a",
        "b1 a11",
        "b1 a1 c10 +c",
        "a1 c11 -b .a",
        "c3 b9 ^b .c",
        "b12",
        "b2 .b",
        "",
    ]


@pytest.mark.parametrize(
    ("version", "tail"),
    [
        ("0.32", ["b1 c1 -a", "b1 c1", "b1 c1", "b1 c1 .b .c", "", ""]),
        ("0.23", ["b1 -a", "b1 c1", "b1 c1", "b1 c1 .b", "c1 .c", "", ""]),
    ],
)
def test_023_skips_a_request_after_a_victim_that_was_passed_over(
    engine: Make, version: str, tail: list[str]
) -> None:
    """4 blocks, all held from step 1. At step 2 a's last token is in flight, so it is passed over; then b
    needs a block and a is the victim. 0.23 does not move its cursor back and leaves c out of the step.
    a's token arrives while it is preempted and ends it there."""
    requests = [ask(A, 20, 2, priority=5), ask(B, 16, 5), ask(C, 10, 5)]
    log = simulate(
        engine(version=version, usable=4, scheduling_policy="priority", async_scheduling=True),
        requests,
        at={B: 1, C: 1},
        async_scheduling=True,
    )
    assert lines(log) == ["a20 +a", "a1 b16 c10 +b +c .a", *tail]
    assert log[2].after_schedule.waiting == [A]
    assert log[1].after_complete.waiting == []


@pytest.mark.parametrize(
    ("version", "policy", "step"),
    [
        ("0.32", "priority", "a1 -b"),
        ("0.33", "priority", "a1 c1 -b"),
        ("0.33", "fcfs", "a1 b1 -c"),
    ],
)
def test_033_goes_on_after_a_request_that_preempted_itself(
    engine: Make, version: str, policy: str, step: str
) -> None:
    """4 blocks: a and c have one with room left, b fills its two and needs a third. Under priority b itself
    is the victim: 0.32 ends the step there, 0.33 goes on to c. Under FCFS c, the last one, is."""
    requests = [ask(A, 10, 9), ask(B, 31, 9, priority=5), ask(C, 10, 9)]
    log = simulate(engine(version=version, usable=4, scheduling_policy=policy), requests, at={C: 1})
    assert lines(log)[:3] == ["a10 b31 +a +b", "a1 b1 c10 +c", step]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, ["a20 +a", "a1 b95 +b", "a1 b25", "a1 b1 .a .b", "c10 +c .c", ""]),
        (3, ["a20 +a", "a1", "a1", "a1 b95 +b .a", "b25 c10 +c .c", "b1 .b", ""]),
    ],
)
def test_033_keeps_prefills_apart_while_somebody_decodes(
    engine: Make, interval: int, expected: list[str]
) -> None:
    """b comes at step 1, c at step 4. With --prefill-schedule-interval 3 b waits until three steps after a's
    prefill; then a has ended, nobody decodes, and nothing is held back."""
    requests = [ask(A, 20, 4), ask(B, 120, 2), ask(C, 10, 1)]
    log = simulate(engine(version="0.33", prefill_schedule_interval=interval), requests, at={B: 1, C: 4})
    assert lines(log) == expected


# ---- the prefix cache


@pytest.mark.parametrize(
    ("version", "caching", "expected"),
    [
        ("0.32", True, [2, 3, 4, 5, 1]),
        ("0.23", True, [3, 4, 5, 2, 1]),
        ("0.32", False, [2, 1, 3, 4, 5]),
        ("0.23", False, [3, 4, 5, 2, 1]),
        ("0.24", False, [2, 1, 3, 4, 5]),
        ("0.27", False, [3, 4, 5, 2, 1]),
        ("0.27", True, [2, 3, 4, 5, 1]),
    ],
)
def test_free_list_order(engine: Make, version: str, caching: bool, expected: list[int]) -> None:
    """20 tokens in blocks 1 (full) and 2, freed last block first; from 0.24 on those without a hash come in
    front, but in 0.27 only where there are hashes at all."""
    log = simulate(engine(version=version, usable=5, enable_prefix_caching=caching), [ask(A, 20, 1)])
    assert log[0].after_schedule.free_list == [3, 4, 5]
    assert log[0].after_complete.free_list == expected


def test_requests_of_one_step_share_a_prefix(engine: Make) -> None:
    """A block counts as cached once scheduled: b hits the 5 blocks that a is about to compute."""
    requests = [ask(i, 104, 1, content=((9, 80),)) for i in (A, B)]
    log = simulate(engine(max_num_batched_tokens=256), requests)
    assert lines(log) == ["a104 b24 +a +b(80) .a .b", ""]
    assert log[0].after_schedule.block_ids[B] == [1, 2, 3, 4, 5, 8, 9]
    assert log[0].chunks == [(104, 0), (24, 80)]


def test_a_shared_block_is_free_when_its_last_holder_goes(engine: Make) -> None:
    """a holds 1 2 3 and b 1 2 4; a leaves first and frees only block 3."""
    requests = [ask(A, 40, 1, content=((7, 32),)), ask(B, 40, 2, content=((7, 32),))]
    log = simulate(engine(usable=5), requests)
    assert lines(log) == ["a40 b8 +a +b(32) .a", "b1 .b", ""]
    assert log[0].after_schedule.free_list == [5]
    assert [step.after_complete.free_list for step in log[:2]] == [[3, 5], [4, 3, 5, 2, 1]]


def test_a_block_belongs_to_the_content_of_its_last_token(engine: Make) -> None:
    """Blocks 0..2 end with tokens 15, 31, 47. a and b share 40 tokens, so 2 blocks; c shares their first
    20 tokens, but its second block ends in another part; d shares a part's id at other tokens: nothing."""
    requests = [
        ask(A, 60, 1, content=((7, 20), (8, 40))),
        ask(B, 60, 1, content=((7, 20), (8, 40))),
        ask(C, 60, 1, content=((7, 20), (9, 60))),
        ask(D, 60, 1, content=((8, 20),)),
    ]
    log = simulate(engine(max_num_batched_tokens=256), requests)
    assert log[0].cached_tokens == {A: 0, B: 32, C: 16, D: 0}
    assert log[0].after_schedule.cached_blocks == 3 + 1 + 2 + 3


def test_without_prefix_caching_nothing_is_shared(engine: Make) -> None:
    requests = [ask(i, 32, 1, content=((7, 32),)) for i in (A, B)]
    log = simulate(engine(enable_prefix_caching=False), requests)
    assert lines(log) == ["a32 b32 +a +b .a .b", ""]
    assert log[0].after_schedule.cached_blocks == 0


def test_a_full_hit_recomputes_its_last_block_and_keeps_both(engine: Make) -> None:
    """a leaves blocks 1 and 2. b, the same 32 tokens, hits 1 and computes the second half into block 3,
    a duplicate. d takes 4, 5 and 2 (evicting one of the two); e still hits 1 and 3."""
    shared = ((7, 32),)
    requests = [ask(A, 32, 1, content=shared), ask(B, 32, 1, content=shared)]
    requests += [ask(D, 40, 1), ask(E, 40, 1, content=shared)]
    log = simulate(engine(usable=5), requests, at={B: 1, D: 2, E: 3})
    assert lines(log) == ["a32 +a .a", "b16 +b(16) .b", "d40 +d .d", "e8 +e(32) .e", ""]
    assert [list(step.after_schedule.block_ids.values()) for step in log] == [
        [[1, 2]],
        [[1, 3]],
        [[4, 5, 2]],
        [[1, 3, 2]],
        [],
    ]
    assert [step.after_complete.free_list for step in log] == [
        [3, 4, 5, 2, 1],
        [4, 5, 2, 3, 1],
        [2, 3, 1, 5, 4],
        [2, 5, 4, 3, 1],
        [2, 5, 4, 3, 1],
    ]
    assert [step.after_schedule.cached_blocks for step in log] == [2, 2, 4, 4, 4]


def test_the_oldest_duplicate_is_hit(engine: Make) -> None:
    shared = ((7, 32),)
    requests = [ask(A, 32, 1, content=shared), ask(B, 32, 1, content=shared), ask(C, 40, 1, content=shared)]
    log = simulate(engine(usable=5), requests, at={B: 1, C: 2})
    assert log[1].after_schedule.block_ids == {B: [1, 3]}
    assert log[2].after_schedule.block_ids == {C: [1, 2, 4]}


@pytest.mark.parametrize("version", ["0.23", "0.32"])
def test_a_preempted_request_hits_its_own_outputs(engine: Make, version: str) -> None:
    """5 blocks. b's second block holds 14 prompt tokens and 2 outputs, its third is partial when, at step
    5, a needs a block and takes that one. b returns after a with 35 tokens, 32 of them cached."""
    log = simulate(engine(version=version, usable=5), [ask(A, 28, 7), ask(B, 30, 6)])
    assert lines(log) == [
        "a28 b30 +a +b",
        *["a1 b1"] * 4,
        "a1 -b",
        "a1 .a",
        "b3 ^b(32) .b",
        "",
    ]


# ---- async scheduling


def test_async_frees_seat_and_blocks_one_step_later(engine: Make) -> None:
    """One seat. a's last token is in flight at step 2, which schedules nothing and admits nobody."""
    requests = [ask(A, 10, 2), ask(B, 10, 1)]
    assert lines(simulate(engine(max_num_seqs=1), requests)) == ["a10 +a", "a1 .a", "b10 +b .b", ""]
    log = simulate(engine(max_num_seqs=1, async_scheduling=True), requests, async_scheduling=True)
    assert lines(log) == ["a10 +a", "a1 .a", "", "b10 +b .b", "", ""]
    assert log[2].after_schedule.running == [A]
    assert log[2].after_schedule.free_blocks == 99


def test_async_wastes_a_slot_on_a_stop_token(engine: Make) -> None:
    """The second token stops a; step 2 was scheduled before that was known, and its output is dropped."""
    log = simulate(engine(async_scheduling=True), [ask(A, 10, 2, max_tokens=5)], async_scheduling=True)
    assert lines(log) == ["a10 +a", "a1 .a", "a1", ""]
    assert [step.emitted for step in log] == [1, 1, 0, 0]
    assert [step.samples for step in log] == [1, 1, 1, 0]
    log = simulate(engine(), [ask(A, 10, 2, max_tokens=5)])
    assert lines(log) == ["a10 +a", "a1 .a", ""]


def test_async_hashes_a_decoded_block_one_step_later(engine: Make) -> None:
    """Step 1 computes the 16th token. Synchronously its id is known by then; in async it is in flight."""
    request = ask(A, 15, 4)
    log = simulate(engine(), [request])
    assert [step.after_schedule.cached_blocks for step in log][:3] == [0, 1, 1]
    log = simulate(engine(async_scheduling=True), [request], async_scheduling=True)
    assert [step.after_schedule.cached_blocks for step in log][:3] == [0, 0, 1]
    assert log[0].after_complete.cached_blocks == 0


def test_async_hashes_the_last_block_as_its_token_arrives(engine: Make) -> None:
    """No schedule() follows for a; its 16th computed token gets its id when step 1 is complete."""
    log = simulate(engine(async_scheduling=True), [ask(A, 15, 2)], async_scheduling=True)
    assert lines(log) == ["a15 +a", "a1 .a", "", ""]
    assert [step.after_complete.cached_blocks for step in log] == [0, 1, 1, 1]


@pytest.mark.parametrize("version", ["0.23", "0.32"])
def test_async_delivers_to_a_preempted_request(engine: Make, version: str) -> None:
    """3 blocks. b preempts itself at step 1 with its first token in flight; that token is delivered, and
    b returns with 17 tokens once a has gone, one step later than in sync."""
    log = simulate(
        engine(version=version, usable=3, async_scheduling=True),
        [ask(A, 20, 3), ask(B, 16, 3)],
        async_scheduling=True,
    )
    assert lines(log) == ["a20 b16 +a +b", "a1 -b", "a1 .a", "", "b1 ^b(16)", "b1 .b", "", ""]
    assert [step.emitted for step in log] == [2, 1, 1, 0, 1, 1, 0, 0]
    assert [step.first_tokens for step in log] == [[A, B], [], [], [], [], [], [], []]


# ---- the end of a request


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_max_model_len_ends_a_request(engine: Make, async_scheduling: bool) -> None:
    """17 of 20 tokens are prompt: three outputs, and no step for a fourth even when one is in flight."""
    log = simulate(
        engine(max_model_len=20, async_scheduling=async_scheduling),
        [ask(A, 17, 100)],
        async_scheduling=async_scheduling,
    )
    assert lines(log) == ["a17 +a", "a1", "a1 .a", ""] + [""] * async_scheduling
    assert sum(step.emitted for step in log) == 3


def test_one_empty_step_follows_the_last_finish(engine: Make) -> None:
    made = engine()
    assert not made.has_requests
    made.add(ask(A, 10, 1), 0)
    step = made.schedule()
    made.complete(step)
    assert (step.finished, made.running, made.waiting, made.has_requests) == ([A], [], [], True)
    step = made.schedule()
    assert (step.total_tokens, made.has_requests) == (0, False)
    made.complete(step)
    assert (step.finished, step.emitted) == ([], 0)


# ---- aborts


def test_abort_of_a_running_request(engine: Make) -> None:
    """Its seat and blocks are there for the very next schedule()."""
    requests = [ask(A, 32, 9), ask(B, 16, 1)]
    log = simulate(engine(max_num_seqs=1), requests, aborts=[Abort(2, "schedule", A)])
    assert lines(log) == ["a32 +a", "a1", "b16 +b .b", ""]
    assert [step.emitted for step in log] == [1, 1, 1, 0]
    assert log[-1].after_complete.free_blocks == 100


def test_abort_frees_blocks_as_a_finish_does(engine: Make) -> None:
    """Blocks 1, 2 (hashed) and 3 (partial): 3 to the head of the list, then 2 and 1 to its end."""
    log = simulate(engine(usable=5), [ask(A, 40, 9)], aborts=[Abort(1, "schedule", A)])
    assert lines(log) == ["a40 +a", ""]
    assert log[1].after_schedule.free_list == [3, 4, 5, 2, 1]


def test_abort_during_a_step_drops_its_output(engine: Make) -> None:
    requests = [ask(A, 32, 9), ask(B, 16, 1)]
    log = simulate(engine(max_num_seqs=1), requests, aborts=[Abort(1, "complete", A)])
    assert lines(log) == ["a32 +a", "a1", "b16 +b .b", ""]
    assert [step.emitted for step in log] == [1, 0, 1, 0]


def test_abort_in_the_middle_of_a_prompt(engine: Make) -> None:
    log = simulate(engine(), [ask(A, 200, 9)], aborts=[Abort(1, "complete", A)])
    assert lines(log) == ["a96 +a", "a96", ""]
    assert [step.first_tokens for step in log] == [[], [], []]
    assert log[-1].after_complete.free_blocks == 100


def test_abort_of_a_waiting_request(engine: Make) -> None:
    requests = [ask(A, 32, 3), ask(B, 16, 1), ask(C, 8, 1)]
    log = simulate(engine(max_num_seqs=1), requests, aborts=[Abort(1, "schedule", B)])
    assert lines(log) == ["a32 +a", "a1", "a1 .a", "c8 +c .c", ""]
    assert [step.after_schedule.waiting for step in log] == [[B, C], [C], [C], [], []]


def test_abort_of_a_preempted_request(engine: Make) -> None:
    requests = [ask(A, 20, 3), ask(B, 16, 3)]
    log = simulate(engine(usable=3), requests, aborts=[Abort(2, "schedule", B)])
    assert lines(log) == ["a20 b16 +a +b", "a1 -b", "a1 .a", ""]
    assert log[2].after_schedule.waiting == []
    assert log[-1].after_complete.free_blocks == 3


def test_async_abort_drops_the_output_in_flight(engine: Make) -> None:
    log = simulate(
        engine(async_scheduling=True),
        [ask(A, 16, 9)],
        aborts=[Abort(2, "schedule", A)],
        async_scheduling=True,
    )
    assert lines(log) == ["a16 +a", "a1", ""]
    assert [step.emitted for step in log] == [1, 0, 0]


def test_abort_of_the_only_request_leaves_one_empty_step(engine: Make) -> None:
    made = engine()
    made.add(ask(A, 10, 1), 0)
    made.abort(A)
    assert (made.waiting, made.has_requests) == ([], True)
    assert made.schedule().total_tokens == 0
    assert not made.has_requests


def test_abort_of_a_finished_or_unknown_request_is_ignored(engine: Make) -> None:
    made = engine(usable=3)
    made.abort(D)
    assert not made.has_requests
    made.add(ask(A, 10, 1), 0)
    made.complete(made.schedule())
    made.abort(A)
    made.abort(A)
    assert made.schedule().total_tokens == 0
    assert not made.has_requests
    assert sorted(made.free_list(3)) == [1, 2, 3]
