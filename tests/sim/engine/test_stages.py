"""Pipeline stages, LoRA slots and grammars: logs of vLLM 0.32's own scheduler line by line, and what a step
that passes several stages takes in closed form."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import numpy as np
import pytest
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine_loop import IDLE, EngineLoop
from servecast.sim.engine.held_costs import AdapterCache
from servecast.sim.engine.pipeline import Pipeline
from servecast.sim.engine.pipeline_rules import max_concurrent_batches
from servecast.sim.engine.request import Request, Requests, content_of_adapter
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.step_costs import StepCosts
from servecast.sim.inputs.errors import InputError

LOGS = dict(
    re.findall(r"(?ms)^== (\w+): (.*?)(?=^== |\Z)", (DATA / "golden" / "stages.txt").read_text("utf-8"))
)
GRAMMARS = {"g": 3, "h": 4}  # of the log "grammar": compiled before these steps


def config(version: str = "0.32", **flags: Any) -> EngineConfig:
    shared: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 24,
        "max_model_len": 1024,
        "block_size": 4,
    }
    return EngineConfig(version, **{**shared, "num_gpu_blocks": 80, **flags})


def logged(name: str, text: str) -> list[str]:
    """The lines of our scheduler as those of the log are read."""
    flags = dict(re.findall(r"(\w+)=(\S+)", text.splitlines()[0]))
    requests = re.findall(r"(?m)^   (\w+): (\d+) tok, out<=(\d+), at (\d+)(?:, lora (\d+))?", text)
    engine = Scheduler(
        config(
            max_num_seqs=int(flags["seqs"]),
            num_gpu_blocks=int(flags["blocks"]),
            async_scheduling=flags["async"] == "True",
            pipeline_parallel_size=int(flags["pp"]),
            use_v2_model_runner=name.endswith("v2"),
            max_loras=int(flags["loras"]),
        ),
        trace=True,
    )
    names = [letter for letter, *_ in requests]
    waits = GRAMMARS if name == "grammar" else {}
    todo, flight, lines, tick = deque(enumerate(requests)), deque[tuple[int, Any]](), list[str](), 0
    while todo or engine.has_requests or flight:
        if todo or engine.has_requests:
            while todo and int(todo[0][1][3]) <= tick:
                number, (letter, prompt, most, _, adapter) = todo.popleft()
                engine.add(
                    Request(
                        number,
                        0.0,
                        int(prompt),
                        int(most),
                        int(most),
                        adapter=int(adapter or 0),
                        grammar=int(letter in waits),
                    ),
                    tick,
                )
            for letter, ready in waits.items():
                if ready == tick:
                    engine.grammar_ready(names.index(letter))
            step = engine.schedule()
            lines.append(scheduled(engine, step, tick, names))
            flight.append((tick, step))
            tick += 1
            if len(flight) < max_concurrent_batches(engine.config) and (todo or engine.has_requests):
                continue
        number, step = flight.popleft()
        engine.complete(step)
        finished = " ".join(names[each] for each in step.finished)
        lines.append(f"U{number} {step.emitted} {finished} {engine.free_blocks} {engine.cached_blocks}")
    return lines


def scheduled(engine: Scheduler, step: Any, tick: int, names: list[str]) -> str:
    batch = [
        f"{'+' * (number in step.admitted)}{names[number]}+{tokens}[{len(engine.block_ids(number))}]"
        for number, tokens in step.scheduled().items()
    ]
    waiting = ",".join(names[number] for number in engine.waiting)
    return f"S{tick} {' '.join(batch)} {engine.free_blocks} {engine.cached_blocks} {waiting}"


def of_vllm(text: str) -> list[str]:
    """The same of the log."""
    lines = []
    for line in text.splitlines():
        if found := re.match(r"S(\d+) +(.*?) +free=(\d+) cached=(\d+)(?: wait=(\S+))?", line):
            number, batch, free, cached, waiting = found.groups()
            batch = re.sub(r":\d+\+", "+", batch) if batch != "-" else ""
            names = re.sub(r":\w+", "", waiting or "")
            lines.append(f"S{number} {batch} {free} {cached} {names}")
        elif found := re.match(r"  U(\d+) +(.*?) +-> .*free=(\d+) cached=(\d+)", line):
            number, told, free, cached = found.groups()
            ended = " ".join(re.findall(r"(\w+):\+1!", told))
            lines.append(f"U{number} {told.count(':+')} {ended} {free} {cached}")
    return lines


@pytest.mark.parametrize("name", LOGS)
def test_the_scheduler_writes_vllms_log(name: str) -> None:
    assert logged(name, LOGS[name]) == of_vllm(LOGS[name])


@pytest.mark.parametrize(
    ("version", "v2", "batches"),
    # max_concurrent_batches: MultiprocExecutor in 0.20, VllmConfig since; Model Runner V2 overlaps one more
    [("0.20", True, 4), ("0.23", False, 4), ("0.23", True, 5), ("0.33", True, 5)],
)
def test_batches_in_flight(version: str, v2: bool, batches: int) -> None:
    flags = config(version, pipeline_parallel_size=4, use_v2_model_runner=v2)
    assert max_concurrent_batches(flags) == batches


def test_a_third_adapter_waits_and_one_that_is_there_passes_it() -> None:
    """Scheduler.schedule: "Scheduling would exceed max_loras, skip"."""
    engine = Scheduler(config(max_loras=1, async_scheduling=False))
    for number, adapter in enumerate((1, 2, 1, 0)):
        engine.add(Request(number, 0.0, 4, 2, 2, adapter=adapter), number)
    step = engine.schedule()
    assert (step.admitted, engine.waiting) == ([0, 2, 3], [1])


@pytest.mark.parametrize(("version", "admitted"), [("0.32", True), ("0.33", False)])
def test_adapters_of_running_requests_that_are_not_in_the_step(version: str, admitted: bool) -> None:
    """From 0.33 on they count (scheduled_loras of self.running): here one in the other batch in flight."""
    engine = Scheduler(config(version, max_loras=1, async_scheduling=False, pipeline_parallel_size=2))
    engine.add(Request(0, 0.0, 4, 8, 8, adapter=1), 0)
    engine.schedule()
    engine.add(Request(1, 0.0, 4, 8, 8, adapter=2), 1)
    assert (engine.schedule().admitted == [1]) is admitted


def test_too_many_adapters_in_a_step_end_the_engine_before_0_33() -> None:
    engine = Scheduler(config("0.32", max_loras=1, async_scheduling=False, pipeline_parallel_size=2))
    engine.add(Request(0, 0.0, 4, 8, 8, adapter=1), 0)
    first = engine.schedule()
    engine.add(Request(1, 0.0, 4, 8, 8, adapter=2), 1)
    second = engine.schedule()
    engine.complete(first)
    engine.complete(second)
    engine.add(Request(2, 0.0, 4, 8, 8), 2)
    with pytest.raises(InputError, match="LoRA adapters"):
        engine.schedule()


def test_adapters_share_no_prefix() -> None:
    """A block's hash includes the adapter: of two equal prompts the second hits with the same only."""
    shared = ((1, 16),)
    for adapter, hit in ((1, 16), (2, 0)):
        engine = Scheduler(config(max_loras=2, async_scheduling=False))
        for number, own in enumerate((1, adapter)):
            content = content_of_adapter(shared, own)
            engine.add(Request(number, 0.0, 17, 1, 1, content, adapter=own), number)
            step = engine.schedule()
            engine.complete(step)
        assert step.cached_tokens[1] == hit


