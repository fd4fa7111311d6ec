"""llm-d's scorers: how good each endpoint is for a request, each in its own words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend, Columns
from servecast.sim.routing.llmd.cycle import Cycle, Setting
from servecast.sim.routing.llmd.plugin import Plugin
from servecast.sim.routing.llmd.sessions import Sessions
from servecast.sim.routing.tally import Tally

Scores = NDArray[np.float64]
Counts = NDArray[np.int64]


class Scorer(Protocol):
    """Scores the candidates of a cycle.

    Attributes:
        by_gauges: it looks at nothing but ``cycle.known``, so that its scores hold until that changes.
    """

    by_gauges: bool

    def score(self, cycle: Cycle) -> Scores:
        """A score for each candidate, in their order; 0 for one of which it knows nothing."""
        ...


def _fewest_best(values: Counts) -> Scores:
    """(most - value) / (most - fewest); 1 for all where all are equal."""
    least, most = values[values.argmin()], values[values.argmax()]
    if least == most:
        return np.ones(len(values))
    found: Scores = (most - values) / (most - least)
    return found


class GaugeScorer:
    """A score of what the servers' gauges say."""

    by_gauges = True

    def __init__(self, of: Callable[[Columns], Scores]) -> None:
        self._of = of

    def score(self, cycle: Cycle) -> Scores:
        return self._of(cycle.known)


def _queue(plugin: Plugin, setting: Setting) -> GaugeScorer:
    """Fewest waiting requests best: one more or less is worth the whole score where the range is one."""
    return GaugeScorer(lambda known: _fewest_best(known.waiting))


def _running(plugin: Plugin, setting: Setting) -> GaugeScorer:
    """Fewest running requests best, like the queue."""
    return GaugeScorer(lambda known: _fewest_best(known.running))


def _kv_usage(plugin: Plugin, setting: Setting) -> GaugeScorer:
    """1 - usage of the KV cache, whatever the others have. It alone could leave 0..1, and is clamped."""
    least = 0.0 if setting.release.clamps else -np.inf
    return GaugeScorer(lambda known: np.maximum(1.0 - known.kv_usage, least))


def _load_aware(plugin: Plugin, setting: Setting) -> GaugeScorer:
    """0.5 for an empty queue, falling to 0 at ``threshold`` waiting requests."""
    most = plugin.parameters.whole("threshold", 128)
    return GaugeScorer(lambda known: 0.5 * (1.0 - np.minimum(known.waiting, most) / most))


class ActiveRequestScorer:
    """Fewest of the requests that this router has in flight: (most - count) / most, 1 for none.

    Up to idleThreshold requests are as good as none, and more are worth maxBusyScore at best. Up to v1.5 it
    counts on its own, without those that were sent longer ago than requestTimeout.
    """

    by_gauges = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._timeout_s = parameters.duration_s("requestTimeout", "2m")
        self._idle = max(parameters.amount("idleThreshold", 0), 0)
        self._most_busy = parameters.number("maxBusyScore", 1.0, high=1.0)
        self._load = setting.loads[plugin.load] if plugin.load else None
        self._clock = setting.clock
        self._sent: OrderedDict[tuple[int, int], float] = OrderedDict()  # (request, replica) -> when
        self._counts = Tally()

    def score(self, cycle: Cycle) -> Scores:
        numbers = cycle.known.numbers
        if self._load is None:
            self._expire()
            counts, most = self._counts.of(numbers), int(self._counts.values.max(initial=0))
        else:
            counts = self._load.requests(numbers)
            most = int(counts.max())
        busy = counts > self._idle
        return np.where(busy, (most - counts) / max(most, 1) * self._most_busy, 1.0)

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        self._sent[cycle.request.request_id, backend.index] = self._clock()
        self._counts.add(backend.index, 1)

    def ended(self, request: Request, index: int) -> None:
        """Of the server that answered alone: one for its prompt counts until requestTimeout."""
        if self._sent.pop((request.request_id, index), None) is not None:
            self._counts.add(index, -1)

    def _expire(self) -> None:
        now = self._clock()
        while self._sent:
            key, sent = next(iter(self._sent.items()))
            if now - sent < self._timeout_s:
                return
            del self._sent[key]
            self._counts.add(key[1], -1)


class TokenLoadScorer:
    """Fewest tokens in flight, those of the request included: 1 for none, falling to 0 at
    ``queueThresholdTokens``."""

    by_gauges = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._threshold = plugin.parameters.whole("queueThresholdTokens", 4_194_304)
        self._load = setting.loads[plugin.load]

    def score(self, cycle: Cycle) -> Scores:
        load, most = self._load, self._threshold
        tokens = load.tokens(cycle.known.numbers) + load.uncached(cycle)
        found: Scores = 1.0 - np.minimum(tokens, most) / most
        return found


