"""llm-d's scorers: how good each endpoint is for a request, each in its own words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from servecast.sim.engine.request import Request
from servecast.sim.routing.llmd.cycle import Cycle, Setting
from servecast.sim.routing.llmd.plugin import Plugin
from servecast.sim.routing.llmd.sessions import Sessions
from servecast.sim.routing.routers import Backend


class Scorer(Protocol):
    """Scores the candidates of a cycle."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        """A score for each candidate, in their order; 0 for one of which it knows nothing."""
        ...


def _fewest_best(values: Sequence[int]) -> list[float]:
    """(most - value) / (most - fewest); 1 for all where all are equal."""
    least, most = min(values), max(values)
    if least == most:
        return [1.0] * len(values)
    return [(most - value) / (most - least) for value in values]


class QueueScorer:
    """Fewest waiting requests best: one more or less is worth the whole score where the range is one."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        pass

    def score(self, cycle: Cycle) -> list[float]:
        return _fewest_best([gauges.waiting for gauges in cycle.gauges])


class RunningRequestsSizeScorer:
    """Fewest running requests best, like the queue."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        pass

    def score(self, cycle: Cycle) -> list[float]:
        return _fewest_best([gauges.running for gauges in cycle.gauges])


class KvCacheUtilizationScorer:
    """1 - usage of the KV cache, whatever the others have."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        pass

    def score(self, cycle: Cycle) -> list[float]:
        return [1.0 - gauges.kv_usage for gauges in cycle.gauges]


class LoadAwareScorer:
    """0.5 for an empty queue, falling to 0 at ``threshold`` waiting requests."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._threshold = plugin.parameters.whole("threshold", 128)

    def score(self, cycle: Cycle) -> list[float]:
        threshold = self._threshold
        return [0.5 * (1.0 - min(gauges.waiting, threshold) / threshold) for gauges in cycle.gauges]


class ActiveRequestScorer:
    """Fewest of the requests that this router has in flight: (most - count) / most, 1 for none.

    Up to idleThreshold requests are as good as none, and more are worth maxBusyScore at best. Up to v1.5 it
    counts on its own, without those that were sent longer ago than requestTimeout.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._timeout_s = parameters.duration_s("requestTimeout", "2m")
        self._idle = max(parameters.amount("idleThreshold", 0), 0)
        self._most_busy = parameters.number("maxBusyScore", 1.0, high=1.0)
        self._load = setting.loads[plugin.load] if plugin.load else None
        self._clock = setting.clock
        self._sent: OrderedDict[int, tuple[float, int]] = OrderedDict()  # request -> when, to which replica
        self._counts: dict[int, int] = {}

    def score(self, cycle: Cycle) -> list[float]:
        if self._load is None:
            self._expire()
            most = max(self._counts.values(), default=0)
            counts = [self._counts.get(backend.index, 0) for backend in cycle.backends]
        else:
            counts = [self._load.requests(backend) for backend in cycle.backends]
            most = max(counts)
        return [(most - count) / most * self._most_busy if count > self._idle else 1.0 for count in counts]

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        self._sent[cycle.request.request_id] = self._clock(), backend.index
        self._counts[backend.index] = self._counts.get(backend.index, 0) + 1

    def ended(self, request: Request, index: int) -> None:
        if self._sent.pop(request.request_id, None) is not None:
            self._counts[index] -= 1

    def _expire(self) -> None:
        now = self._clock()
        while self._sent:
            request_id, (sent, index) = next(iter(self._sent.items()))
            if now - sent < self._timeout_s:
                return
            del self._sent[request_id]
            self._counts[index] -= 1