# ---- stages in time

SECOND = 10**12


def stage(seconds: float, token_s: float = 0.0) -> StepCosts:
    """A stage on which any step takes so long, and each of its tokens."""
    numbers: dict[str, Any] = dict.fromkeys(
        ("decode_s", "chunk_token_s", "chunk_s", "serial_s", "request_s", "eager_s"), 0.0
    )
    numbers |= {"attention": [], "window": 0, "chunked": False, "graphed": 0, "prompt_tile": 1}
    numbers |= {"slots": 0, "lora": (0.0, 0.0, 0.0), "least": (None, None, 1.0)}
    by_tokens = lambda tokens: seconds + token_s * tokens  # noqa: E731
    return StepCosts(numbers, by_tokens, lambda rows: 0.0, lambda tokens, requests: 0.0)


def timed(
    requests: list[Request],
    stages: list[float],
    hand_over: float = 0.0,
    *,
    v2: bool = False,
    caches: tuple[AdapterCache, ...] | None = None,
    **flags: Any,
) -> tuple[np.ndarray[Any, Any], EngineLoop]:
    """Outcomes (by ``engine_loop.OUTCOMES``) and the loop of requests that all come at once."""
    made = config(
        pipeline_parallel_size=len(stages),
        async_scheduling=flags.pop("async_scheduling", v2),
        use_v2_model_runner=v2,
        num_gpu_blocks=1000,
        **flags,
    )
    scheduler = Scheduler(made)
    loop = EngineLoop(
        scheduler, 0, None, lambda step: sum(stages), lambda step: 0.0, iter(lambda: 1.0, 0.0), (0, 0), None
    )
    ways = (lambda tokens: hand_over,) * (len(stages) - 1)
    stride = scheduler.stride if made.async_scheduling else 0
    loop.use(Pipeline(tuple(stage(seconds) for seconds in stages), ways, stride))
    loop.adapter_cache = caches
    outcomes = np.full((8, len(requests)), -1, np.int64)
    loop.load(Requests.of(requests), outcomes)
    loop.inbox.extend((0, row) for row in range(len(requests)))
    loop.tell_ends = False
    assert loop.advance(10**18) == IDLE
    return outcomes / SECOND, loop


