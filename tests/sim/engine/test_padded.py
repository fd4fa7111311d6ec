"""Static, contiguous and paged batching: who computes what, step by step, and what must never happen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import PaddedBatch, PaddedStep
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.servers import SERVERS

BASE = EngineConfig(
    version="test",
    max_num_seqs=2,
    max_num_batched_tokens=200,
    max_model_len=100,
    num_gpu_blocks=12,
    block_size=16,
    enable_chunked_prefill=False,
    async_scheduling=False,
)


def engine(policy: str = "contiguous", **changes: object) -> PaddedBatch:
    made = SERVERS[policy].engine(replace(BASE, **changes))  # type: ignore[arg-type]
    assert isinstance(made, PaddedBatch)
    return made


def request(number: int, prompt: int, output: int) -> Request:
    return Request(number, 0.0, prompt, output, output, ())


def start(made: PaddedBatch, *lengths: tuple[int, int]) -> None:
    for number, (prompt, output) in enumerate(lengths):
        made.add(request(number, prompt, output), number)


def log(made: PaddedBatch, arrivals: dict[int, tuple[int, int]] | None = None) -> list[str]:
    """A line a step until all is done. arrivals: a request that comes before the step of that number."""
    lines = []
    number = 100
    while made.has_requests or (arrivals and made.tick <= max(arrivals)):
        if arrivals and made.tick in arrivals:
            made.add(request(number, *arrivals[made.tick]), number)
            number += 1
        step = made.schedule()
        assert isinstance(step, PaddedStep)
        if step.idle_s:
            text = "waits"
        else:
            text = f"decode {step.decodes} of {step.rows} x {step.longest}, prefill {step.chunks}"
        made.complete(step)
        lines.append(f"{text}, first {step.first_tokens}, finished {step.finished}")
        assert len(lines) < 1000
    return lines


def test_a_static_batch_is_drained_with_finished_rows_as_padding() -> None:
    made = engine(policy="static")
    start(made, (10, 1), (20, 3), (30, 2))
    assert log(made) == [
        "decode 0 of 0 x 0, prefill [(10, 0), (20, 0)], first [0, 1], finished [0]",
        "decode 1 of 2 x 21, prefill [], first [], finished []",
        "decode 1 of 2 x 22, prefill [], first [], finished [1]",
        "decode 0 of 0 x 0, prefill [(30, 0)], first [2], finished []",
        "decode 1 of 1 x 31, prefill [], first [], finished [2]",
    ]


def test_a_static_batch_waits_to_fill() -> None:
    made = engine(policy="static", batch_wait_s=0.003)
    start(made, (10, 1))
    assert log(made) == [
        *["waits, first [], finished []"] * 3,
        "decode 0 of 0 x 0, prefill [(10, 0)], first [0], finished [0]",
    ]
    start(made, (10, 1))
    assert log(made, {made.tick + 1: (10, 1)}) == [
        "waits, first [], finished []",
        "decode 0 of 0 x 0, prefill [(10, 0), (10, 0)], first [0, 100], finished [0, 100]",
    ]


def test_a_free_slot_is_filled_in_the_next_step_beside_the_decodes() -> None:
    made = engine()
    start(made, (10, 1), (20, 4), (30, 2))
    assert log(made) == [
        "decode 0 of 0 x 0, prefill [(10, 0), (20, 0)], first [0, 1], finished [0]",
        "decode 1 of 1 x 21, prefill [(30, 0)], first [2], finished []",
        "decode 2 of 2 x 31, prefill [], first [], finished [2]",
        "decode 1 of 1 x 23, prefill [], first [], finished [1]",
    ]


def test_an_arrival_takes_two_steps_to_the_queue_while_the_server_is_busy() -> None:
    made = engine()
    start(made, (10, 5))
    steps = log(made, {1: (20, 1)})
    assert [line.split("prefill ")[1].split(", first")[0] for line in steps] == [
        "[(10, 0)]",
        "[]",
        "[]",
        "[(20, 0)]",
        "[]",
    ]


def test_pages_admit_prompts_up_to_four_fifths_of_the_free_blocks() -> None:
    made = engine(policy="paged", max_num_seqs=8)  # 12 blocks: 153 prompt tokens, then 99 of 8 free blocks
    start(made, (60, 2), (60, 2), (60, 1))
    assert log(made) == [
        "decode 0 of 0 x 0, prefill [(60, 0), (60, 0)], first [0, 1], finished []",
        "decode 2 of 2 x 61, prefill [], first [], finished [0, 1]",
        "decode 0 of 0 x 0, prefill [(60, 0)], first [2], finished [2]",
    ]
    assert made.kv.usage == 0


def test_a_decode_takes_a_block_where_it_needs_one() -> None:
    made = engine(policy="paged")
    start(made, (15, 4))
    usage = []
    while made.has_requests:
        step = made.schedule()
        usage.append(round(made.kv.usage * 12))
        made.complete(step)
    assert usage == [1, 1, 2, 2]


def test_a_pool_that_is_used_up_is_told() -> None:
    made = engine(policy="paged", num_gpu_blocks=2, max_num_seqs=1)
    start(made, (20, 20))
    with pytest.raises(InputError, match="all 2 KV blocks are taken while 1 requests run"):
        log(made)


def test_a_prompt_beyond_the_pool_is_refused() -> None:
    made = engine(policy="paged", num_gpu_blocks=2)
    with pytest.raises(InputError, match="never admitted to 2 blocks"):
        start(made, (26, 1))


@pytest.mark.parametrize("policy", ["static", "contiguous", "paged"])
def test_prompts_in_chunks(policy: str) -> None:
    made = engine(policy=policy, enable_chunked_prefill=True, long_prefill_token_threshold=16)
    start(made, (40, 2), (10, 3))
    longest = {"static": (41, 42), "contiguous": (11, 12), "paged": (11, 12)}[policy]
    rows = {"static": 2}.get(policy, 1)
    assert log(made) == [
        "decode 0 of 0 x 0, prefill [(16, 0), (10, 0)], first [1], finished []",
        f"decode 1 of {rows} x {longest[0]}, prefill [(16, 16)], first [], finished []",
        f"decode 1 of {rows} x {longest[1]}, prefill [(8, 32)], first [0], finished [1]",
        f"decode 1 of {rows} x {43 if policy == 'static' else 41}, prefill [], first [], finished [0]",
    ]


@pytest.mark.parametrize("policy", ["static", "contiguous", "paged"])
def test_an_aborted_request_leaves_wherever_it_stands(policy: str) -> None:
    made = engine(policy=policy)
    start(made, (10, 5), (10, 2), (10, 2), (10, 2))
    made.abort(3)
    made.complete(made.schedule())
    made.abort(0)
    made.abort(2)
    made.abort(99)
    assert made.num_running == 1
    lines = log(made)
    assert lines[-1].endswith("finished [1]")
    assert made.num_running == made.num_waiting == 0
    assert made.kv.usage == 0


lengths = st.tuples(st.integers(1, 60), st.integers(1, 40))


@given(
    requests=st.lists(lengths, min_size=1, max_size=12),
    policy=st.sampled_from(["static", "contiguous", "paged"]),
    rows=st.integers(1, 4),
    chunk=st.sampled_from([0, 7, 16]),
    gaps=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_no_token_is_lost(
    requests: list[tuple[int, int]], policy: str, rows: int, chunk: int, gaps: list[int]
) -> None:
    """Every prompt token is computed once, every output token delivered once, and memory comes back."""
    made = engine(
        policy=policy,
        max_num_seqs=rows,
        num_gpu_blocks=28,
        enable_chunked_prefill=bool(chunk),
        long_prefill_token_threshold=chunk,
        batch_wait_s=0.002,
    )
    waiting = [request(number, prompt, output) for number, (prompt, output) in enumerate(requests)]
    due = [sum(gaps[: number + 1]) for number in range(len(waiting))]
    computed = emitted = 0
    first: list[int] = []
    finished: list[int] = []
    ticks = []
    while waiting or made.has_requests:
        while waiting and due[0] <= made.tick:
            made.add(waiting.pop(0), made.tick)
            due.pop(0)
        step = made.schedule()
        assert step.rows <= rows
        assert len(step.chunks) + step.decodes <= rows
        assert step.decodes <= step.samples <= step.decodes + len(step.chunks)
        computed += sum(tokens for tokens, _ in step.chunks)
        assert 0 <= made.kv.usage <= 1
        made.complete(step)
        assert step.emitted == len(step.first_tokens) + len(step.gaps) + step.steady
        emitted += step.emitted
        first += step.first_tokens
        finished += step.finished
        ticks.append(step.tick)
    assert ticks == list(range(len(ticks)))
    assert computed == sum(prompt for prompt, _ in requests)
    assert emitted == sum(output for _, output in requests)
    assert sorted(first) == sorted(finished) == list(range(len(requests)))
    assert made.kv.usage == 0
    assert made.num_running == made.num_waiting == 0
