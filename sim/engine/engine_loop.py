"""EngineCore's busy loop around the scheduler, and the way of the tokens to the client."""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from servecast.sim.engine.pipeline import Pipeline
from servecast.sim.engine.pipeline_rules import fills_with_empty_steps, max_concurrent_batches
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.sim.engine.step_costs import StepCosts
from servecast.sim.inputs.errors import InputError

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    rint = round
    IDLE, BUSY, ENDED, ABORTS, POLLING = range(5)  # what ``EngineLoop.advance`` came to

PICOSECONDS = cython.declare(cython.double, 1e12)
EXACT = cython.declare(cython.longlong, 1 << 53)  # integers below are doubles, too
OUTCOMES = ("sent", "queued", "scheduled", "ended", "first_token", "finish", "cached_tokens", "preemptions")
STEP_FIELDS = cython.declare(cython.int, 13)  # columns of a step's row
GAP_FIELDS = cython.declare(cython.int, 4)
POLL = cython.declare(cython.longlong, 1_000_000_000)  # EngineCore._process_engine_step: time.sleep(0.001)
NEVER = cython.declare(cython.longlong, 1 << 62)


def writable(values: Any) -> Any:
    """A column that may be written to, as typed views want it."""
    return np.require(values, None, "W")


class EngineLoop:
    """EngineCore's busy loop around a scheduler, the GPU, and the way of the tokens to the client.

    ``advance(until)`` runs it; ``arrive`` puts a request into its input queue. With async scheduling a second
    step is scheduled while the first executes, so the composition of a step is fixed when the step before it
    starts.

    Args:
        scheduler: a fresh one. index: of the replica, for its rows of steps.
        costs: of steps, or None, where ``seconds`` is called for each.
        seconds, floor: of a step, s, without noise; the least that noise may make of it.
        noise: factors of mean 1, one a step.
        served_ps: what the API server takes for a token that it streams, and its way to the client.
        read: called with the first token's time at the client, the spacing, how many events and tokens; or
            None, where reading costs nothing.
        cold_start_ps: between deciding the first step and its start on the GPU.

    Attributes:
        now: up to when it has run. wake: when to call ``advance`` again, where it came to BUSY.
        inbox: (time, row of a request, or ~row of one whose client has gone), in order; aborts: how many of
        those. seen: by tick, when its tokens were read, on average.
        pending: a step that is decided, while the host warms up.
        reported: waiting and running requests and the KV cache in use, as the core last told its API servers,
            where it ``reports``: before it decides a step, and when one has run.
        tell_ends: ``advance`` returns when requests have ended.
        ended: rows of requests that ended since they were last taken, where it tells. lost: of those that
        ended with an error, for their KV cache could not be loaded.
        horizon: ``advance`` stops there, whatever it was told: what it has begun is heard of elsewhere.
        connector: the scheduler's, or None. host_waits: its worker's host is busy until the step's end, so
        that what ends meanwhile is in the step's report: on a CPU; on a GPU it asks when the step is
        launched. after_step: called with the time when a step has been completed, or None.
        pipeline: the stages that a step passes, or None where it is one.
        adapter_cache, grammars: what loading LoRA adapters, of each stage where there are several, and
            following grammars takes, or None.
        encode_seconds: called for the seconds that encoding a step's items takes; encoded, encoding_s: how
            many there were so far, and what they took.
        on_first: called with a request's row and the time at which its first token comes, or None.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        index: int,
        costs: StepCosts | None,
        seconds: Any,
        floor: Any,
        noise: Any,
        served_ps: tuple[int, int],
        read: Any,
        cold_start_ps: int = 0,
    ) -> None:
        self.scheduler, self.index, self.costs = scheduler, index, costs
        if costs is not None:
            scheduler.window, scheduler.chunked = costs.window, costs.chunked
        self.step_seconds, self.floor, self.noise, self.read = seconds, floor, noise, read
        self.token_ps, self.delivery_ps = served_ps
        self.cold_start = cold_start_ps
        self.is_async = scheduler.is_async
        self.now = self.wake = self.gpu_free = self.sent = self.resume = self.arrivals = 0
        self.aborts = self.stage = 0
        self.tell_ends, self.executing, self.reports = True, False, False
        self.told_waiting = self.told_running = 0
        self.told_usage = 0.0
        self.first = self.second = self.pending = None
        self.after_step = self.on_first = self.pipeline = self.adapter_cache = self.grammars = None
        self.adapters = self.formats = self.media = self.encode_seconds = None
        self.encoded, self.encoding_s = 0, 0.0
        self.before = 0
        self.later = []
        self.depth = max_concurrent_batches(scheduler.config)
        self.fills = fills_with_empty_steps(scheduler.config.version)
        self.inbox, self.ended, self.lost = [], [], []
        self.connector, self.host_waits = scheduler.connector, False
        self.saves = getattr(self.connector, "wait_for_save", None)
        self.napped = self.still = 0
        self.horizon = NEVER
        self.napping = self.executed = False
        self.seen = np.zeros(1024, np.int64)
        self.num_seen = self.num_steps = self.num_gaps = self.dropped = 0
        self.steps, self.gaps = np.zeros((STEP_FIELDS, 1024), np.int64), np.zeros((GAP_FIELDS, 1024))
        self.step_floats = np.asarray(self.steps).view(np.float64)

    def use(self, pipeline: Pipeline) -> Any:
        """Steps pass these stages."""
        stage: StepCosts
        self.pipeline = pipeline
        for stage in pipeline.stages:
            if stage.window:
                self.scheduler.window, self.scheduler.chunked = stage.window, stage.chunked
        return None

    @property
    def step_columns(self) -> Any:
        """(fields, steps): a row for each of ``records.STEP_COLUMNS``, floats by their bits."""
        return np.asarray(self.steps)[:, : self.num_steps]

    @property
    def gap_columns(self) -> Any:
        """(4, gaps): stage, gap in s, tokens, s over which the step's tokens are read."""
        return np.asarray(self.gaps)[:, : self.num_gaps]

    @property
    def reported(self) -> tuple[int, int, float]:
        return self.told_waiting, self.told_running, self.told_usage

    def report(self) -> cython.int:
        """EngineCoreProc._maybe_publish_request_counts."""
        self.told_waiting, self.told_running = self.scheduler.num_waiting, len(self.scheduler.runners)
        self.told_usage = self.scheduler.kv.pool.usage()
        return 0

    def drop_rows(self) -> None:
        """Begin these tables anew."""
        self.dropped += self.num_steps
        self.num_steps = self.num_gaps = 0

    def room_for_steps(self, count: cython.Py_ssize_t) -> cython.int:
        steps: Any = np.zeros((STEP_FIELDS, count), np.int64)
        steps[:, : self.num_steps] = self.steps
        self.steps, self.step_floats = steps, steps.view(np.float64)
        return 0

    def room_for_gaps(self, count: cython.Py_ssize_t) -> cython.int:
        gaps: Any = np.zeros((GAP_FIELDS, count))
        gaps[:, : self.num_gaps] = self.gaps
        self.gaps = gaps
        return 0

    def load(self, requests: Any, outcomes: Any) -> None:
        """The table whose rows the inbox names, and (fields, n) what becomes of them, by ``OUTCOMES``."""
        self.request_ids, self.prompts = writable(requests.request_id), writable(requests.prompt_tokens)
        self.outputs, self.most = writable(requests.output_tokens), writable(requests.max_tokens)
        self.contents, self.content = requests.contents, writable(requests.content)
        self.prioritized = requests.priority is not None
        if self.prioritized:
            self.priorities = writable(requests.priority)
        self.adapters, self.formats, self.media = requests.adapter, requests.grammar, requests.media
        self.outcomes = outcomes

    def take(self, row: cython.Py_ssize_t, time: cython.longlong) -> cython.int:
        """A request reaches the scheduler that was put into the queue at ``time``."""
        sequence: Sequence = self.scheduler.enter(
            self.request_ids[row],
            self.prompts[row],
            self.outputs[row],
            self.most[row],
            self.contents[self.content[row]],
            self.priorities[row] if self.prioritized else 0,
            self.arrivals,
        )
        self.arrivals += 1
        sequence.queued = time
        sequence.row = row
        if self.adapters is not None:
            sequence.adapter = self.adapters[row]
        if self.formats is not None and self.formats[row]:
            self.scheduler.wait_for_grammar(sequence, self.grammars.ready(int(self.formats[row]), time))
        if self.media is not None and self.media[row] is not None:
            self.scheduler.carry(sequence, self.media[row])
        return 0

    def leave(self, row: int) -> None:
        """A request ends without its last token, wherever it stands."""
        request_id: Any = self.request_ids[row]
        found: Any = self.scheduler.sequences.get(request_id)
        if found is not None:
            self.book(found)
            self.scheduler.abort(request_id)

    def advance(self, until: cython.longlong) -> cython.int:
        """Run all that starts before ``until``: what happens outside at that time comes first.

        Returns:
            IDLE: nothing to do until something arrives. BUSY: call again at ``wake``. ENDED: requests have
            ended; the loop stands behind the step that ended them, at ``now``. ABORTS: the loop stands where
            it looks into its inbox, at ``now``, and finds that a client has gone, which is the host's.
            POLLING: call again at ``wake``, or when something comes.

        Raises:
            InputError: a request can never run.
        """
        scheduler: Scheduler = self.scheduler
        step: Step
        if self.connector is not None:
            return self.advance_connected(until)
        while True:
            if self.pending is not None:
                if self.resume >= until:
                    self.wake = self.resume
                    return BUSY
                self.now = self.resume
                step = self.pending
                self.pending = None
                self.executing = not self.launch(step)
                continue
            if self.executing:
                step = self.first
                if step.end >= until:
                    self.wake = step.end
                    return BUSY
                if step.end > self.now:
                    self.now = step.end
                self.executing = False
                self.first, self.second = self.second, None
                if self.later:
                    self.second = self.later.pop(0)
                self.finish(step)
                if step.leavers and self.tell_ends:
                    return ENDED
            if self.first is None and self.inbox and not (scheduler.sequences or scheduler.finished_unsent):
                self.now = max(self.now, self.next_arrival())
            if self.now >= until:
                self.wake = self.now
                return BUSY
            if self.inbox:
                if self.aborts:
                    return ABORTS
                self.drain()
            if self.reports:
                self.report()
            if scheduler.sequences or scheduler.finished_unsent:
                scheduler.clock = self.now
                step = scheduler.schedule()
                if self.cold_start:
                    self.resume, self.cold_start = self.now + self.cold_start, 0
                    self.pending = step
                else:
                    self.executing = not self.launch(step)
            elif self.first is None:
                return IDLE
            else:
                self.executing = True

    def advance_connected(self, until: cython.longlong) -> cython.int:
        """``advance`` with a KV connector: while there are requests and nothing to compute, the loop goes on
        with empty steps, one a millisecond (EngineCore.step, step_with_batch_queue, _process_engine_step);
        those in which nothing can happen are left out."""
        scheduler: Scheduler = self.scheduler
        sequence: Sequence
        step: Step
        self.horizon = NEVER
        while True:
            if self.horizon < until:
                until = self.horizon
            if self.pending is not None:
                if self.resume >= until:
                    self.wake = self.resume
                    return BUSY
                self.now = self.resume
                step = self.pending
                self.pending = None
                self.launch_connected(step)
                continue
            if self.executing:
                step = self.first
                if step.end >= until:
                    self.wake = step.end
                    return BUSY
                self.now = max(self.now, step.end)
                self.executing = False
                self.first, self.second = self.second, None
                if self.host_waits:
                    step.transfers = self.connector.get_finished(step.end)
                    self.still = 0 if step.transfers is not None else self.still
                self.connector.now = self.now
                scheduler.complete(step)
                self.napping = not self.executed and scheduler.goes_on()
                self.napped = self.now
                if self.after_step is not None:
                    self.after_step(self.now)
                self.deliver(step)
                self.lose(step)
                if self.tell_ends and (step.leavers or self.lost):
                    for sequence in step.leavers:
                        self.ended.append(sequence.row)
                    return ENDED
            if self.napping:
                self.wake = self.next_poll()
                if self.wake == NEVER:
                    self.refuse_stuck()
                    self.napping = False
                    return IDLE
                if self.wake >= until:
                    return POLLING
                self.now, self.napping = self.wake, False
            if self.first is None and self.inbox and not scheduler.goes_on():
                self.now = max(self.now, self.next_arrival())
            if self.now >= until:
                self.wake = self.now
                return BUSY
            if self.inbox:
                self.still = 0
                if self.aborts:
                    return ABORTS
                self.drain()
            if scheduler.goes_on():
                self.connector.now = self.now
                scheduler.clock = self.now
                step = scheduler.schedule()
                if self.cold_start:
                    self.resume, self.cold_start = self.now + self.cold_start, 0
                    self.pending = step
                else:
                    self.launch_connected(step)
            elif self.first is None:
                return IDLE
            else:
                self.executed, self.executing = False, True

    def launch_connected(self, step: Step) -> cython.int:
        """Put a step on the GPU, be it empty, and see what comes next."""
        wait: cython.double = self.connector.start_load_kv(step.connector_meta, self.now)
        self.execute(step)
        if wait > 0.0:
            late: cython.longlong = (
                self.now + cython.cast(cython.longlong, rint(wait * PICOSECONDS)) - step.start
            )
            if late > 0:  # the loads run while the step before does
                step.end += late
                if step.total_tokens:
                    self.gpu_free = step.end
                    self.step_floats[2, self.num_steps - 1] += in_seconds(late)
        self.executed = step.total_tokens > 0
        if self.saves is not None and self.executed:
            saved: cython.double = self.saves(step.connector_meta, step.end)
            step.end += cython.cast(cython.longlong, rint(saved * PICOSECONDS))
            self.gpu_free = step.end
            self.step_floats[2, self.num_steps - 1] += saved
        if not self.host_waits:
            step.transfers = self.connector.get_finished(self.now)
        self.still = 0 if self.executed or step.transfers is not None else self.still + 1
        if self.first is None:
            self.first = step
        else:
            self.second = step
        self.executing = not (
            self.is_async and self.second is None and (self.executed or self.scheduler.goes_on())
        )
        self.napping = not self.executing and not self.executed
        self.napped = self.now
        return 0

    def next_poll(self) -> cython.longlong:
        """When the loop wakes from its nap for a step in which something may happen; NEVER: for none."""
        event: cython.longlong = self.napped
        if self.still > 1:  # what could be reported was, and has been acted upon
            event = self.connector.next_event(self.napped)
            if self.inbox:
                event = min(event, self.next_arrival())
            if event >= NEVER:
                return NEVER
        return self.napped + max(1, (event - self.napped + POLL - 1) // POLL) * POLL

    def refuse_stuck(self) -> cython.int:
        """Nothing will happen by itself: if the queue's head waits for nobody else, it never goes."""
        scheduler: Scheduler = self.scheduler
        others: cython.int = scheduler.num_passed + scheduler.remote.held + len(scheduler.runners)
        if scheduler.num_waiting and not others:
            self.refuse()
        return 0

    def next_arrival(self) -> cython.longlong:
        item: tuple = self.inbox[0]
        time: cython.longlong = item[0]
        return time

    def drain(self) -> cython.int:
        """All that has reached the engine's input queue by now (EngineCore._process_input_queue)."""
        item: tuple
        for item in self.inbox:
            self.take(item[1], item[0])
        self.inbox.clear()
        return 0

    def finish(self, step: Step) -> cython.int:
        """A step has run: its tokens are on their way, and who got the last of them has ended."""
        sequence: Sequence
        self.scheduler.complete(step)
        if self.reports:
            self.report()
        if self.after_step is not None:
            self.after_step(self.now)
        self.deliver(step)
        if self.tell_ends:
            for sequence in step.leavers:
                self.ended.append(sequence.row)
        return 0

    def launch(self, step: Step) -> cython.bint:
        """Put the step on the GPU, behind the one before. Returns whether one more is decided now."""
        self.execute(step)
        if self.first is None:
            self.first = step
        elif self.second is None:
            self.second = step
        else:
            self.later.append(step)
        if self.pipeline is not None:
            return self.one_more(step)
        return self.is_async and self.second is None and step.total_tokens > 0

    def one_more(self, step: Step) -> cython.bint:
        """Whether a further step is decided behind this one before the oldest in flight is over
        (EngineCore.step_with_batch_queue)."""
        first: Step = self.first
        in_flight: cython.Py_ssize_t = (self.second is not None) + 1 + len(self.later)
        if in_flight >= self.depth or step.deferred:
            return False
        if self.fills:
            return step.total_tokens > 0 or self.scheduler.goes_on()
        return step.total_tokens > 0 and first.end > self.now

    def execute(self, step: Step) -> cython.int:
        scheduler: Scheduler = self.scheduler
        factor: cython.double
        seconds: cython.double
        step.start = step.end = max(self.now, self.gpu_free)
        if not step.total_tokens:
            ahead: Step = self.first
            if (
                self.formats is not None
                and scheduler.num_passed
                and (ahead is None or not ahead.total_tokens)
            ):
                step.end += POLL  # else time goes on with what is ahead
            if self.pipeline is not None:
                self.pipeline.note(step, step.end)
            if (
                self.connector is None
                and scheduler.num_waiting > scheduler.num_passed
                and not scheduler.runners
                and not step.victims
            ):
                self.refuse()
            return 0
        factor = next(self.noise)
        if self.pipeline is not None:
            if factor < 1.0:
                seconds = self.step_seconds(step)
                factor = max(factor, cython.cast(cython.double, self.floor(step)) / seconds)
            self.before = self.gpu_free  # steps overlap: a row has the time after the one before
            self.gpu_free = self.pipeline.run(step, self.now, factor, self.adapter_cache)
            return self.note_step(step, in_seconds(step.end - max(self.before, step.start)))
        seconds = self.costs.seconds(step) if self.costs is not None else self.step_seconds(step)
        seconds = seconds * factor
        if factor < 1.0:
            if self.costs is not None and not self.costs.drafting:
                seconds = max(seconds, self.costs.least(step))
            else:
                seconds = max(seconds, cython.cast(cython.double, self.floor(step)))
        if self.adapter_cache is not None or self.formats is not None or step.encoded:
            seconds = self.with_host(step, seconds)
        self.gpu_free = step.end = step.start + cython.cast(cython.longlong, rint(seconds * PICOSECONDS))
        return self.note_step(step, seconds)

    def note_step(self, step: Step, seconds: cython.double) -> cython.int:
        """Its row, and when those that it admitted were scheduled."""
        scheduler: Scheduler = self.scheduler
        sequence: Sequence
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t = self.num_steps
        for i in range(len(step.joined)):
            sequence = step.joined[i]
            if sequence.scheduled < 0:
                sequence.scheduled = step.start
        if at == self.steps.shape[1]:
            self.room_for_steps(2 * at)
        self.num_steps += 1
        self.steps[0, at] = self.index
        self.step_floats[1, at] = in_seconds(max(step.start, self.before))
        self.step_floats[2, at] = seconds
        self.steps[3, at] = step.total_tokens - step.decodes - step.drafts
        self.steps[4, at] = len(step.chunks)
        self.steps[5, at] = step.decodes
        self.steps[6, at] = step.decode_context
        self.steps[7, at] = len(scheduler.runners)
        self.steps[8, at] = scheduler.num_waiting
        self.step_floats[9, at] = scheduler.kv.pool.usage()
        self.steps[10, at] = len(step.victims)
        self.steps[11, at] = len(step.samplers)  # tokens, where nothing is drafted
        if step.drafts:
            self.steps[12, at] = step.drafts
        step.row = self.dropped + at
        return 0

    def with_host(self, step: Step, seconds: cython.double) -> cython.double:
        """With what the host does for adapters before the forward pass, and for grammars while it runs,
        before the step samples."""
        sequence: Sequence
        constrained: cython.int = 0
        i: cython.Py_ssize_t
        masks: cython.double
        encoding: cython.double
        if self.formats is not None:
            for i in range(len(step.samplers)):
                sequence = step.samplers[i]
                constrained += sequence.constrained
            if constrained:
                masks = self.grammars.mask_seconds(constrained)
                seconds = max(seconds, masks)
        if self.adapter_cache is not None and step.adapters is not None:
            seconds += self.adapter_cache.load(step.adapters)
        if step.encoded:  # the vision tower comes before the forward pass
            encoding = self.encode_seconds([sequence.media[place] for sequence, place in step.encoded])
            self.encoded += len(step.encoded)
            self.encoding_s += encoding
            seconds += encoding
        return seconds

    def refuse(self) -> cython.int:
        """The engine is empty, and the head of the queue does not fit."""
        head: Any = self.scheduler.queue.head()
        raise InputError(
            f"its {head.prompt_tokens} tokens are never admitted, although the engine is empty",
            where=f"request {head.request_id}",
            fix="With chunked prefill off, max_num_batched_tokens must cover the longest request.",
        )

    # ---- tokens on their way ----------------------------------------------------------------------

    def deliver(self, step: Step) -> cython.int:
        """Tokens go through the API server to the client, in the order of the batch; see ``ApiServer.stream``
        and ``Client.read``."""
        n: cython.longlong = step.outputs  # messages, each with all that its request got
        cost: cython.longlong = self.token_ps
        waiting: cython.longlong
        events: cython.longlong
        first: cython.longlong
        pace: cython.longlong
        middle: cython.longlong
        last: cython.longlong
        share: cython.longlong
        spread: cython.double
        tick: cython.Py_ssize_t
        i: cython.Py_ssize_t
        count: cython.Py_ssize_t
        sequence: Sequence
        if not n:
            self.note_seen(step.end)
            return 0
        if step.emitted > n and step.row >= self.dropped:
            self.steps[11, step.row - self.dropped] += step.emitted - n
        waiting = max(self.sent, self.now)
        self.sent = max(self.sent, self.now + cost * n)
        events = (self.sent - waiting) // cost if cost else n
        first, pace = self.sent + self.delivery_ps - cost * (n - 1), cost
        if self.read is not None:
            first, pace = self.read(first, pace, events, n)
        middle = first + pace * (n - 1) // 2
        spread = in_seconds(pace * (n - 1))
        if step.steady and self.num_seen >= self.scheduler.stride:
            self.note_gap(middle - self.seen[self.num_seen - self.scheduler.stride], step.steady, spread)
        for i in range(len(step.gaps)):
            tick = step.gaps[i]
            self.note_gap(middle - self.seen[tick], 1, spread)
        self.note_seen(middle)
        last = first + pace * (n - 1)
        count = len(step.firsts)
        for i in range(count):  # the newest stand last in the batch
            sequence = step.firsts[i]
            sequence.first_token = last - pace * (count - 1 - i)
            if self.on_first is not None:
                self.on_first(sequence.row, sequence.first_token)
        count = len(step.leavers)
        if count:
            share = (last - first) // count
            for i in range(count):  # these are spread over the batch
                sequence = step.leavers[i]
                sequence.ended = self.now
                sequence.finish = max(sequence.first_token, first + share * i + share // 2)
                self.book(sequence)
        return 0

    def book(self, sequence: Sequence) -> cython.int:
        row: cython.Py_ssize_t = sequence.row
        self.outcomes[1, row], self.outcomes[2, row] = sequence.queued, sequence.scheduled
        self.outcomes[3, row], self.outcomes[4, row] = sequence.ended, sequence.first_token
        self.outcomes[5, row] = sequence.finish
        if sequence.scheduled >= 0:
            self.outcomes[6, row] = sequence.cached_tokens
        if sequence.preemptions:
            self.outcomes[7, row] = sequence.preemptions
        return 0

    def lose(self, step: Step) -> cython.int:
        """Requests have ended with an error, for their KV cache could not be loaded."""
        sequence: Sequence
        for sequence in step.failed:
            sequence.ended = self.now
            self.book(sequence)
            self.lost.append(sequence.row)
        return 0

    def note_seen(self, time: cython.longlong) -> cython.int:
        if self.num_seen == self.seen.shape[0]:
            self.seen = np.concatenate((np.asarray(self.seen), np.zeros_like(np.asarray(self.seen))))
        self.seen[self.num_seen] = time
        self.num_seen += 1
        return 0

    def note_gap(self, gap: cython.longlong, tokens: cython.longlong, spread: cython.double) -> cython.int:
        at: cython.Py_ssize_t = self.num_gaps
        if at == self.gaps.shape[1]:
            self.room_for_gaps(2 * at)
        self.num_gaps += 1
        self.gaps[0, at] = self.stage
        self.gaps[1, at] = in_seconds(gap)
        self.gaps[2, at] = tokens
        self.gaps[3, at] = spread
        return 0


def in_seconds(ps: cython.longlong) -> cython.double:
    """Python's ps / PICOSECONDS, which rounds once."""
    if -EXACT < ps < EXACT:
        return ps / PICOSECONDS
    exact: Any = ps
    return exact / 1_000_000_000_000