@pytest.mark.parametrize(
    ("hand_over", "seconds"), [(0.0, (10 + 4 - 1) * 0.25), (0.125, 2 * 1.375 + 0.25 + 1.375)]
)
def test_the_bubble_of_one_long_prompt(hand_over: float, seconds: float) -> None:
    """n chunks through p stages of s each: (n + p - 1) s, of which p - 1 steps are the bubble (Huang et al.,
    GPipe, 2019). With h between two stages p chunks in flight do not fill them: the next p start when the
    first has come through, after p s + (p - 1) h, so the tenth of four at a time starts two such rounds and
    one s later."""
    outcomes, loop = timed([Request(0, 0.0, 240, 1, 1)], [0.25] * 4, hand_over=hand_over)
    assert outcomes[4, 0] == seconds  # budget 24: ten chunks
    assert loop.step_columns.shape[1] == 10


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("stages", [(0.25, 0.25), (0.25, 0.5), (0.5, 0.25, 0.125, 0.125)])
def test_decodes_fill_the_stages_in_turn(stages: tuple[float, ...], v2: bool) -> None:
    """As many batches as stages, each of other requests: the slowest stage is always at work, and a request
    gets a token when all batches have passed it, or when it has passed all stages, whichever is later."""
    p = len(stages)
    requests = [Request(number, 0.0, 24, 101, 101) for number in range(p)]  # a budget each, a batch each
    outcomes, loop = timed(requests, list(stages), v2=v2)
    period = max(p * max(stages), sum(stages))
    decoding = outcomes[5] - outcomes[4]
    assert decoding == pytest.approx(np.full(p, 100 * period), rel=0.01)
    gaps = loop.gap_columns
    assert np.average(gaps[1], weights=gaps[2]) == pytest.approx(period, rel=0.01)


def test_each_stage_loads_its_layers_of_an_adapter_when_its_step_comes() -> None:
    """Half a second from disk on each stage, an eighth and a quarter into the slot: 0.25 + 0.625, then 0.25 +
    0.75 for the first token, and half a second for each of two more."""
    caches = (AdapterCache(1, 1, 0.5, 0.125), AdapterCache(1, 1, 0.5, 0.25))
    requests = [Request(0, 0.0, 4, 3, 3, adapter=1)]
    outcomes, _ = timed(requests, [0.25, 0.25], caches=caches, max_loras=1, version="0.33")
    assert outcomes[4:6, 0].tolist() == [1.875, 2.875]


def test_model_runner_v1_overlaps_no_decodes_asynchronously() -> None:
    """Before 0.31 it keeps asynchronous scheduling with stages, where each step has all requests, and its
    first stage waits for the last one's tokens: one step at a time."""
    requests = [Request(number, 0.0, 4, 101, 101) for number in range(2)]
    outcomes, _ = timed(requests, [0.25, 0.25], version="0.30", async_scheduling=True)
    assert (outcomes[5] - outcomes[4]).tolist() == [100 * 0.5] * 2


