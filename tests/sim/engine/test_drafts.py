"""Speculative decoding: sixteen logs of vLLM's own scheduler line by line, the law of acceptance, and what a
step's tokens come to at the client."""

from __future__ import annotations

import ast
import re
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cores import interpreted
from engine_log import in_python, installed, run
from places import DATA

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.drafts import drawn
from servecast.sim.engine.engine_loop import IDLE, EngineLoop
from servecast.sim.engine.kv_groups import CacheSpec
from servecast.sim.engine.request import Request, Requests
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.speculation import Kinds, by_modules, speculation
from servecast.sim.inputs.errors import InputError

# ---- logs of vLLM 0.32: the header says all of a scenario but what its prompts share

LOGS = dict(
    re.findall(r"(?ms)^== (\w+): (.*?)(?=^== |\Z)", (DATA / "golden" / "drafts.txt").read_text("utf-8"))
)
SHARED = {"prefix": 16, "prefix_ngram": 16, "padded": 31}  # tokens that all begin with: there, outputs too
BY_BATCH = {"dynamic": ((1, 3), (2, 2), (3, 0)), "dynamic_async": ((1, 3), (2, 2), (3, 0))}
STOPS = {("stop_async", "a"): 6}


def logged(name: str, text: str) -> list[str]:
    """The lines of our scheduler, in the log's format, for the scenario of its first line."""
    first = text.splitlines()[0]
    flags = dict(re.findall(r"(\S+?)(?:=|<=)(\S+)", first.partition(";")[0]))
    requests, steps, told = [], [], {}
    for number, (letter, prompt, most, step, accepted) in enumerate(
        re.findall(r"(\w+): (\d+) tok, out<=(\d+), at (\d+), accept (\[.*?\])", first)
    ):
        output = STOPS.get((name, letter), int(most))
        content = ((1, SHARED[name]),) if name in SHARED else ()
        requests.append((letter, Request(number, 0.0, int(prompt), output, int(most), content)))
        steps.append(int(step))
        told[number] = (ast.literal_eval(accepted), [3])
    config = EngineConfig(
        version="0.32",
        max_num_seqs=int(flags["seqs"]),
        max_num_batched_tokens=int(flags["B"]),
        max_model_len=int(flags["len"]),
        num_gpu_blocks=int(flags["blocks"]),
        block_size=int(flags["bs"]),
        async_scheduling=flags["async"] == "True",
        speculation=speculation("0.32", flags["method"], 3, (0.5,) * 3, by_batch=BY_BATCH.get(name, ())),
    )
    engine = in_python(config)
    engine.drafts.told = told
    names = [letter for letter, _ in requests]
    todo = deque(zip(steps, requests, strict=True))
    lines: list[str] = []
    flight: deque[tuple[int, Any]] = deque()
    tick = 0
    while todo or engine.has_requests or flight:
        if todo or engine.has_requests:
            while todo and todo[0][0] <= tick:
                engine.add(todo.popleft()[1][1], tick)
            step = engine.schedule()
            lines.append(scheduled(engine, step, tick, names, dynamic=name in BY_BATCH))
            flight.append((tick, step))
            tick += 1
            more = step.total_tokens > 0 or engine.has_requests
            if config.async_scheduling and len(flight) < 2 and more:
                continue
        lines.append(updated(engine, *flight.popleft(), names, dict(requests)))
    lines.append(f"   end: {tick} steps, free {engine.free_blocks} of {config.num_gpu_blocks - 1}")
    return lines


def scheduled(engine: Any, step: Any, tick: int, names: list[str], *, dynamic: bool) -> str:
    verified = {s.request_id: abs(d) for s, d in zip(step.samplers, step.verified, strict=True)}
    parts = []
    for sequence, tokens in step.composition:
        number = sequence.request_id
        mark = "+" if number in step.admitted else "^" if number in step.resumed else ""
        drafts = f"(d{verified[number]})" if verified.get(number) else ""
        chunk = "" if number in verified else "~"
        held = len(engine.block_ids(number))
        parts.append(f"{mark}{names[number]}:{sequence.computed - tokens}+{tokens}{drafts}{chunk}[{held}]")
    line = f"S{tick:<3d} {' '.join(parts) or '-':60s} free={engine.free_blocks} cached={engine.cached_blocks}"
    if step.preempted:
        line += f" preempt={','.join(names[number] for number in step.preempted)}"
    waiting = [names[s.request_id] + (":PREEMPTED" if s.preemptions else "") for s in engine.queue.ordered()]
    if waiting:
        line += f" wait={','.join(waiting)}"
    if dynamic:
        line += f" knext={step.draft_length}"
    flying = [f"{names[s.request_id]}:{s.placeholders}" for s in engine.runners if s.placeholders]
    return line + (f" ph={','.join(flying)}" if flying else "")


