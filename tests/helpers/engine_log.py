"""An engine driven step by step, and what it decided, as a log."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cores import interpreted
from plain_engine import PlainEngine

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.sim.engine.scheduler import Scheduler

Engine = PlainEngine | Scheduler


MAX_STEPS = 3_000  # without the full-length gate vLLM itself can preempt for ever


class Abort(NamedTuple):
    """The client gives up before schedule() or, with the step in flight, before complete() of ``step``."""

    step: int
    moment: Literal["schedule", "complete"]
    request_id: int


@dataclass(slots=True)
class State:
    """Every read-out of the engine at one moment."""

    running: list[int]
    waiting: list[int]
    has_requests: bool
    free_blocks: int
    free_list: list[int]
    usage: float
    cached_blocks: int
    block_ids: dict[int, list[int]]

    @classmethod
    def of(cls, engine: Engine) -> State:
        running = list(engine.running)
        return cls(
            running=running,
            waiting=list(engine.waiting),
            has_requests=engine.has_requests,
            free_blocks=engine.free_blocks,
            free_list=list(engine.free_list(engine.free_blocks)),
            usage=engine.kv.usage,
            cached_blocks=engine.cached_blocks,
            block_ids={i: list(engine.block_ids(i)) for i in running},
        )


@dataclass(slots=True)
class StepLog:
    """One step: its decisions, what it delivered, and the engine after schedule() and after complete()."""

    added: list[int]
    aborted: list[int]  # since the schedule() before
    scheduled: list[tuple[int, int]]
    admitted: list[int]
    resumed: list[int]
    preempted: list[int]
    cached_tokens: dict[int, int]
    total_tokens: int
    chunks: list[tuple[int, int]]
    decodes: int
    decode_context: int
    samples: int
    drafts: int
    draft_length: int
    after_schedule: State
    finished: list[int] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    emitted: int = 0
    draft_counters: tuple[int, int, int] = (0, 0, 0)
    after_complete: State = field(init=False)


def run(
    engine: Engine,
    requests: Sequence[Request],
    arrive_step: Sequence[int],
    aborts: Collection[Abort] = (),
    *,
    async_scheduling: bool,
    trace: bool = True,
) -> list[StepLog]:
    """Drive ``engine`` until it is empty (or MAX_STEPS), as vLLM's engine core does, and log every step.

    Request i is added before the schedule() numbered ``arrive_step[i]``; an idle engine skips to the
    next arrival. With async scheduling one step stays in flight: the next schedule() comes before its
    complete(), and an idle engine schedules twice before the first complete(). Without ``trace`` the log
    leaves out which request got how many tokens, as a fast engine does not tell it then.
    """
    arrivals = deque(sorted(range(len(requests)), key=lambda i: arrive_step[i]))
    pending = sorted(aborts, key=lambda abort: abort.step)
    known: set[int] = set()
    in_flight: deque[tuple[int, Any]] = deque()
    log: list[StepLog] = []
    now = 0  # number of the next schedule(), idle time included
    numbers: list[int] = []  # of the logged steps
    aborted: list[int] = []

    def abort(moment: str, number: int) -> None:
        for due in [a for a in pending if a.moment == moment and a.step <= number and a.request_id in known]:
            pending.remove(due)
            engine.abort(due.request_id)
            aborted.append(due.request_id)

    while in_flight or (len(log) < MAX_STEPS and (engine.has_requests or arrivals)):
        if not engine.has_requests and not in_flight:
            now = max(now, arrive_step[arrivals[0]])
        added: list[int] = []
        while arrivals and arrive_step[arrivals[0]] <= now:
            request = requests[arrivals.popleft()]
            engine.add(request, len(known))
            known.add(request.request_id)
            added.append(request.request_id)
        abort("schedule", now)
        if engine.has_requests and len(log) < MAX_STEPS:
            step = engine.schedule()
            in_flight.append((len(log), step))
            log.append(
                StepLog(
                    added=added,
                    aborted=aborted.copy(),
                    scheduled=list(step.scheduled().items()) if trace else [],
                    admitted=list(step.admitted),
                    resumed=list(step.resumed),
                    preempted=list(step.preempted),
                    cached_tokens=dict(step.cached_tokens),
                    total_tokens=step.total_tokens,
                    chunks=list(step.chunks),
                    decodes=step.decodes,
                    decode_context=step.decode_context,
                    samples=step.samples,
                    drafts=step.drafts,
                    draft_length=step.draft_length,
                    after_schedule=State.of(engine),
                )
            )
            numbers.append(now)
            aborted.clear()
            now += 1
            if async_scheduling and len(in_flight) < 2 and step.total_tokens > 0:
                continue
        if in_flight:
            index, step = in_flight.popleft()
            abort("complete", numbers[index])
            engine.complete(step)
            log[index].finished = list(step.finished)
            log[index].first_tokens = list(step.first_tokens)
            log[index].emitted = step.emitted
            if (drafts := engine.drafts) is not None:
                counts = (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens)
                log[index].draft_counters = counts
            log[index].after_complete = State.of(engine)
    return log


def installed(config: EngineConfig) -> Scheduler:
    """The engine as it is installed: compiled, where there was a compiler."""
    return Scheduler(config, trace=True)


def in_python(config: EngineConfig) -> Any:
    """The engine's source, interpreted."""
    return interpreted()["scheduler"].Scheduler(config, trace=True)


ENGINES = (PlainEngine, installed, in_python)
