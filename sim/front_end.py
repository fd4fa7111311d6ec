"""What stands between the client's clock and the engine: client process, network, API server.

Each process is serial: one Python event loop that handles a request or a token at a time. A burst
therefore delays its own first tokens, and a large batch may produce tokens faster than they can be
streamed. A first-in-first-out server with known service times needs no events of its own: work that
arrives at t starts at max(t, end of the work before) (Lindley 1952).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from servecast.sim.units import to_ps

GATHER_S = 0.002  # AsyncMicrobatchTokenizer's batch_wait_timeout_s
MICROBATCH = 32  # and its max_batch_size


@dataclass(frozen=True, slots=True)
class FrontEndCosts:
    """Costs outside the engine, in seconds.

    Attributes:
        request_s: API server, serial, per request: HTTP, chat template, tokenizer.
        token_s: API server, serial, per token streamed: detokenizer, one event.
        latency_s: per request, not serial: connection, network, wake-ups, first event.
        client_request_s, client_token_s: the client's process, serial, per request and per token read.
        cv: coefficient of variation of the costs per request (gamma distributed, drawn per request).
    """

    request_s: float = 0.0
    token_s: float = 0.0
    latency_s: float = 0.0
    client_request_s: float = 0.0
    client_token_s: float = 0.0
    cv: float = 0.0


class SerialProcess:
    """A process that does one thing at a time, in order of arrival. Times in picoseconds."""

    __slots__ = ("busy_ps", "free_at")

    def __init__(self) -> None:
        self.free_at = 0
        self.busy_ps = 0

    def serve(self, now: int, cost: int) -> int:
        """When work of this cost that arrives now is done."""
        self.free_at = max(now, self.free_at) + cost
        self.busy_ps += cost
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

    def read(self, first: int, spacing: int, tokens: int) -> tuple[int, int]:
        """Read a batch of tokens which arrive from ``first`` on, ``spacing`` apart.

        Returns:
            When the first one is read, and the spacing of the others.
        """
        cost = self._token_ps
        if not cost:
            return first, spacing
        start = max(first, self.process.free_at) + cost
        pace = cost if start > first + cost else max(spacing, cost)
        end = max(start + cost * (tokens - 1), first + spacing * (tokens - 1) + cost)
        self.process.free_at = end
        self.process.busy_ps += cost * tokens
        return start, (end - start) // (tokens - 1) if tokens > 1 else pace


class ApiServer:
    """One API server process in front of one engine.

    Requests are tokenized in micro-batches, as vLLM's AsyncMicrobatchTokenizer does: the first one that
    arrives waits ``GATHER_S`` for company, those that arrive while a batch is prepared form the next one,
    and a batch reaches the engine as a whole. So a burst stays a burst.

    Args:
        env: SimPy environment whose clock counts picoseconds.
        costs: the costs of this process. rng: its generator.
        deliver: called with (time, item) when an item reaches the engine's input queue.
    """

    __slots__ = (
        "_batch_open",
        "_deliver",
        "_env",
        "_gather_ps",
        "_latency_ps",
        "_request_ps",
        "_token_ps",
        "_variation",
        "_waiting",
        "process",
    )

    def __init__(
        self,
        env: simpy.Environment,
        costs: FrontEndCosts,
        rng: np.random.Generator,
        deliver: Callable[[int, Any], None],
    ) -> None:
        self.process = SerialProcess()
        self._env = env
        self._deliver = deliver
        self._request_ps = to_ps(costs.request_s)
        self._gather_ps = to_ps(GATHER_S) if costs.request_s else 0
        self._token_ps = to_ps(costs.token_s)
        self._latency_ps = to_ps(costs.latency_s)
        self._variation = _gamma_factors(costs.cv, rng)
        self._waiting: deque[Any] = deque()
        self._batch_open = False

    def accept(self, item: Any) -> None:
        """A request has been sent to this server; it arrives after the latency."""
        latency = int(self._latency_ps * next(self._variation))
        if latency:
            after(self._env, latency, lambda: self._arrive(item))
        else:
            self._arrive(item)

    def stream(self, now: int, tokens: int) -> tuple[int, int]:
        """When the first of ``tokens`` that the engine delivers now is sent, and the spacing of the rest."""
        cost = self._token_ps
        return self.process.serve(now, cost * tokens) - cost * (tokens - 1), cost

    def _arrive(self, item: Any) -> None:
        if not self._request_ps:
            self._deliver(int(self._env.now), item)
            return
        self._waiting.append(item)
        if not self._batch_open:
            self._batch_open = True
            after(self._env, self._gather_ps, self._prepare)

    def _prepare(self) -> None:
        if not self._waiting:
            self._batch_open = False
            return
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MICROBATCH))]
        cost = sum(int(self._request_ps * next(self._variation)) for _ in batch)
        now = int(self._env.now)
        ready = self.process.serve(now, cost)
        for item in batch:
            self._deliver(ready, item)
        after(self._env, ready - now, self._prepare)


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