class TokenLoadScorer:
    """Fewest tokens in flight, those of the request included: 1 for none, falling to 0 at
    ``queueThresholdTokens``."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._threshold = plugin.parameters.whole("queueThresholdTokens", 4_194_304)
        self._load = setting.loads[plugin.load]

    def score(self, cycle: Cycle) -> list[float]:
        load, most = self._load, self._threshold
        tokens = [load.tokens(backend) + load.uncached(cycle, backend) for backend in cycle.backends]
        return [1.0 - min(each, most) / most for each in tokens]


class PrefixCacheScorer:
    """Share of the prompt's leading blocks that the endpoint has; matchLengthWeight of it by their length, as
    the square of its share of matchLengthScaleTokens.

    A precise index up to v1.5 is stretched to 0..1 over the endpoints that have any.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._producer = setting.prefixes[plugin.prefixes]
        self._by_length = parameters.number("matchLengthWeight", 0.0, high=1.0)
        self._scale = parameters.whole("matchLengthScaleTokens", 8192)

    def score(self, cycle: Cycle) -> list[float]:
        match = self._producer.match(cycle)
        counts = [match.counts.get(backend.index, 0) for backend in cycle.backends]
        if self._producer.stretched:
            held = match.counts.values()
            least, most = min(held, default=0), max(held, default=0)
            if most == least:
                return [float(count > 0) for count in counts]
            return [max(count - least, 0) / (most - least) for count in counts]
        whole, by_length = match.total or 1, self._by_length
        if not by_length:
            return [count / whole for count in counts]
        lengths = [min(1.0, count * match.block_tokens / self._scale) for count in counts]
        return [
            by_length * length**2 + (1 - by_length) * count / whole
            for length, count in zip(lengths, counts, strict=True)
        ]


class SessionAffinityScorer:
    """1 for the endpoint that has the session."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._sessions = Sessions(plugin, setting)

    def score(self, cycle: Cycle) -> list[float]:
        home = self._sessions.home(cycle.request)
        return [float(backend.index == home) for backend in cycle.backends]

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        self._sessions.picked(cycle, backend)

    def ended(self, request: Request, index: int) -> None:
        self._sessions.ended(request, index)


class NoHitLruScorer:
    """Spreads requests that hit no prefix: endpoints that never had one first, then the one whose last was
    longest ago. 0.5 for all where a prefix was found: by the producer that it names, or up to v1.5 by the
    approximate index ``prefixPluginName`` where that was asked before."""

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

    def score(self, cycle: Cycle) -> list[float]:
        numbers = [backend.index for backend in cycle.backends]
        if not self._is_cold(cycle):
            return [0.5] * len(numbers)
        if len(numbers) == 1:
            return [1.0]
        never = [number for number in numbers if number not in self._last_cold]
        order = never + [number for number in self._last_cold if number in numbers]
        return [1.0 - order.index(number) / (len(numbers) - 1) for number in numbers]

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        if self._is_cold(cycle):
            self._last_cold[backend.index] = None
            self._last_cold.move_to_end(backend.index)
            if len(self._last_cold) > self._size:
                self._last_cold.popitem(last=False)


class LoraAffinityScorer:
    """0 for all: 1 for an active adapter, 0.8 for room for one more and 0.6 for a waiting one do not arise on
    servers without adapters, which have room for none."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        pass

    def score(self, cycle: Cycle) -> list[float]:
        return [0.0] * len(cycle.backends)


SCORERS: dict[str, Callable[[Plugin, Setting], Scorer]] = {
    "queue-scorer": QueueScorer,
    "kv-cache-utilization-scorer": KvCacheUtilizationScorer,
    "running-requests-size-scorer": RunningRequestsSizeScorer,
    "load-aware-scorer": LoadAwareScorer,
    "active-request-scorer": ActiveRequestScorer,
    "token-load-scorer": TokenLoadScorer,
    "prefix-cache-scorer": PrefixCacheScorer,
    "precise-prefix-cache-scorer": PrefixCacheScorer,
    "session-affinity-scorer": SessionAffinityScorer,
    "no-hit-lru-scorer": NoHitLruScorer,
    "lora-affinity-scorer": LoraAffinityScorer,
}
