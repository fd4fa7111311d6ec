"""The way of requests through a fleet: clients, router, API servers and engines, in one heap of events.

Compiled by Cython where there was a compiler, like the engine (``servecast.sim.engine``), and for its reason:
all that happens to every request is here. Stages, timers, and the life of replicas are SimPy's
(``fleet.py``), which hands over the time between two of its events. Times are picoseconds; events at one time
come in the order in which they were put in, and an engine's steps after all others.

Client and API server are Python processes with one event loop each. Work in them is serial, first come, first
served, with known times, so that it needs no events of its own: what arrives at t starts at max(t, end of the
work before) (Lindley 1952). Preparing a request takes several turns of the API server's loop, see `prepare`.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.engine_loop import OUTCOMES, EngineLoop, writable
from servecast.sim.routing.routers import LOOKS_AT_NONE, Answered, Informed

if cython.compiled:
    from cython.cimports.libc.math import rint
else:
    from servecast.sim.engine.engine_loop import ABORTS, BUSY, ENDED, POLLING

    rint = round

PICOSECONDS = cython.declare(cython.double, 1e12)
NEVER = cython.declare(cython.longlong, 1 << 62)
# Among the events of one time: an arrival at t comes before the engine step that starts at t.
LAST = cython.declare(cython.longlong, 1 << 60)

STATUSES = ("unfinished", "finished", "aborted", "failed")
_FINISHED = cython.declare(cython.int, 1)
_ABORTED = cython.declare(cython.int, 2)
_FAILED = cython.declare(cython.int, 3)

ARRIVAL = cython.declare(cython.int, 0)
ON_WIRE = cython.declare(cython.int, 1)
AT_SERVER = cython.declare(cython.int, 2)
PREPARED = cython.declare(cython.int, 3)
ENCODED = cython.declare(cython.int, 4)
DONE = cython.declare(cython.int, 5)
GIVE_UP = cython.declare(cython.int, 6)
ANSWERED = cython.declare(cython.int, 7)
CLOSED = cython.declare(cython.int, 8)
DUE = cython.declare(cython.int, 9)
ENGINE = cython.declare(cython.int, 10)
HANDED_ON = cython.declare(cython.int, 11)
WAKE = cython.declare(cython.int, 12)
PUBLISH = cython.declare(cython.int, 13)

NOT_READY = "no replica was ready (503)"
UNPICKED = "the router let no replica pass (503)"
NOT_LOADED = "its KV cache could not be loaded"
REFUSED = "sent to a replica that had failed before the router knew"


class Sender:
    """The client of one stream: it sends rows [first, end) of the table, each not before its arrival, at most
    ``limit`` at a time (0: any number). With ``sessions`` (a ``SessionClient``) that one says when."""

    def __init__(
        self, first: cython.Py_ssize_t, end: cython.Py_ssize_t, limit: cython.Py_ssize_t, sessions: Any
    ) -> None:
        self.sessions = sessions
        self.first = self.started = self.ready = first
        self.end, self.limit, self.open = end, limit, end - first
        self.in_flight = self.last = 0
        self.stopped = self.told = False


class Engines:
    """What steps as one: an engine core's loop, or the lockstep of several.

    Args:
        runner: is called to go on. loops: of the cores.
    """

    def __init__(self, runner: Any, loops: list[Any]) -> None:
        self.runner, self.loops = runner, loops
        self.compiled = runner if isinstance(runner, EngineLoop) else None
        self.number, self.idle, self.failed = -1, True, False
        self.polling, self.due = False, -1

    def connected(self) -> cython.bint:
        """Whether it has a KV connector."""
        return self.compiled is not None and self.compiled.connector is not None

    def advance(self, until: cython.longlong) -> cython.int:
        return self.runner.advance(until) if self.compiled is None else self.compiled.advance(until)

    def wake(self) -> cython.longlong:
        return self.runner.wake if self.compiled is None else self.compiled.wake


class Front:
    """An API server's process."""

    def __init__(self) -> None:
        self.number = -1
        self.tokenizer_free = self.busy_until = 0
        self.rounds = []


