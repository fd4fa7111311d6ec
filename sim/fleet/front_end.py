"""What stands between the client's clock and the engine: client process, network, API server.

Client and API server are Python processes with one event loop each. Reading and writing tokens is serial:
first come, first served, with known service times, which needs no events of its own: work that arrives at
t starts at max(t, end of the work before) (Lindley 1952). A server that lags sends a stream's tokens
together, see ``ApiServer.stream``. Preparing a request takes several turns of the loop, see ``Preparation``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import simpy

from servecast.sim.fleet.client import SerialProcess
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.units import to_ps


class Preparation:
    """Requests in preparation take turns of one event loop, in rounds that are ready as a whole.

    Each needs several turns (HTTP, chat template and tokenizer in a thread that waits for the interpreter
    lock, micro-batched tokenization), and one that arrives meanwhile joins the round, up to the size of
    vLLM's tokenizer batches. The mean time in it is near that of processor sharing, cost / (1 - load)
    (Kleinrock 1976), but a burst of n stays a burst, ready after n times the cost of one. With rounds of one,
    as releases without micro-batches have them, it is first come, first served.
    """

    __slots__ = ("_busy_until", "_env", "_most", "_rounds")

    def __init__(self, env: simpy.Environment, most: int) -> None:
        self._env = env
        self._most = most  # requests of a round
        self._busy_until = 0
        self._rounds: deque[_Round] = deque()

    def start(self, cost: int, ready: Callable[[], None]) -> None:
        """Begin with a request of ``cost`` picoseconds; ``ready`` is called when its round is."""
        now = int(self._env.now)
        self._busy_until = max(now, self._busy_until) + cost
        if not self._rounds or len(self._rounds[-1].ready) == self._most:
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
        preparation_round: requests that are prepared together, at most.
    """

    __slots__ = (
        "_deliver",
        "_delivery_ps",
        "_env",
        "_preparation",
        "_sent",
        "_token_ps",
        "_tokenizer",
        "costs",
        "variation",
    )

    def __init__(
        self,
        env: simpy.Environment,
        costs: FrontEndCosts,
        rng: np.random.Generator,
        deliver: Callable[[Any], None],
        preparation_round: int,
    ) -> None:
        self._env = env
        self.costs = costs
        self._deliver = deliver
        self._preparation = Preparation(env, preparation_round)
        self._delivery_ps = to_ps(costs.delivery_s)
        self._tokenizer = SerialProcess()
        self._sent = 0  # when the last token so far is
        self._token_ps = to_ps(costs.token_s)
        self.variation = _gamma_factors(costs.cv, rng)

    def accept(self, item: Any, prompt_tokens: int) -> None:
        """A request with a prompt of so many tokens has been sent to this server; it arrives after the
        latency."""
        latency = to_ps(self.costs.latency_s * next(self.variation))
        if latency:
            after(self._env, latency, lambda: self._prepare(item, prompt_tokens))
        else:
            self._prepare(item, prompt_tokens)

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

    def _prepare(self, item: Any, prompt_tokens: int) -> None:
        cost = to_ps(self.costs.request_s * next(self.variation))
        if cost:
            self._preparation.start(cost, lambda: self._encode(item, prompt_tokens))
        else:
            self._encode(item, prompt_tokens)

    def _encode(self, item: Any, prompt_tokens: int) -> None:
        """The tokenizer's thread takes one prompt after the other."""
        cost, now = to_ps(self.costs.prompt_token_s * prompt_tokens), int(self._env.now)
        if cost:
            after(self._env, self._tokenizer.serve(now, cost) - now, lambda: self._deliver(item))
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