def updated(engine: Any, tick: int, step: Any, names: list[str], requests: dict[str, Request]) -> str:
    def counts() -> list[int]:
        drafts = engine.drafts
        return [drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens]

    tokens = {s: s.num_tokens for s in step.samplers}
    before = counts()
    engine.complete(step)
    parts = []
    for sequence in step.samplers:
        if new := sequence.num_tokens - tokens[sequence]:
            letter = names[sequence.request_id]
            request = requests[letter]
            stops = request.output_tokens < request.max_tokens
            end = ("!stop" if stops else "!length") if sequence in step.leavers else ""
            parts.append(f"{letter}:+{new}{end}")
    state = [
        f"{names[s.request_id]}:{s.computed}/{s.num_tokens}"
        + (f"p{s.placeholders}" if s.placeholders else "")
        for s in engine.runners
    ]
    new = tuple(after - earlier for after, earlier in zip(counts(), before, strict=True))
    line = f"  U{tick:<3d} {' '.join(parts) or '-':28s} -> {' '.join(state) or '-':40s}"
    line += f" free={engine.free_blocks} cached={engine.cached_blocks}"
    return line + (f" drafts={new}" if new[0] else "")


@pytest.mark.parametrize("name", LOGS)
def test_a_logged_scenario(name: str) -> None:
    """Every line: tokens and drafts of each request, blocks held, free and cached blocks, the preempted and
    waiting, places in flight, tokens delivered, what is computed, and the counts of drafts."""
    expected = [line.rstrip() for line in LOGS[name].splitlines()[2:] if line.strip()]
    assert logged(name, LOGS[name]) == expected


# ---- what is drawn


def config(*, k: int, acceptance: tuple[float, ...], version: str = "0.32", **options: Any) -> EngineConfig:
    given = {name: options.pop(name) for name in ("proposed", "seed", "by_batch", "kinds") if name in options}
    method, modules = options.pop("method", "eagle"), options.pop("modules", 1)
    usual: dict[str, Any] = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "max_model_len": 4096,
        "num_gpu_blocks": 20_000,
    }
    drafts = by_modules(speculation(version, method, k, acceptance, **given), version, modules)
    return EngineConfig(version=version, speculation=drafts, **usual | options)


def decoded(engine: Any, requests: int, output: int) -> Any:
    """All of these at once, to their end. Returns the engine's counts of drafts."""
    for number in range(requests):
        engine.add(Request(number, 0.0, 20, output, output), number)
    while engine.has_requests:
        engine.complete(engine.schedule())
    return engine.drafts


@pytest.mark.parametrize("asynchronous", [True, False])
def test_tokens_of_a_step_under_a_geometric_law(asynchronous: bool) -> None:
    """Each draft is accepted with probability p after those before it: 1 + p + .. + p**k tokens a step, which
    is (1 - p**(k + 1)) / (1 - p)."""
    k, p = 4, 0.7
    law = tuple(p**i for i in range(1, k + 1))
    drafts = decoded(
        Scheduler(config(k=k, acceptance=law, async_scheduling=asynchronous)), requests=60, output=1500
    )
    found = 1 + drafts.num_accepted_tokens / drafts.num_drafts
    assert drafts.num_drafts > 30_000
    assert drafts.num_draft_tokens == k * drafts.num_drafts
    assert found == pytest.approx((1 - p ** (k + 1)) / (1 - p), abs=4 * 1.6 / drafts.num_drafts**0.5)
    at = [count / drafts.num_drafts for count in drafts.per_position]
    assert at == pytest.approx(law, abs=4 * 0.5 / drafts.num_drafts**0.5)