class Server:
    """A replica: its API servers, and its engine cores' loops.

    Args:
        loops: of the cores, by rank. engines: what each steps with.
        costs_s: latency, preparation and, for a prompt token, encoding. variation: factors of the first two,
            in the order of need. most: requests of a round of preparation.
        balance: shares requests out among several cores (``sim.fleet.balance.Balance``), or None.
        spread: the number of the API server that a request's connection leads to, one after the other; None
            where there is one. fronts: so many. prefills: it computes prompts for others.

    Attributes:
        processor: called for the seconds that the images of a request take (``MediaProcessor``), or None.
    """

    def __init__(
        self,
        loops: list[Any],
        engines: list[Engines],
        costs_s: tuple[float, float, float],
        variation: Any,
        most: int,
        balance: Any = None,
        spread: Any = None,
        fronts: int = 1,
        prefills: cython.bint = False,
    ) -> None:
        self.loops, self.engines, self.variation, self.most = loops, engines, variation, most
        self.latency_s, self.request_s, self.prompt_token_s = costs_s
        self.balance, self.spread = balance, spread
        self.fronts = [Front() for _ in range(fronts)]
        self.inside = {}
        self.failed, self.prefills = False, prefills
        self.processor = None
        self.inboxes = [loop.inbox for loop in loops]

    def connected(self) -> cython.bint:
        """Whether its engines have a KV connector."""
        engines: Engines = self.engines[0]
        return engines.connected()

    def varied(self, seconds: cython.double) -> cython.longlong:
        factor: cython.double = 1.0 if self.variation is None else next(self.variation)
        return cython.cast(cython.longlong, rint(seconds * factor * PICOSECONDS))


