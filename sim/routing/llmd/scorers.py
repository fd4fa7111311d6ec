"""llm-d's scorers: how good each endpoint is for a request, each in its own words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.routing.gauges import Gauges
from servecast.sim.routing.llmd.config import Plugin
from servecast.sim.routing.llmd.release import EppRelease
from servecast.sim.routing.prefix_index import ApproximateIndex, PreciseIndex, TokenStore
from servecast.sim.routing.prompt_blocks import PromptBlocks
from servecast.sim.routing.routers import Backend


@dataclass(slots=True)
class Cycle:
    """One scheduling cycle: a request, its candidates and one snapshot of their gauges, which all scorers
    see. matched: by plugin name, what the approximate prefix index found (see ``NoHitLruScorer``)."""

    request: Request
    backends: Sequence[Backend]
    gauges: list[Gauges]
    matched: dict[str, dict[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """What plugins may use. clock: simulated seconds."""

    release: EppRelease
    bytes_per_token: float
    rng: np.random.Generator
    clock: Callable[[], float]


class Scorer(Protocol):
    """Scores the candidates of a cycle."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        """A score for each candidate, in their order; 0 for one of which it knows nothing."""
        ...


@runtime_checkable
class HearsPicks(Protocol):
    """A scorer that learns where requests go."""

    def picked(self, cycle: Cycle, backend: Backend) -> None: ...


@runtime_checkable
class HearsEnds(Protocol):
    """A scorer that learns when requests end."""

    def ended(self, request: Request, index: int) -> None: ...


@runtime_checkable
class Connects(Protocol):
    """A scorer that listens to the servers' KV events."""

    def connect(self, backends: Sequence[Backend]) -> None: ...


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

    Ones that were sent longer ago than requestTimeout no longer count.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._timeout_s = plugin.parameters.duration_s("requestTimeout", "2m")
        self._clock = setting.clock
        self._sent: OrderedDict[int, tuple[float, int]] = OrderedDict()  # request -> when, to which replica
        self._counts: dict[int, int] = {}

    def score(self, cycle: Cycle) -> list[float]:
        self._expire()
        most = max(self._counts.values(), default=0)
        counts = (self._counts.get(backend.index, 0) for backend in cycle.backends)
        return [(most - count) / most if count else 1.0 for count in counts]

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


class PrefixCacheScorer:
    """Share of the prompt's leading blocks of bytes that were routed to the endpoint before.

    Only the first hashBlockSize x maxPrefixBlocksToMatch bytes are looked at.
    """

    MODEL = -1  # stands for the model's name in front of the prompt

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters, release = plugin.parameters, setting.release
        self._name = plugin.name
        self._model_entry = release.model_entry
        self._auto_tune = release.auto_tune and parameters.flag("autoTune", True)
        self._block_size = parameters.whole("blockSize" if release.auto_tune else "hashBlockSize", 64)
        self._limit = parameters.whole("maxPrefixBlocksToMatch", 256)
        self._lru_size = parameters.whole("lruCapacityPerServer", 31250)
        self._bytes_per_token = setting.bytes_per_token
        self._blocks: PromptBlocks | None = None
        self._index = ApproximateIndex()

    def score(self, cycle: Cycle) -> list[float]:
        blocks = self._of(cycle)
        counts = cycle.matched[self._name] = self._index.match(blocks)
        return [counts.get(backend.index, 0) / (len(blocks) or 1) for backend in cycle.backends]

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        size = backend.num_gpu_blocks if self._auto_tune else self._lru_size
        self._index.add(backend.index, self._of(cycle), size)

    def _of(self, cycle: Cycle) -> list[int]:
        if self._blocks is None:
            size = 4 * cycle.backends[0].block_size if self._auto_tune else self._block_size
            self._blocks = PromptBlocks(size, self._bytes_per_token, self._limit)
        blocks = self._blocks.all(cycle.request)
        return [self.MODEL, *blocks] if blocks and self._model_entry else blocks


