"""Engine cores of one server that share the layers of experts: they all run the same number of steps.

vLLM's DPEngineCoreProc: a step begins with an agreement on what each core computes, and each layer of experts
waits for the tokens of all cores. So a step lasts on all of them as long as on the slowest, and a core
without work computes one token for nobody, a dummy step, as long as any other has work.
"""

from __future__ import annotations

from typing import Any

import cython

from servecast.sim.engine.cadence import CommonCadence
from servecast.sim.engine.engine_loop import EngineLoop
from servecast.sim.engine.step import Step
from servecast.sim.engine.step_costs import StepCosts

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    from servecast.sim.engine.engine_loop import ABORTS, BUSY, ENDED, IDLE

    rint = round

PICOSECONDS = cython.declare(cython.double, 1e12)


class Lockstep:
    """The cores' loops, as one: see ``EngineLoop.advance``.

    A wave starts with a request while nobody has work, and ends when the cores find together that nobody has:
    every ``sync_interval`` steps they ask each other. Until then all run dummy steps, as does a core whose
    requests wait for KV from elsewhere; blocks that it keeps for others are no work.

    Args:
        cores: a ``DataParallel``. shared: ``PhysicalStepTime.in_lockstep``. passes: the same of a drafter's
            first and later passes, whose layers have experts that the cores share; empty: there are none.

    Attributes:
        now, wake: as those of ``EngineLoop``. counter: steps of this wave. running: whether one goes on.
        waves: so many have ended. dummies: dummy steps of each core, and dummy_s: what they took.
    """

    def __init__(self, cores: Any, shared: Any, passes: tuple[Any, ...] = ()) -> None:
        self.loops, self.shared, self.passes = [], shared, passes
        self.interval, self.sync_first = cores.sync_interval, cores.sync_first
        self.throttled = cores.prefill_schedule_interval
        self.now = self.wake = self.gpu_free = self.first_end = self.second_end = 0
        self.counter = self.waves = 0
        self.running = self.executing = False
        self.first = self.second = None
        self.dummies, self.dummy_s = [], []
        self.empty, self.least = Step(0), 1

    def add(self, loop: EngineLoop) -> None:
        """One more core; all are there before the first request. Its ``costs`` are known."""
        self.loops.append(loop)
        self.dummies.append(0)
        self.dummy_s.append(0.0)
        if loop.scheduler.config.speculation is not None:  # a dummy step verifies drafts, too
            self.least = 1 + loop.scheduler.config.speculation.num_tokens
        if self.throttled > 1:
            loop.scheduler.cadence = CommonCadence()

    def advance(self, until: cython.longlong) -> cython.int:
        loop: EngineLoop
        arrival: cython.longlong
        while True:
            if self.executing:
                if self.first_end >= until:
                    self.wake = self.first_end
                    return BUSY
                self.now = max(self.now, self.first_end)
                self.executing = False
                if self.complete():
                    return ENDED
            if self.first is None and not self.running and not self.has_work():
                arrival = self.next_arrival()
                if arrival < 0:
                    return IDLE
                self.now = max(self.now, arrival)
            if self.now >= until:
                self.wake = self.now
                return BUSY
            for loop in self.loops:
                if loop.inbox and loop.aborts:
                    return ABORTS
            for loop in self.loops:
                loop.now = self.now
                if loop.inbox:
                    loop.drain()
                loop.report()
            if self.running or self.has_work():
                self.executing = not self.launch()
            elif self.first is None:
                return IDLE
            else:
                self.executing = True

    def has_work(self) -> cython.bint:
        loop: EngineLoop
        busy: cython.int = 0
        for loop in self.loops:
            busy += self.works(loop)
        return busy > 0

    def works(self, loop: EngineLoop) -> cython.bint:
        """Whether a core has requests, or has to tell of some that ended."""
        return self.unfinished(loop) or loop.scheduler.finished_unsent

    def unfinished(self, loop: EngineLoop) -> cython.bint:
        """Whether a core has requests (``has_unfinished_requests``)."""
        kept: cython.Py_ssize_t = 0
        if loop.scheduler.remote is not None:
            kept = loop.scheduler.remote.held
        return len(loop.scheduler.sequences) > kept

    def next_arrival(self) -> cython.longlong:
        """The earliest of all inboxes; -1 if they are empty."""
        loop: EngineLoop
        time: cython.longlong = -1
        for loop in self.loops:
            if loop.inbox and (time < 0 or loop.next_arrival() < time):
                time = loop.next_arrival()
        return time

    def complete(self) -> cython.bint:
        """The oldest step has run on all cores. Returns whether requests have ended that somebody waits
        for."""
        loop: EngineLoop
        step: Step
        ended: cython.bint = False
        steps: list = self.first
        i: cython.Py_ssize_t
        self.first, self.first_end, self.second = self.second, self.second_end, None
        for i in range(len(steps)):
            if steps[i] is None:
                continue
            step = steps[i]
            loop = self.loops[i]
            loop.now = self.now
            if loop.connector is not None:
                loop.connector.now = self.now
                if loop.host_waits:
                    step.transfers = loop.connector.get_finished(step.end)
            loop.finish(step)
            loop.lose(step)
            if (step.leavers or loop.lost) and loop.tell_ends:
                ended = True
        return ended

    def launch(self) -> cython.bint:
        """Every core decides its step, and all run. Returns whether one more is decided now."""
        loop: EngineLoop
        step: Step
        steps: list = []
        worth: cython.bint = False
        self.running = True
        for loop in self.loops:
            if not self.works(loop):
                steps.append(None)
                continue
            if loop.connector is not None:
                loop.connector.now = self.now
            if loop.scheduler.cadence is not None:
                loop.scheduler.cadence.throttled = self.throttled > 1 and self.counter % self.throttled != 0
            step = loop.scheduler.schedule()
            if step.total_tokens:
                worth = True
            elif loop.connector is not None:
                loop.refuse_stuck()
            elif loop.scheduler.num_waiting and not loop.scheduler.runners:
                loop.refuse()
            if loop.connector is not None:  # its loads run beside the steps
                loop.connector.start_load_kv(step.connector_meta, self.now)
                if not loop.host_waits:
                    step.transfers = loop.connector.get_finished(self.now)
            steps.append(step)
        self.execute(steps)
        if self.first is None:
            self.first, self.first_end = steps, self.gpu_free
        else:
            self.second, self.second_end = steps, self.gpu_free
        self.count()
        loop = self.loops[0]
        return worth and loop.is_async and self.second is None

    def count(self) -> cython.int:
        """DPEngineCoreProc._has_global_unfinished_reqs, after a step."""
        loop: EngineLoop
        self.counter += 1
        if self.counter % self.interval and not (self.sync_first and self.counter == 1):
            return 0
        for loop in self.loops:
            if self.unfinished(loop) or loop.inbox:
                return 0
        self.running = False
        self.counter = 0
        self.waves += 1
        return 0

    def execute(self, steps: list) -> cython.int:
        loop: EngineLoop
        step: Step
        costs: StepCosts
        tokens: list = []
        computed: list
        shared: cython.double
        graphed: cython.bint
        longest: cython.double = 0.0
        least: cython.double = 0.0
        factor: cython.double
        seconds: cython.double
        start: cython.longlong
        i: cython.Py_ssize_t
        for i in range(len(steps)):
            step = self.empty if steps[i] is None else steps[i]
            tokens.append(step.total_tokens or self.least)
        computed, shared, graphed = self.shared(tokens)
        for i in range(len(steps)):
            step = self.empty if steps[i] is None else steps[i]
            loop = self.loops[i]
            costs = loop.costs
            longest = max(longest, costs.at(step, computed[i]))
            if step.total_tokens:
                least = max(least, cython.cast(cython.double, loop.floor(step)))
        loop = self.loops[0]
        seconds = longest + shared
        if not graphed:
            seconds = max(seconds, costs.eager_s)
        if costs.drafting:
            seconds += self.drafting(steps, tokens)
        factor = next(loop.noise)
        seconds = seconds * factor
        if factor < 1.0:
            seconds = max(seconds, least)
        start = max(self.now + loop.cold_start, self.gpu_free)
        loop.cold_start = 0
        self.gpu_free = start + cython.cast(cython.longlong, rint(seconds * PICOSECONDS))
        for i in range(len(steps)):
            loop = self.loops[i]
            if steps[i] is not None:
                step = steps[i]
                step.start, step.end = start, self.gpu_free
                if step.total_tokens:
                    loop.note_step(step, seconds)
                    continue
            self.dummies[i] += 1
            self.dummy_s[i] += seconds
        return 0

    def drafting(self, steps: list, tokens: list) -> cython.double:
        """What drafting takes behind a step, which all cores wait for. Where they share a drafter's experts,
        they run its passes together, with dummies; it makes no drafts where no core has a use for them
        (``allow_skip_drafts`` of dp_utils), which one with a dummy step does not say."""
        loop: EngineLoop
        costs: StepCosts
        drafter: StepCosts
        step: Step
        wanted: list
        computed: list
        shared: cython.double
        graphed: cython.bint
        total: cython.double = 0.0
        longest: cython.double
        length: cython.longlong = 0
        rows: cython.longlong
        useless: cython.bint = True
        number: cython.int
        i: cython.Py_ssize_t
        for i in range(len(steps)):
            step = self.empty if steps[i] is None else steps[i]
            loop = self.loops[i]
            length = max(length, self.least - 1 if steps[i] is None else step.draft_length)
            useless = useless and steps[i] is not None and step.drafters == 0
            costs = loop.costs
            if not self.passes and (step.decodes or step.chunks):
                total = max(total, costs.of_draft(step))
        if not self.passes:
            return total
        if useless and costs.skips:
            length = 0
        for number in range(2 if length > 1 else 1):
            drafter = costs.later if number else costs.first
            wanted = tokens
            if number:
                wanted = [max(1, 0 if step is None else step.decodes + len(step.chunks)) for step in steps]
            computed, shared, graphed = self.passes[number](wanted)
            longest = 0.0
            for i in range(len(steps)):
                step = self.empty if steps[i] is None else steps[i]
                rows = max(1, step.decodes + len(step.chunks))
                longest = max(longest, drafter.pass_at(step, computed[i], rows, number > 0))
            longest += shared
            if not graphed:
                longest = max(longest, drafter.eager_s)
            total += longest * (length - 1) if number else longest
        return total