class Flow:
    """Requests on their way.

    Args:
        requests: the columns of all. servers: of the replicas, by number.
        send: when a request that the client starts now is on the wire; None: at once.
        router: picks among ``ready``, and is told what it wants to hear (``Informed``, ``Answered``); None:
            the first.
        quiet: nobody waits for an end: the engines tell none.
        legs: where prompts are computed by servers of their own (``Legs``), or None.

    Attributes:
        now: picoseconds. ready: what the router picks among, each with its ``index``.
        outcomes: (fields, n) ``OUTCOMES``. arrival, replica, status: (n,), -1 where it did not happen.
        rank: (n,) of the engine core in the replica; -1 while none of several is chosen.
        outstanding: (replicas,) requests sent to each and not ended.
        sent: requests, so far. finished: streams that are done, for the host to take. failures: why requests
            failed, how many.
    """

    def __init__(
        self,
        requests: Any,
        servers: list[Server],
        ready: Any,
        send: Any,
        router: Any,
        outstanding: Any,
        *,
        quiet: bool = False,
        ordered: bool = False,
        legs: Any = None,
    ) -> None:
        n: cython.Py_ssize_t = len(requests)
        server: Server
        self.requests, self.servers, self.ready = requests, servers, ready
        self.send, self.router = send, router
        self.ended = router.ended if isinstance(router, Informed) else None
        self.answered = router.answered if isinstance(router, Answered) else None
        self.quiet, self.ordered, self.legs = quiet, ordered, legs
        self.looks = router is not None and not isinstance(router, LOOKS_AT_NONE)
        self.heap, self.senders, self.finished, self.order = [], [], [], []
        self.engines, self.fronts = [], []
        self.objects, self.failures, self.running = {}, {}, None
        self.now = self.count = self.until = self.sent = 0
        self.prompt, self.media = writable(requests.prompt_tokens), requests.media
        self.gives_up = requests.abort_after_s is not None
        if self.gives_up:
            self.abort_s = writable(requests.abort_after_s)
        outcomes: Any = np.zeros((len(OUTCOMES), n), np.int64)
        outcomes[:7] = -1  # all but preemptions
        columns: dict = {
            "outcomes": outcomes,
            "arrival": np.zeros(n, np.int64),
            "replica": np.full(n, -1, np.int32),
            "status": np.zeros(n, np.int8),
            "stream": np.zeros(n, np.int32),
            "rank": np.zeros(n, np.int32),
        }
        self.front = np.zeros(n, np.int32)
        self.columns = columns
        self.outcomes, self.arrival = columns["outcomes"], columns["arrival"]
        self.replica, self.status = columns["replica"], columns["status"]
        self.stream, self.rank = columns["stream"], columns["rank"]
        self.outstanding = outstanding
        for server in servers:
            self.connect(server)

    # ---- what the host does -----------------------------------------------------------------------

    def connect(self, server: Server) -> None:
        """Requests may be sent to it."""
        engines: Engines
        front: Front
        loop: Any
        known: cython.bint
        for loop in server.loops:
            if server.prefills:
                loop.load(self.legs.prompts, self.legs.outcomes)
            else:
                loop.load(self.requests, self.columns["outcomes"])
            loop.tell_ends = not self.quiet
            if self.answered is not None and not server.prefills:
                loop.on_first = self.tell_answered
        for engines in server.engines:
            known = 0 <= engines.number < len(self.engines)  # several cores may be in one lockstep
            if not known or self.engines[engines.number] is not engines:
                engines.number = len(self.engines)
                self.engines.append(engines)
        for front in server.fronts:
            front.number = len(self.fronts)
            self.fronts.append(front)

    def add(self, server: Server) -> None:
        """One more replica."""
        self.servers.append(server)
        self.connect(server)

    def open(self, first: int, end: int, limit: int, sessions: Any = None) -> Sender:
        """A stream begins now, whose requests are rows [first, end)."""
        sender: Sender = Sender(first, end, limit, sessions)
        number: cython.int = len(self.senders)
        row: cython.Py_ssize_t
        self.senders.append(sender)
        if number:
            for row in range(first, end):
                self.stream[row] = number
        start: cython.longlong = self.now
        self.columns["arrival"][first:end] = start + np.rint(
            self.requests.arrival_s[first:end] * 1e12
        ).astype(np.int64)
        if sessions is None:
            self.push(self.now, 0, ARRIVAL, number)
        return sender

    # ---- what a client of sessions does

    def remind(self, time: int, row: int) -> None:
        """Call ``due`` of the row's client at a time, or now."""
        self.push(max(time, self.now), 0, DUE, row)

    def meant(self, row: int) -> None:
        """A request is meant to be sent now."""
        self.arrival[row] = self.now
        self.order.append(row)

    def dispatch(self, row: int) -> None:
        """It is sent."""
        self.start(self.senders[self.stream[row]], row)

    def drop(self, number: int, count: int) -> None:
        """So many requests of a stream are never sent."""
        sender: Sender = self.senders[number]
        sender.open -= count
        self.tell_finished(sender, number)

    def stop(self, number: int) -> None:
        """A stream sends no more; what was not sent was never part of the run."""
        sender: Sender = self.senders[number]
        sender.stopped = True
        sender.ready = sender.started
        sender.open = sender.in_flight
        self.tell_finished(sender, number)

    def fail(self, index: int) -> int:
        """A replica is gone, and every request that it has ends as failed. Returns how many. Those whose
        cores are in lockstep with its own are gone, too."""
        server: Server = self.servers[index]
        other: Server
        engines: Engines
        lost: list = list(server.inside)
        server.failed = True
        for engines in server.engines:
            engines.failed = True
        for row in lost:
            self.end(server, index, row, _FAILED)
        count: cython.int = len(lost)
        for number, other in enumerate(self.servers):
            engines = other.engines[0]
            if engines.failed and not other.failed:
                count += self.fail(number)
        return count

    def advance(self, until: cython.longlong) -> cython.bint:
        """Run what happens before ``until``.

        Returns:
            Whether there is something in ``finished``, at ``now``.

        Raises:
            InputError: a request can never run.
        """
        event: tuple
        time: cython.longlong
        rank: cython.longlong
        what: cython.int
        number: cython.Py_ssize_t
        self.until = until
        while self.heap:
            event = self.heap[0]
            time = event[0]
            if time >= until:
                break
            if self.finished:
                rank = event[1]
                if time > self.now or rank >= LAST:
                    return True
            heappop(self.heap)
            self.now = time
            what = event[2]
            number = event[3]
            if what == ENGINE:
                self.run_engine(number)
            elif what == ARRIVAL:
                self.arrive(number)
            elif what == ON_WIRE:
                self.route(number)
            elif what == AT_SERVER:
                self.prepare(number)
            elif what == PREPARED:
                self.end_round(number)
            elif what == ENCODED:
                self.put(number)
            elif what == DONE:
                self.done(number)
            elif what == GIVE_UP:
                self.give_up(number)
            elif what == PUBLISH:
                self.publish(number)
            elif what == DUE:
                self.senders[self.stream[number]].sessions.due(number)
            elif what == CLOSED:
                self.tell_finished(self.senders[number], number)
            elif what == HANDED_ON:
                self.hand_on(number)
            elif what == WAKE:
                self.wake_connected(self.servers[number])
            else:
                self.answered(self.objects[number], self.replica[number])
        if self.finished:
            return True
        if until < NEVER:
            self.now = until
        return False

    def push(
        self, time: cython.longlong, rank: cython.longlong, what: cython.int, number: cython.Py_ssize_t
    ) -> cython.int:
        heappush(self.heap, (time, rank + self.count, what, number))
        self.count += 1
        return 0

    # ---- the clients ------------------------------------------------------------------------------

    def arrive(self, number: cython.Py_ssize_t) -> cython.int:
        """All that a client means to send by now, and when the next one comes."""
        sender: Sender = self.senders[number]
        if sender.stopped:
            return 0
        while sender.ready < sender.end and self.arrival[sender.ready] <= self.now:
            if self.ordered:
                self.order.append(sender.ready)
            sender.ready += 1
            self.send_ready(sender)
        if sender.ready < sender.end:
            self.push(self.arrival[sender.ready], 0, ARRIVAL, number)
        elif not sender.open:
            self.tell_finished(sender, number)
        return 0

    def send_ready(self, sender: Sender) -> cython.int:
        """Send what may be sent."""
        while sender.started < sender.ready and (not sender.limit or sender.in_flight < sender.limit):
            sender.started += 1
            self.start(sender, sender.started - 1)
        return 0

    def start(self, sender: Sender, row: cython.Py_ssize_t) -> cython.int:
        """Send a request: its clocks run from here."""
        on_wire: cython.longlong
        after: cython.longlong
        sender.in_flight += 1
        self.sent += 1
        self.outcomes[0, row] = on_wire = self.now
        if self.gives_up and self.abort_s[row] == self.abort_s[row]:
            after = cython.cast(cython.longlong, rint(self.abort_s[row] * PICOSECONDS))
            self.push(self.now + after, 0, GIVE_UP, row)
        if self.send is not None:
            on_wire = self.send(self.now)
        if on_wire > self.now:
            self.push(on_wire, 0, ON_WIRE, row)
        else:
            self.route(row)
        return 0

    def give_up(self, row: cython.Py_ssize_t) -> cython.int:
        """The client goes away."""
        server: Server
        if self.status[row] == _FAILED:
            return 0
        if self.replica[row] < 0:  # still in the client's process
            self.status[row] = _ABORTED
            self.done(row)
            return 0
        server = self.servers[self.replica[row]]
        if row in server.inside and not server.failed:
            if self.rank[row] < 0:  # no core has it yet
                self.end(server, self.replica[row], row, _ABORTED)
                return 0
            server.loops[self.rank[row]].aborts += 1
            server.inboxes[self.rank[row]].append((self.now, ~row))
            self.wake(server.engines[self.rank[row]])
        elif server.prefills and self.status[row] != _FINISHED:  # on its way to the other server
            self.status[row] = _ABORTED
            self.done(row)
        return 0

    def done(self, row: cython.Py_ssize_t) -> cython.int:
        """It has its answer, or none will come: the router hears of it, and the client may send the next."""
        number: cython.Py_ssize_t = self.stream[row]
        sender: Sender = self.senders[number]
        if self.ended is not None and self.replica[row] >= 0:
            self.ended(self.objects.pop(row), self.replica[row] if self.legs is None else self.legs.home(row))
        sender.in_flight -= 1
        sender.open -= 1
        if sender.sessions is not None:
            sender.sessions.ended(row, self.status[row] == _FINISHED)
        self.tell_finished(sender, number)
        self.send_ready(sender)
        return 0

    def tell_finished(self, sender: Sender, number: cython.Py_ssize_t) -> cython.int:
        """The host hears of a stream when its client has its last answer."""
        if sender.open or sender.told:
            return 0
        if sender.last > self.now:
            return self.push(sender.last, 0, CLOSED, number)
        sender.told = True
        self.finished.append(number)
        return 0

    # ---- the router -------------------------------------------------------------------------------

    def route(self, row: cython.Py_ssize_t) -> cython.int:
        """The request reaches the router."""
        position: Any
        request: Any = None
        index: cython.int
        if self.status[row] == _ABORTED:
            return 0
        if not len(self.ready):  # HTTP 503
            return self.refuse(row, NOT_READY)
        if self.legs is not None:
            return self.split(row)
        if self.looks:
            request = self.requests[row]
        position = 0 if self.router is None else self.router.pick(request, self.ready)
        if position is None:
            return self.refuse(row, UNPICKED)
        index = self.ready[position].index
        if self.ended is not None or self.answered is not None:
            self.objects[row] = request
        return self.send_to(index, row)

    def send_to(self, index: cython.int, row: cython.Py_ssize_t) -> cython.int:
        """A request goes to a server."""
        server: Server = self.servers[index]
        self.replica[row] = index
        if server.failed:
            return self.refuse(row, REFUSED)
        self.outstanding[index] += 1
        if not self.quiet:
            server.inside[row] = None
        return self.accept(server, row)

    def split(self, row: cython.Py_ssize_t) -> cython.int:
        """The request reaches the router of a fleet whose prompts are computed by servers of their own."""
        first: Any = self.legs.first(row, self.ready)
        if first is None:
            return self.refuse(row, UNPICKED)
        if self.ended is not None or self.answered is not None:
            self.objects[row] = self.requests[row]
        return self.send_to(first, row)

    def hand_on(self, row: cython.Py_ssize_t) -> cython.int:
        """A prompt is computed, and the request goes on to the server that decodes."""
        second: Any
        if self.status[row] == _ABORTED:
            return 0
        second = self.legs.second(row, self.ready)
        if second is None:
            return self.refuse(row, NOT_READY)
        return self.send_to(second, row)

    def refuse(self, row: cython.Py_ssize_t, why: Any) -> cython.int:
        self.failures[why] = self.failures.get(why, 0) + 1
        self.status[row] = _FAILED
        self.push(self.now, 0, DONE, row)  # its client may send the next at once, without end
        return 0

    def tell_answered(self, row: cython.longlong, time: cython.longlong) -> None:
        """The first token of a request comes at a time."""
        self.push(time, 0, ANSWERED, row)

    # ---- the API servers --------------------------------------------------------------------------

    def server_of(self, row: cython.Py_ssize_t) -> Server:
        return self.servers[self.replica[row]]

    def accept(self, server: Server, row: cython.Py_ssize_t) -> cython.int:
        """A request is on its way to a server."""
        latency: cython.longlong = server.varied(server.latency_s)
        self.rank[row] = 0 if server.balance is None else -1
        self.front[row] = 0 if server.spread is None else next(server.spread)
        if latency:
            self.push(self.now + latency, 0, AT_SERVER, row)
            return 0
        return self.prepare(row)

    def prepare(self, row: cython.Py_ssize_t) -> cython.int:
        """Requests in preparation take turns of one event loop, in rounds that are ready as a whole.

        Each needs several turns (HTTP, chat template and tokenizer in a thread that waits for the interpreter
        lock, micro-batched tokenization), and one that arrives meanwhile joins the round, up to the size of
        vLLM's tokenizer batches. The mean time in it is near that of processor sharing, cost / (1 - load)
        (Kleinrock 1976), but a burst of n stays a burst, ready after n times the cost of one. With rounds of
        one, as releases without micro-batches have them, it is first come, first served.
        """
        server: Server = self.server_of(row)
        front: Front = server.fronts[self.front[row]]
        cost: cython.longlong = server.varied(server.request_s)
        newest: list
        if not cost:
            return self.encode(server, row)
        front.busy_until = max(self.now, front.busy_until) + cost
        if not front.rounds or len(front.rounds[len(front.rounds) - 1]) > server.most:
            front.rounds.append([0])
            if len(front.rounds) == 1:
                self.push(self.now + cost, 0, PREPARED, front.number)
        newest = front.rounds[len(front.rounds) - 1]
        newest.append(row)
        newest[0] = front.busy_until
        return 0

    def end_round(self, number: cython.Py_ssize_t) -> cython.int:
        """A round is ready, or others have joined it."""
        front: Front = self.fronts[number]
        oldest: list = front.rounds[0]
        i: cython.Py_ssize_t
        if oldest[0] == self.now:
            del front.rounds[0]
            for i in range(1, len(oldest)):
                self.encode(self.server_of(oldest[i]), oldest[i])
        if front.rounds:
            oldest = front.rounds[0]
            self.push(oldest[0], 0, PREPARED, number)
        return 0

    def encode(self, server: Server, row: cython.Py_ssize_t) -> cython.int:
        """The tokenizer's thread takes one prompt after the other."""
        front: Front = server.fronts[self.front[row]]
        cost: cython.longlong = cython.cast(
            cython.longlong, rint(server.prompt_token_s * self.prompt[row] * PICOSECONDS)
        )
        if self.media is not None and self.media[row] is not None and server.processor is not None:
            images: cython.double = server.processor(self.media[row])
            cost += cython.cast(cython.longlong, rint(images * PICOSECONDS))
        if cost:
            front.tokenizer_free = max(self.now, front.tokenizer_free) + cost
            self.push(front.tokenizer_free, 0, ENCODED, row)
            return 0
        return self.put(row)

    # ---- the engines ------------------------------------------------------------------------------

    def put(self, row: cython.Py_ssize_t) -> cython.int:
        """It reaches the engine's input queue, unless it was given up while it was prepared."""
        server: Server = self.server_of(row)
        inbox: list
        if server.failed or self.status[row] == _ABORTED:
            return 0
        if server.balance is not None:
            self.assign(server, row)
        inbox = server.inboxes[self.rank[row]]
        inbox.append((self.now, row))
        return self.wake(server.engines[self.rank[row]])

    def assign(self, server: Server, row: cython.Py_ssize_t) -> cython.int:
        """Its API server picks the engine core."""
        due: cython.longlong = server.balance.due(self.now)
        self.rank[row] = server.balance.pick(self.front[row])
        if due >= 0:
            self.push(due, 0, PUBLISH, self.replica[row])
        return 0

    def wake_server(self, index: int, time: int = 0) -> None:
        """What its connector answers changes from outside, now or at a time. The engine that runs now does
        not run past it."""
        time = max(time, self.now)
        self.push(time, 0, WAKE, index)
        if self.running is not None and self.running.compiled is not None:
            self.running.compiled.horizon = min(self.running.compiled.horizon, time)

    def publish(self, index: cython.Py_ssize_t) -> cython.int:
        """The coordinator tells the API servers what the cores have reported."""
        server: Server = self.servers[index]
        engines: Engines
        busy: cython.bint = False
        due: cython.longlong
        if server.failed:
            return 0
        for engines in server.engines:
            busy = busy or not engines.idle
        due = server.balance.publish(self.now, [loop.reported for loop in server.loops], busy=busy)
        if due >= 0:
            self.push(due, 0, PUBLISH, index)
        return 0

    def wake_connected(self, server: Server) -> cython.int:
        engines: Engines
        for engines in server.engines:
            if engines.connected():
                self.wake(engines)
        return 0

    def wake(self, engines: Engines) -> cython.int:
        if engines.idle:
            engines.idle = False
            engines.runner.now = self.now
            self.push(self.now, LAST, ENGINE, engines.number)
        elif engines.polling:
            self.push(self.now, LAST, ENGINE, engines.number)
        else:
            return 0
        engines.polling, engines.due = False, self.now
        return 0

    def run_engine(self, number: cython.Py_ssize_t) -> cython.int:
        """An engine goes on, up to the next event of anybody."""
        engines: Engines = self.engines[number]
        until: cython.longlong
        state: cython.int
        event: tuple
        if engines.failed or (engines.connected() and engines.due != self.now):  # it was woken earlier
            return 0
        while True:
            until = self.until
            if self.heap:
                event = self.heap[0]
                until = min(until, cython.cast(cython.longlong, event[0]))
            if self.finished or until <= self.now:
                until = self.now + 1
            self.running = engines
            state = engines.advance(until)
            self.running = None
            if state == ENDED:
                self.take_ended(engines)
            elif state == ABORTS:
                self.drain(engines)
            elif state == BUSY or state == POLLING:  # noqa: SIM109 (compiled, no tuple)
                engines.polling, engines.due = state == POLLING, engines.wake()
                self.push(engines.due, LAST, ENGINE, number)
                return 0
            else:
                engines.idle = True
                return 0

    def drain(self, engines: Engines) -> cython.int:
        """All that is in the cores' input queues by now, where clients have gone."""
        item: tuple
        row: cython.Py_ssize_t
        loop: Any
        server: Server
        for loop in engines.loops:
            while loop.inbox:
                item = loop.inbox.pop(0)
                row = item[1]
                if row >= 0:
                    if self.status[row] != _ABORTED:
                        loop.take(row, item[0])
                    continue
                server = self.server_of(~row)
                if ~row in server.inside:
                    self.end(server, self.replica[~row], ~row, _ABORTED)
            loop.aborts = 0
        return 0

    def take_ended(self, engines: Engines) -> cython.int:
        """Requests whose last token is on its way."""
        ended: list
        row: cython.Py_ssize_t
        finish: cython.longlong
        number: cython.Py_ssize_t
        sender: Sender
        server: Server
        loop: Any
        for loop in engines.loops:
            ended = loop.ended
            loop.ended = []
            if getattr(loop, "lost", None):
                self.take_lost(loop)
            for row in ended:
                server = self.servers[self.replica[row]]
                del server.inside[row]
                self.outstanding[self.replica[row]] -= 1
                if server.balance is not None:
                    server.balance.ended(self.front[row], self.rank[row])
                if server.prefills:
                    self.push(self.legs.computed(row), 0, HANDED_ON, row)
                    continue
                self.status[row] = _FINISHED
                finish = self.outcomes[5, row]
                number = self.stream[row]
                sender = self.senders[number]
                if (
                    self.ended is None and not sender.limit and sender.sessions is None
                ):  # nobody waits for one
                    sender.last = max(sender.last, finish)
                    sender.in_flight -= 1
                    sender.open -= 1
                    self.tell_finished(sender, number)
                elif finish > self.now:
                    self.push(finish, 0, DONE, row)
                else:
                    self.done(row)
        return 0

    def take_lost(self, loop: Any) -> cython.int:
        """Requests that ended with an error."""
        lost: list = loop.lost
        loop.lost = []
        for row in lost:
            self.failures[NOT_LOADED] = self.failures.get(NOT_LOADED, 0) + 1
            self.end(self.server_of(row), self.replica[row], row, _FAILED)
        return 0

    def end(
        self, server: Server, index: cython.Py_ssize_t, row: cython.Py_ssize_t, status: cython.int
    ) -> cython.int:
        """A request ends without its last token."""
        del server.inside[row]
        if self.rank[row] >= 0:
            server.loops[self.rank[row]].leave(row)
            if server.balance is not None:
                server.balance.ended(self.front[row], self.rank[row])
        self.status[row] = status
        self.outstanding[index] -= 1
        self.done(row)
        return 0