class PrefixCacheScorer:
    """Share of the prompt's leading blocks that the endpoint has; matchLengthWeight of it by their length, as
    the square of its share of matchLengthScaleTokens.

    A precise index up to v1.5 is stretched to 0..1 over the endpoints that have any.
    """

    by_gauges = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._producer = setting.prefixes[plugin.prefixes]
        self._by_length = parameters.number("matchLengthWeight", 0.0, high=1.0)
        self._scale = parameters.whole("matchLengthScaleTokens", 8192)

    def score(self, cycle: Cycle) -> Scores:
        match, numbers, by_length = self._producer.match(cycle), cycle.known.numbers, self._by_length
        counts = match.of(numbers)
        if self._producer.stretched:
            held = match.counts.values()
            least, most = min(held, default=0), max(held, default=0)
            if most == least:
                return (counts > 0).astype(np.float64)
            return np.maximum(counts - least, 0) / (most - least)
        if not by_length:
            return match.shares(numbers)
        lengths = np.minimum(1.0, counts * match.block_tokens / self._scale)
        return by_length * lengths**2 + (1 - by_length) * counts / (match.total or 1)


class SessionAffinityScorer(Sessions):
    """1 for the endpoint that has the session."""

    by_gauges = False

    def score(self, cycle: Cycle) -> Scores:
        home = self.home(cycle.request)
        here: NDArray[np.bool_] = cycle.known.numbers == (-1 if home is None else home)
        return here.astype(np.float64)


class NoHitLruScorer:
    """Spreads requests that hit no prefix: endpoints that never had one first, then the one whose last was
    longest ago. 0.5 for all where a prefix was found: by the producer that it names, or up to v1.5 by the
    approximate index ``prefixPluginName`` where that was asked before."""

    by_gauges = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._prefix_plugin = plugin.parameters.text("prefixPluginName", "prefix-cache-scorer")
        self._producer = setting.prefixes[plugin.prefixes] if plugin.prefixes else None
        self._size = plugin.parameters.whole("lruSize", 1024)
        self._last_cold: OrderedDict[int, None] = OrderedDict()  # endpoints, oldest first

    def _is_cold(self, cycle: Cycle) -> bool:
        if self._producer is not None:
            return not self._producer.match(cycle).counts
        match = cycle.matches.get(self._prefix_plugin)
        return match is None or not match.counts

    def score(self, cycle: Cycle) -> Scores:
        numbers = cycle.known.numbers
        if not self._is_cold(cycle):
            return np.full(len(numbers), 0.5)
        if len(numbers) == 1:
            return np.ones(1)
        here = numbers.tolist()
        never = [number for number in here if number not in self._last_cold]
        present = set(here)
        order = never + [number for number in self._last_cold if number in present]
        place = dict(zip(order, range(len(order)), strict=True))
        return 1.0 - np.array([place[number] for number in here]) / (len(numbers) - 1)

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        if self._is_cold(cycle):
            self._last_cold[backend.index] = None
            self._last_cold.move_to_end(backend.index)
            if len(self._last_cold) > self._size:
                self._last_cold.popitem(last=False)


class LoraAffinityScorer:
    """1 where the request's adapter is active, 0.8 where there is room for one more, else 0.

    vLLM lists every adapter of its requests as active and as waiting, and both lists count: there is room
    while twice as many adapters as have requests are fewer than the slots. An adapter that waits is active,
    so that 0.6 for one that only waits does not arise. Requests to the base model ask for an adapter that
    nobody has.
    """

    by_gauges = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        pass

    def score(self, cycle: Cycle) -> Scores:
        asked = cycle.request.adapter
        scores = np.zeros(len(cycle.backends))
        for position, backend in enumerate(cycle.backends):
            active = backend.gauges.adapters
            if asked in active:
                scores[position] = 1.0
            elif 2 * len(active) < backend.max_loras:
                scores[position] = 0.8
        return scores


SCORERS: dict[str, Callable[[Plugin, Setting], Scorer]] = {
    "queue-scorer": _queue,
    "kv-cache-utilization-scorer": _kv_usage,
    "running-requests-size-scorer": _running,
    "load-aware-scorer": _load_aware,
    "active-request-scorer": ActiveRequestScorer,
    "token-load-scorer": TokenLoadScorer,
    "prefix-cache-scorer": PrefixCacheScorer,
    "precise-prefix-cache-scorer": PrefixCacheScorer,
    "session-affinity-scorer": SessionAffinityScorer,
    "no-hit-lru-scorer": NoHitLruScorer,
    "lora-affinity-scorer": LoraAffinityScorer,
}