def test_steps_of_a_pipeline_take_no_more_time_than_passes() -> None:
    """The rows of overlapping steps share out the time: their durations add up to it."""
    requests = [Request(number, 0.0, 24, 51, 51) for number in range(3)]
    outcomes, loop = timed(requests, [0.25, 0.5, 0.25])
    start, seconds = (loop.step_columns[row].view(np.float64) for row in (1, 2))
    assert seconds.sum() == pytest.approx(outcomes[5].max())
    assert (start[1:] >= (start + seconds)[:-1] - 1e-9).all()


def plain_pipeline(
    requests: list[Request], stages: list[tuple[float, float]], hand_over: float, engine: Scheduler
) -> dict[int, tuple[float, float]]:
    """First and last token of each request, by a loop as short as EngineCore.step_with_batch_queue: decide
    steps while there is room for one more in flight, else wait for the oldest. A stage takes a + b x tokens,
    one step at a time. Asynchronously a step with decodes starts when the one ``stride`` before has been
    sampled, of which its tokens are."""
    depth, stride = max_concurrent_batches(engine.config), engine.stride
    coming, flight, found = deque(requests), deque[tuple[Any, float]](), dict[int, list[float]]()
    free, ends, now = [0.0] * len(stages), list[float](), 0.0
    while True:
        while coming and coming[0].arrival_s <= now:
            request = coming.popleft()
            engine.add(request, request.request_id)
        if engine.has_requests:
            step = engine.schedule()
            at = now
            if step.decodes and engine.config.async_scheduling and len(ends) >= stride:
                at = max(at, ends[len(ends) - stride])
            for number, (fixed, each) in enumerate(stages if step.total_tokens else ()):
                free[number] = at = max(at + hand_over * (number > 0), free[number])
                free[number] = at = at + fixed + each * step.total_tokens
            ends.append(max([at, *ends[-1:]]))
            flight.append((step, ends[-1]))
            if len(flight) < depth and (step.total_tokens or engine.has_requests):
                continue
        elif not flight:
            if not coming:
                return {number: (times[0], times[-1]) for number, times in found.items()}
            now = max(now, coming[0].arrival_s)
            continue
        step, end = flight.popleft()
        now = max(now, end)
        for sequence in step.samplers:
            times = found.setdefault(sequence.request_id, [])
            if len(times) < requests[sequence.request_id].output_tokens:
                times.append(end)
        engine.complete(step)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_stages_take_as_long_as_in_a_plain_loop(seed: int, v2: bool) -> None:
    """Thirty requests at random times, two to four stages of unequal speed: to the picosecond, since times
    are multiples of 2^-10 s."""
    rng, ms = np.random.default_rng(seed), 1 / 1024
    times = np.cumsum(rng.integers(0, 60, 30)) * ms
    requests = [
        Request(number, float(at), int(prompt), int(output), int(output))
        for number, (at, prompt, output) in enumerate(
            zip(times, rng.integers(1, 90, 30), rng.integers(1, 12, 30), strict=True)
        )
    ]
    stages = [(int(a) * ms, int(b) * ms) for a, b in rng.integers(1, 9, (2 + seed % 3, 2))]
    made = config(
        pipeline_parallel_size=len(stages),
        async_scheduling=v2,
        use_v2_model_runner=v2,
        num_gpu_blocks=1000,
        enable_prefix_caching=False,
    )
    expected = plain_pipeline(requests, stages, 3 * ms, Scheduler(made))

    scheduler = Scheduler(made)
    loop = EngineLoop(
        scheduler, 0, None, lambda step: 0.0, lambda step: 0.0, iter(lambda: 1.0, 0.0), (0, 0), None
    )
    costs = tuple(stage(fixed, each) for fixed, each in stages)
    loop.use(Pipeline(costs, (lambda tokens: 3 * ms,) * (len(stages) - 1), scheduler.stride if v2 else 0))
    outcomes = np.full((8, len(requests)), -1, np.int64)
    loop.load(Requests.of(requests), outcomes)
    loop.tell_ends = False
    for row, request in enumerate(requests):
        if loop.advance(round(request.arrival_s * SECOND)) == IDLE:
            loop.now = round(request.arrival_s * SECOND)
        loop.inbox.append((round(request.arrival_s * SECOND), row))
    assert loop.advance(10**18) == IDLE
    found = {row: tuple(outcomes[4:6, row] / SECOND) for row in range(len(requests))}
    assert found == expected