class PrecisePrefixCacheScorer:
    """Leading KV blocks that the endpoint says it has, stretched to 0..1 over the endpoints that have any.

    Blocks are those of tokenProcessorConfig.blockSize; servers with another block size never match.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        indexer = plugin.parameters.block("indexerConfig")
        memory = indexer.block("kvBlockIndexConfig").block("inMemoryConfig")
        store = indexer.block("prefixStoreConfig")
        self._block_size = indexer.block("tokenProcessorConfig").whole("blockSize", 16)
        self._index = PreciseIndex(memory.whole("size", 100_000_000), memory.whole("podCacheSize", 10))
        self._chunk_size = store.whole("blockSize", 256)
        self._store = TokenStore(store.whole("cacheSize", 500_000))
        self._chunks = PromptBlocks(self._chunk_size, setting.bytes_per_token)
        self._blocks = PromptBlocks(self._block_size)
        self._bytes_per_token = setting.bytes_per_token
        self._later = setting.release.tokenizes_later
        self._sources: list[Backend] = []

    def connect(self, backends: Sequence[Backend]) -> None:
        self._sources = [backend for backend in backends if backend.block_size == self._block_size]
        for backend in self._sources:
            backend.subscribe()

    def score(self, cycle: Cycle) -> list[float]:
        for backend in self._sources:
            for event in backend.take_events():
                self._index.apply(backend.index, event)
        request = cycle.request
        keys = self._blocks.shared(request)
        counts = self._index.match(keys[: self._known_tokens(request) // self._block_size])
        if not counts:
            return [0.0] * len(cycle.backends)
        least, most = min(counts.values()), max(counts.values())
        stretched = {
            server: (count - least) / (most - least) if most > least else 1.0
            for server, count in counts.items()
        }
        return [stretched.get(backend.index, 0.0) for backend in cycle.backends]

    def _known_tokens(self, request: Request) -> int:
        """Leading tokens of the prompt that it is scored on. The whole prompt is known to the next one."""
        chunks = self._chunks.all(request)
        known_bytes = self._store.known(chunks) * self._chunk_size
        whole_bytes = request.prompt_tokens * self._bytes_per_token
        if self._later or known_bytes < 0.8 * whole_bytes:
            self._store.add(chunks)
        if not self._later and known_bytes < 0.8 * whole_bytes:
            return request.prompt_tokens
        return int(known_bytes / self._bytes_per_token)


class SessionAffinityScorer:
    """1 for the endpoint that answered the session's last request (``Request.group`` is the session)."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._answered: dict[int, int] = {}

    def score(self, cycle: Cycle) -> list[float]:
        home = None if cycle.request.group is None else self._answered.get(cycle.request.group)
        return [float(backend.index == home) for backend in cycle.backends]

    def ended(self, request: Request, index: int) -> None:
        if request.group is not None:
            self._answered[request.group] = index


class NoHitLruScorer:
    """Spreads requests that hit no prefix: endpoints that never had one first, then the one whose last was
    longest ago. 0.5 for all where the approximate index (``prefixPluginName``) found the prefix."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._prefix_plugin = plugin.parameters.text("prefixPluginName", "prefix-cache-scorer")
        self._size = plugin.parameters.whole("lruSize", 1024)
        self._last_cold: OrderedDict[int, None] = OrderedDict()  # endpoints, oldest first

    def _is_cold(self, cycle: Cycle) -> bool:
        return not cycle.matched.get(self._prefix_plugin)

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
    "prefix-cache-scorer": PrefixCacheScorer,
    "precise-prefix-cache-scorer": PrecisePrefixCacheScorer,
    "session-affinity-scorer": SessionAffinityScorer,
    "no-hit-lru-scorer": NoHitLruScorer,
    "lora-affinity-scorer": LoraAffinityScorer,
}