def test_a_miss_proposes_fewer() -> None:
    """ngram proposes 0, 1, 2 or 3 drafts; of those that come all are accepted: 0.2 + 2 * 0.3 + 3 * 0.1 of
    them a step, and 0.6 of the steps have some."""
    proposed = (0.4, 0.2, 0.3, 0.1)
    engine = Scheduler(
        config(k=3, acceptance=(1.0,) * 3, method="ngram", proposed=proposed, async_scheduling=False)
    )
    drafts = decoded(engine, requests=50, output=1000)
    assert drafts.num_accepted_tokens == drafts.num_draft_tokens
    steps = drafts.num_drafts / 0.6
    assert drafts.num_draft_tokens / steps == pytest.approx(0.2 + 0.6 + 0.3, rel=0.02)
    assert drafts.per_position[0] == drafts.num_drafts


def splitmix(bits: int) -> int:
    """Steele, Lea and Flood (2014), the finalizer of SplitMix64."""
    most = 2**64 - 1
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & most
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & most
    return bits ^ bits >> 31


def test_draws_are_uniform_and_depend_on_their_numbers_alone() -> None:
    """The same compiled, interpreted and written anew; mean 1/2, variance 1/12, neighbours uncorrelated."""
    keys = [(seed, request, number) for seed in range(3) for request in range(60) for number in range(60)]
    found = np.array([drawn(*key) for key in keys])
    in_source = interpreted()["drafts"].drawn
    for key, value in zip(keys[::97], found[::97], strict=True):
        seed, request, number = key
        bits = splitmix(splitmix(splitmix(seed) ^ splitmix(request + 1)) ^ splitmix(number + 1))
        assert value == in_source(*key) == (bits >> 11) / 2**53
    error = len(keys) ** -0.5
    assert found.mean() == pytest.approx(0.5, abs=4 * 0.29 * error)
    assert found.var() == pytest.approx(1 / 12, abs=4 * 0.075 * error)
    assert np.corrcoef(found[:-1], found[1:])[0, 1] == pytest.approx(0.0, abs=4 * error)


def test_a_request_accepts_the_same_whoever_runs_beside_it() -> None:
    """Alone, or among others that came before it, without pressure: the same tokens step by step."""

    def tokens(others: int) -> list[int]:
        engine = in_python(config(k=3, acceptance=(0.8, 0.5, 0.3), seed=5))
        for number in range(others):
            engine.add(Request(number, 0.0, 30, 100, 100), number)
        watched = engine.add(Request(99, 0.0, 30, 100, 100), 99)
        seen = []
        while engine.has_requests:
            engine.complete(engine.schedule())
            seen.append(watched.num_tokens)
        return list(dict.fromkeys(seen))

    assert tokens(0) == tokens(20)
    assert tokens(0)[:2] == [31, 31 + 1 + sum(drawn(5, 99, 2) < chance for chance in (0.8, 0.5, 0.3))]


