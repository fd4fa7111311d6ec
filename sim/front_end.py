"""What stands between the client's clock and the engine: client process, network, API server.

Client and API server are Python processes with one event loop each. Reading and writing tokens is serial:
first come, first served, with known service times, which needs no events of its own: work that arrives at
t starts at max(t, end of the work before) (Lindley 1952). A server that lags sends a stream's tokens
together, see ``ApiServer.stream``. Preparing a request takes several turns of the loop, see ``Preparation``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import simpy

from servecast.sim.errors import InputError
from servecast.sim.units import to_ps

MAX_ROUND = 32  # max_batch_size of vLLM's AsyncMicrobatchTokenizer


@dataclass(frozen=True, slots=True)
class FrontEndCosts:
    """Costs outside the engine, in seconds.

    Attributes:
        request_s: API server, per request: HTTP, chat template, tokenizer; requests in progress share it.
        token_s: API server, serial, per event streamed, of one token unless it lags: detokenizer, one event.
        latency_s: per request, not serial, on its way to the engine: connection, network, wake-ups.
        delivery_s: per token, not serial, on its way from the engine: wake-ups, network.
        client_request_s, client_token_s: the client's process, serial, per request and per event read.
        cv: coefficient of variation of the costs per request (gamma distributed, drawn per request).
    """

    request_s: float = 0.0
    token_s: float = 0.0
    latency_s: float = 0.0
    delivery_s: float = 0.0
    client_request_s: float = 0.0
    client_token_s: float = 0.0
    cv: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < math.inf:
                raise InputError(
                    f"{field.name} is {value}", where=f"front_end.{field.name}", fix="Make it 0 or more."
                )


class SerialProcess:
    """A process that does one thing at a time, in order of arrival. Times in picoseconds."""

    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = 0

    def serve(self, now: int, cost: int) -> int:
        """When work of this cost that arrives now is done."""
        self.free_at = max(now, self.free_at) + cost
        return self.free_at


class Client:
    """The client's process: it sends requests and reads the tokens of all its streams."""

    __slots__ = ("_request_ps", "_token_ps", "process")

    def __init__(self, costs: FrontEndCosts) -> None:
        self.process = SerialProcess()
        self._request_ps = to_ps(costs.client_request_s)
        self._token_ps = to_ps(costs.client_token_s)

    def send(self, now: int) -> int:
        """When a request that is started now is on the wire."""
        return self.process.serve(now, self._request_ps)

    def read(self, first: int, spacing: int, events: int, tokens: int) -> tuple[int, int]:
        """Read a batch of tokens which arrive from ``first`` on, ``spacing`` apart, in so many new events.

        Returns:
            When the first one is read, and the spacing of the others.
        """
        cost = self._token_ps
        if not cost:
            return first, spacing
        start = max(first, self.process.free_at) + cost
        end = max(start + cost * max(events - 1, 0), first + spacing * (tokens - 1) + cost)
        self.process.free_at = end
        return start, (end - start) // (tokens - 1) if tokens > 1 else 0


class Preparation:
    """Requests in preparation take turns of one event loop, in rounds that are ready as a whole.

    Each needs several turns (HTTP, chat template and tokenizer in a thread that waits for the interpreter
    lock, micro-batched tokenization), and one that arrives meanwhile joins the round, up to the size of
    vLLM's tokenizer batches. The mean time in it is near that of processor sharing, cost / (1 - load)
    (Kleinrock 1976), but a burst of n stays a burst, ready after n times the cost of one.
    """

    __slots__ = ("_busy_until", "_env", "_rounds")

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._busy_until = 0
        self._rounds: deque[_Round] = deque()

    def start(self, cost: int, ready: Callable[[], None]) -> None:
        """Begin with a request of ``cost`` picoseconds; ``ready`` is called when its round is."""
        now = int(self._env.now)
        self._busy_until = max(now, self._busy_until) + cost
        if not self._rounds or len(self._rounds[-1].ready) == MAX_ROUND:
            self._rounds.append(_Round())
            if len(self._rounds) == 1:
                after(self._env, cost, self._end)
        self._rounds[-1].ready.append(ready)
        self._rounds[-1].end = self._busy_until

    def _end(self) -> None:
        now = int(self._env.now)
        if now == self._rounds[0].end:
            for ready in self._rounds.popleft().ready:
                ready()
        if self._rounds:  # the next round, or others have joined this one
            after(self._env, self._rounds[0].end - now, self._end)


class _Round:
    __slots__ = ("end", "ready")

    def __init__(self) -> None:
        self.end = 0
        self.ready: list[Callable[[], None]] = []


class ApiServer:
    """One API server process in front of one engine.

    Args:
        env: SimPy environment whose clock counts picoseconds.
        costs: the costs of this process. rng: its generator.
        deliver: called with an item when it reaches the engine's input queue.
    """

    __slots__ = (
        "_costs",
        "_deliver",
        "_delivery_ps",
        "_env",
        "_preparation",
        "_sent",
        "_token_ps",
        "_variation",
    )

    def __init__(
        self,
        env: simpy.Environment,
        costs: FrontEndCosts,
        rng: np.random.Generator,
        deliver: Callable[[Any], None],
    ) -> None:
        self._env = env
        self._costs = costs
        self._deliver = deliver
        self._preparation = Preparation(env)
        self._delivery_ps = to_ps(costs.delivery_s)
        self._sent = 0  # when the last token so far is
        self._token_ps = to_ps(costs.token_s)
        self._variation = _gamma_factors(costs.cv, rng)

    def accept(self, item: Any) -> None:
        """A request has been sent to this server; it arrives after the latency."""
        latency = to_ps(self._costs.latency_s * next(self._variation))
        if latency:
            after(self._env, latency, lambda: self._prepare(item))
        else:
            self._prepare(item)

    def stream(self, now: int, tokens: int) -> tuple[int, int, int]:
        """Send ``tokens`` that the engine delivers now, one a stream.

        A stream whose last token still waits to be sent takes the new one along in the same event (vLLM's
        RequestOutputCollector merges what its reader has not taken yet), so that never more than one event
        a stream waits: a server that lags delays tokens by one round over its streams, and no further.

        Returns:
            When the first one is at the client, the spacing of the others, and how many events they added.
        """
        cost, waiting = self._token_ps, max(self._sent, now)
        self._sent = max(self._sent, now + cost * tokens)
        events = (self._sent - waiting) // cost if cost else tokens
        return self._sent + self._delivery_ps - cost * (tokens - 1), cost, events

    def _prepare(self, item: Any) -> None:
        cost = to_ps(self._costs.request_s * next(self._variation))
        if cost:
            self._preparation.start(cost, lambda: self._deliver(item))
        else:
            self._deliver(item)


def after(env: simpy.Environment, delay: int, action: Callable[[], None]) -> None:
    """Do something ``delay`` picoseconds from now."""
    env.timeout(delay).callbacks.append(lambda _event: action())


def _gamma_factors(cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Factors of mean 1 and the given coefficient of variation, drawn in blocks."""
    while True:
        if cv:
            yield from rng.gamma(1 / cv**2, cv**2, size=1024).tolist()
        else:
            yield 1.0