@pytest.mark.parametrize("engine", [Scheduler, in_python])
def test_requests_of_kinds(engine: Any) -> None:
    """Long outputs accept none of 3 drafts or all of them, those of up to 100 tokens one or two: so many
    steps for the 200, or 50, tokens after the first. Which of its class a request is, its id draws."""
    laws = ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0,) * 3, (1.0,) * 3)
    kinds = Kinds(tuple((rates, ()) for rates in laws), (0, 101))
    scheduler = engine(config(k=3, acceptance=(0.5,) * 3, kinds=kinds, seed=7))
    lengths = {number: (51, 201)[number % 2] for number in range(40)}
    for number, output in lengths.items():
        scheduler.add(Request(number, 0.0, 20, output, output), number)
    steps = dict.fromkeys(lengths, -1)
    while scheduler.has_requests:
        step = scheduler.schedule()
        for sequence in step.samplers:
            steps[sequence.request_id] += 1
        scheduler.complete(step)
    second = {number: drawn(7, number, 1 << 62) >= 0.5 for number in lengths}
    assert {number for number in lengths if second[number]} & {0, 1, 2, 3} not in (set(), {0, 1, 2, 3})
    for number, output in lengths.items():
        bringing = (4 if second[number] else 1) if output == 201 else (3 if second[number] else 2)
        assert steps[number] - -(-(output - 1) // bringing) in (0, 1)  # async: one is under way when it ends


def test_padding_is_never_accepted() -> None:
    """A prompt that is wholly cached but for its last token joins with 1 + k tokens, and gets one."""
    engine = installed(config(k=3, acceptance=(1.0,) * 3, method="ngram", async_scheduling=False))
    engine.add(Request(0, 0.0, 33, 90, 90, ((1, 33),)), 0)
    for _ in range(3):
        engine.complete(engine.schedule())
    engine.add(Request(1, 0.0, 33, 90, 90, ((1, 33),)), 1)
    step = engine.schedule()
    assert step.scheduled() == {0: 4, 1: 4}
    assert (step.decodes, step.drafts, list(step.chunks), step.samples) == (2, 6, [], 8)
    engine.complete(step)
    assert step.emitted == 4 + 1
    assert engine.schedule().scheduled() == {0: 4, 1: 4}


# ---- what is kept whatever is accepted


@pytest.mark.parametrize("version", ["0.20", "0.23", "0.25", "0.32", "0.33"])
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("method", ["eagle3", "draft_model", "dflash", "suffix"])
def test_blocks_and_tokens_are_conserved(version: str, asynchronous: bool, method: str) -> None:
    """Forty requests that preempt each other: every block is free or held, once; each gets its tokens, in its
    blocks; at the end all is free."""
    made = config(
        k=3,
        acceptance=(0.7, 0.5, 0.2),
        method=method,
        version=version,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        max_model_len=200,
        num_gpu_blocks=45,
        block_size=8,
        async_scheduling=asynchronous,
    )
    requests = [
        Request(n, 0.0, 20 + 7 * n % 60, 30 + n % 50, 90, ((n % 3, 16),) if n % 2 else ()) for n in range(40)
    ]
    log = run(installed(made), requests, [n // 2 for n in range(40)], async_scheduling=asynchronous)
    assert sum(len(step.preempted) for step in log) > 10
    for step in log:
        for state in (step.after_schedule, step.after_complete):
            held = {block for blocks in state.block_ids.values() for block in blocks}
            assert sorted([*held, *state.free_list]) == list(range(1, 45))
        assert (
            step.decodes + step.drafts + sum(tokens for tokens, _ in step.chunks) == step.total_tokens <= 96
        )
    assert sum(step.emitted for step in log) == sum(request.output_tokens for request in requests)
    assert {number for step in log for number in step.finished} == set(range(40))


# ---- what reaches the client


def test_a_steps_tokens_are_one_message() -> None:
    """Steps of 10 ms, all drafts accepted: 1 + 12 tokens in the first step and four of 3 each. Three gaps of
    10 ms and one, the table of steps tells 1, 3, 3, 3, 3 tokens, and the last comes with the fifth step."""
    made = config(k=2, acceptance=(1.0, 1.0), async_scheduling=False)
    loop = EngineLoop(
        Scheduler(made), 0, None, lambda step: 0.01, lambda step: 0.0, iter(lambda: 1.0, 0.0), (0, 0), None
    )
    outcomes = np.full((8, 1), -1, np.int64)
    loop.load(Requests.of([Request(0, 0.0, 10, 13, 13)]), outcomes)
    loop.inbox.append((0, 0))
    loop.tell_ends = False
    assert loop.advance(10**12) == IDLE
    steps = loop.step_columns
    assert steps[11].tolist() == [1, 3, 3, 3, 3]  # tokens delivered
    assert steps[12].tolist() == [0, 2, 2, 2, 2]  # drafts
    assert steps[3].tolist() == [10, 0, 0, 0, 0]  # prompt tokens
    assert steps[5].tolist() == [0, 1, 1, 1, 1]  # decoding requests
    gaps = loop.gap_columns
    assert gaps[1] == pytest.approx([0.01] * 4)
    assert gaps[2].tolist() == [1.0] * 4
    first, last = outcomes[4, 0], outcomes[5, 0]
    assert (first, last) == (10**10, 5 * 10**10)


# ---- what a release has


@pytest.mark.parametrize(
    ("version", "method", "lookahead", "slots", "drops", "ahead"),
    [
        ("0.32", "ngram", 0, 0, False, 0),
        ("0.32", "suffix", 0, 0, False, 0),
        ("0.32", "medusa", 0, 0, False, 0),
        ("0.32", "eagle", 4, 0, True, 0),
        ("0.32", "mtp", 4, 0, True, 0),
        ("0.32", "draft_model", 4, 1, False, 0),
        ("0.32", "dflash", 5, 4, True, 0),
        ("0.32", "dspark", 4, 3, True, 0),
        ("0.23", "dflash", 5, 3, True, 0),
        ("0.22", "dflash", 4, 3, True, 0),
        ("0.33", "eagle", 4, 0, False, 1),
        ("0.33", "dflash", 5, 0, False, 0),
    ],
)
def test_what_the_scheduler_knows_of_a_method(
    version: str, method: str, lookahead: int, slots: int, drops: bool, ahead: int
) -> None:
    """vLLM's num_lookahead_tokens, max_num_new_slots_for_drafting, use_eagle_block_drop and
    num_hash_lookahead_tokens for four drafts."""
    made = speculation(version, method, 4, (0.5,) * 4)
    found = (made.lookahead, made.draft_slots, made.drops_block, made.hash_lookahead)
    assert found == (lookahead, slots, drops, ahead)


def test_parallel_drafting_adds_slots() -> None:
    """P-EAGLE k - 1, PARD k (0.32: max_num_new_slots_for_drafting)."""
    assert speculation("0.32", "eagle3", 4, (0.5,) * 4, parallel_drafting=True).draft_slots == 3
    assert speculation("0.32", "draft_model", 4, (0.5,) * 4, parallel_drafting=True).draft_slots == 4


@pytest.mark.parametrize(
    ("version", "method", "options", "message"),
    [
        ("0.23", "dspark", {}, "vLLM 0.23 drafts by no method 'dspark'"),
        ("0.32", "telepathy", {}, "drafts by no method 'telepathy'"),
        ("0.23", "eagle", {"by_batch": ((1, 2),)}, "vLLM 0.23 has no by_batch"),
        ("0.29", "eagle", {"disable_eagle_block_drop": True}, "has no disable_eagle_block_drop"),
        ("0.32", "eagle", {"by_batch": ((2, 2),)}, "batch sizes [2]"),
        ("0.32", "eagle", {"acceptance": (0.5, 0.6)}, "acceptance [0.5, 0.6] of 2 drafts"),
        ("0.32", "eagle", {"acceptance": (0.5,)}, "acceptance [0.5] of 2 drafts"),
        ("0.32", "eagle", {"proposed": (0.5, 0.3, 0.2)}, "that eagle proposes 0 to 2 drafts"),
        ("0.32", "eagle", {"kinds": Kinds((((0.5, 0.6), ()),))}, "acceptance [0.5, 0.6] of 2 drafts"),
        ("0.32", "eagle", {"kinds": Kinds((((0.5, 0.4), (0.0, 0.0, 1.0)),))}, "that eagle proposes 0 to 2"),
        ("0.32", "ngram", {"proposed": (0.5, 0.3, 0.1)}, "that ngram proposes 0 to 2 drafts"),
    ],
)
def test_what_is_refused(version: str, method: str, options: dict[str, Any], message: str) -> None:
    acceptance = options.pop("acceptance", (0.5, 0.4))
    with pytest.raises(InputError, match=re.escape(message)):
        speculation(version, method, 2, acceptance, **options)


def test_an_admission_that_a_threshold_cuts_is_refused() -> None:
    """0.32 ends at an assertion where it cuts padding: num_new_tokens == 1 + num_spec_tokens."""
    made = config(k=3, acceptance=(0.5,) * 3)
    with pytest.raises(InputError, match="padded to 4 tokens"):
        Scheduler(replace(made, long_prefill_token_threshold=3))
    Scheduler(replace(made, long_prefill_token_threshold=4))


FULL = CacheSpec(kind="full", block_size=16, page_bytes=1)
BESIDE_FULL = {
    "chunked": CacheSpec(kind="chunked", block_size=16, page_bytes=1, window=64),
    "sliding": CacheSpec(kind="sliding", block_size=16, page_bytes=1, window=64),
    "mamba": CacheSpec(kind="mamba", block_size=16, page_bytes=1, mode="align", drafts=3),
    "saving": CacheSpec(kind="mamba", block_size=16, page_bytes=1, mode="align", drafts=3, checkpoint=1),
}


@pytest.mark.parametrize(
    ("beside", "method", "version", "message"),
    [
        ("chunked", "eagle", "0.32", "hybrid KV cache is not supported for EAGLE and chunked local"),
        ("saving", "ngram", "0.32", "0.32 ends where drafts cross a block"),
        ("mamba", "mtp", "0.23", ""),
        ("sliding", "mtp", "0.32", "several MTP modules"),
        ("chunked", "eagle", "0.33", ""),  # whose hashes look ahead, and which gives up no block
        ("sliding", "mtp", "0.27", ""),  # whose scheduler knows nothing of modules
        ("sliding", "eagle", "0.32", ""),
    ],
)
def test_what_groups_refuse_of_drafts(beside: str, method: str, version: str, message: str) -> None:
    """SingleTypeKVCacheManager asserts it of chunked attention where a block is dropped."""
    made = config(k=3, acceptance=(0.5,) * 3, method=method, version=version, modules=3)
    made = replace(made, kv_groups=(FULL, BESIDE_FULL[beside]))
    if not message:
        Scheduler(made)
        return
    with pytest.raises(InputError, match=message):
        Scheduler(made)


def test_several_mtp_modules_read_ahead() -> None:
    """A prompt of 20 tokens in steps of 18: a chunk of 18 would leave 2, so it is 17 and leaves the 3 that
    three modules read (_reserve_prefill_lookahead). 0.33 hashes a block with the 3 tokens behind it."""
    made = config(k=3, acceptance=(0.5,) * 3, method="mtp", modules=3)
    made = replace(made, max_num_batched_tokens=18, max_num_seqs=4)
    scheduler = Scheduler(made, trace=True)
    scheduler.add(Request(0, 0.0, 20, 4, 4), 0)
    first = scheduler.schedule()
    scheduler.complete(first)
    assert (first.scheduled(), scheduler.schedule().scheduled()) == ({0: 17}, {0: 3})
    one = speculation("0.33", "mtp", 3, (0.5,) * 3)
    assert (one.hash_lookahead, by_modules(one, "0.33", 3).hash_lookahead) == (1, 3)
    with pytest.raises(InputError, match="3 drafts by several MTP modules, with KV blocks of 2"):
        Scheduler(replace(made, block_size=2))


@pytest.mark.parametrize("version", ["0.23", "0.28", "0.30", "0.33"])
def test_drafts_that_reach_the_models_length_leave_a_request_nothing_to_schedule(version: str) -> None:
    """Three drafts in flight behind one token of four: vLLM 0.28 passes such a request over in its fourth
    step (_reserve_prefill_lookahead returns no less than 0), where the difference to max_model_len is -1."""
    drafts = speculation(version, "eagle", 3, (0.0,) * 3)
    config = EngineConfig(
        version=version,
        max_num_seqs=3,
        max_num_batched_tokens=6 + 4 * drafts.draft_slots,
        max_model_len=4,
        num_gpu_blocks=3,
        block_size=4,
        async_scheduling=True,
        scheduler_reserve_full_isl=False,
        speculation=drafts,
    )
    outputs = [2, 1, 2, 2, 1, 1]
    requests = [Request(number, 0.0, 1, output, output) for number, output in enumerate(outputs)]
    engine = in_python(config)
    assert engine.drafts is not None
    engine.drafts.told = {number: ([0], [3]) for number in range(len(outputs))}
    log = run(engine, requests, [0] * len(outputs), [], async_scheduling=True)
    assert min(tokens for step in log for _, tokens in step.scheduled) > 0
    assert version != "0.28" or log[4].scheduled == []
