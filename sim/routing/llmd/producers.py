"""llm-d's data producers: what the picker knows of prompts and of its own requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.kv_events import BlockRemoved, BlockStored
from servecast.sim.engine.request import Content, Request
from servecast.sim.routing.backends import Backend, Backends
from servecast.sim.routing.llmd.cycle import CHARACTERS, Cycle, PrefixMatch, Setting
from servecast.sim.routing.llmd.plugin import Plugin
from servecast.sim.routing.prefix_index import REMEMBERED, ApproximateIndex, PreciseIndex, TokenStore
from servecast.sim.routing.prompt_blocks import PromptBlocks
from servecast.sim.routing.tally import Tally


class ApproximatePrefixes:
    """Leading blocks of a prompt that were routed to each server before.

    Only so many leading blocks or tokens are looked at.
    """

    MODEL = -1  # stands for the model's name in front of the prompt
    stretched = False

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters, release = plugin.parameters, setting.release
        self._name, self._setting = plugin.name, setting
        self._model_entry = release.model_entry
        self._auto_tune = release.auto_tune and parameters.flag("autoTune", True)
        self._in_tokens = release.block_parameter == "blockSizeTokens"
        self._size = parameters.whole(release.block_parameter, release.default_block)
        if self._in_tokens and parameters.whole("blockSizeTokens", 0) <= 0:
            old = parameters.whole("blockSize", 0)
            self._in_tokens = not old or release.strict
            self._size = old or self._size
        self._tokens_looked_at = parameters.amount("maxPrefixTokensToMatch", release.prefix_tokens)
        most = parameters.amount("maxPrefixBlocksToMatch", 2048 if release.tokens else 256)
        self._blocks_looked_at = most if most > 0 else None if release.tokens else 256
        self._lru_size = parameters.whole("lruCapacityPerServer", 31250)
        self._blocks: PromptBlocks | None = None
        self._block_tokens = 0.0
        self._index = ApproximateIndex()

    def match(self, cycle: Cycle) -> PrefixMatch:
        found = cycle.matches.get(self._name)
        if found is None:
            blocks = self._of(cycle)
            found = PrefixMatch(self._index.match(blocks), len(blocks), self._block_tokens)
            cycle.matches[self._name] = found
        return found

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        size = backend.num_gpu_blocks if self._auto_tune else self._lru_size
        self._index.add(backend.index, self._of(cycle), size)

    def _of(self, cycle: Cycle) -> list[int]:
        if self._blocks is None:
            self._blocks = self._sized(cycle.backends[0].block_size)
        blocks = self._blocks.all(cycle.request)
        return [self.MODEL, *blocks] if blocks and self._model_entry else blocks

    def _sized(self, server_block: int) -> PromptBlocks:
        """Blocks of the size that is known with the first server."""
        release = self._setting.release
        in_tokens = self._in_tokens or self._auto_tune
        size = server_block if self._auto_tune else self._size
        if in_tokens:
            size = max(size, release.least_block)
        self._block_tokens = size if in_tokens else size / CHARACTERS
        limit: int | None = self._blocks_looked_at
        if self._tokens_looked_at > 0:
            limit = int(self._tokens_looked_at / self._block_tokens)
        if release.tokens and self._setting.exact_tokens:
            return PromptBlocks(size, 1.0, limit, partial=True)
        characters = size * CHARACTERS if in_tokens else size
        return PromptBlocks(characters, self._setting.bytes_per_token, limit, partial=release.tokens)


class PrecisePrefixes:
    """Leading KV blocks that the servers say they have.

    Up to v1.5 servers whose blocks are not those of the index never match; then, what they hold is counted in
    blocks of the index. With speculativeIndexing a prompt counts as cached where it was sent to, for a while.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters, release = plugin.parameters, setting.release
        self._name, self._setting = plugin.name, setting
        self.stretched = not release.producers
        indexer = parameters.block("indexerConfig")
        memory = indexer.block("kvBlockIndexConfig").block("inMemoryConfig")
        store = indexer.block("prefixStoreConfig")
        self._size = memory.whole("size", 100_000_000), memory.whole("podCacheSize", 10)
        places = [parameters.block("tokenProcessorConfig"), indexer.block("tokenProcessorConfig")]
        if not release.processor_beside:
            places.reverse()
        self._block_size = 16
        for place in reversed(places):
            for name in ("blockSize", "blockSizeTokens"):
                self._block_size = place.whole(name, self._block_size)
        self._indexes: dict[int, tuple[PreciseIndex, PromptBlocks]] = {}  # by the servers' block size
        self._chunk_size = store.whole("blockSize", 256)
        self._store = TokenStore(store.whole("cacheSize", 500_000))
        self._chunks = PromptBlocks(self._chunk_size, setting.bytes_per_token)
        self._kept: dict[Content, PrefixMatch] = {}
        self._backends = Backends([])
        self._block_sizes: dict[int, int] = {}  # of the servers that are listened to
        ttl_s = parameters.duration_s("speculativeTTL", "2s") or 2.0
        self._ttl_s = ttl_s if parameters.flag("speculativeIndexing", False) else None
        self._speculative: deque[tuple[float, int, int, list[int]]] = (
            deque()
        )  # until, block size, server, keys

    def connect(self, backends: Sequence[Backend]) -> None:
        anyhow, self._backends = self._setting.release.producers, Backends.of(backends)
        for backend in backends:
            size = backend.block_size
            if not anyhow and size != self._block_size:
                continue
            backend.subscribe()
            self._block_sizes[backend.index] = size
            self._indexes[size] = self._indexes.get(size) or (PreciseIndex(*self._size), PromptBlocks(size))

    def match(self, cycle: Cycle) -> PrefixMatch:
        found = cycle.matches.get(self._name)
        if found is None:
            found = cycle.matches[self._name] = self._look_up(cycle.request)
        return found

    def _look_up(self, request: Request) -> PrefixMatch:
        for backend in self._backends.telling():
            size = self._block_sizes.get(backend.index)
            if size is not None:
                for event in backend.take_events():
                    self._indexes[size][0].apply(backend.index, event)
        self._expire()
        known = self._known_tokens(request)
        counts: dict[int, int] = {}
        for size, (index, blocks) in self._indexes.items():
            held = index.match(blocks.shared(request), known // size)
            if size != self._block_size:
                held = {server: count * size // self._block_size for server, count in held.items()}
                held = {server: count for server, count in held.items() if count}
            counts = counts | held if counts else held
        total, key = request.prompt_tokens // self._block_size, request.content
        match = self._kept.get(key)
        if match is None or match.counts is not counts or match.total != total:
            if len(self._kept) >= REMEMBERED:
                self._kept.clear()
            match = self._kept[key] = PrefixMatch(counts, total, self._block_size)
        return match

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        if self._ttl_s is not None and backend.block_size in self._indexes:
            index, blocks = self._indexes[backend.block_size]
            keys = blocks.shared(cycle.request)
            index.expect(backend.index, BlockStored(tuple(keys)))
            until = self._setting.clock() + self._ttl_s
            self._speculative.append((until, backend.block_size, backend.index, keys))

    def _expire(self) -> None:
        while self._speculative and self._speculative[0][0] <= self._setting.clock():
            _until, size, server, keys = self._speculative.popleft()
            for key in keys:
                self._indexes[size][0].expect(server, BlockRemoved(key))

    def _known_tokens(self, request: Request) -> int:
        """Leading tokens of the prompt that it is scored on. The whole prompt is known to the next one."""
        if self._setting.release.producers:
            return request.prompt_tokens
        later, bytes_per_token = self._setting.release.tokenizes_later, self._setting.bytes_per_token
        chunks = self._chunks.all(request)
        known_bytes = self._store.known(chunks) * self._chunk_size
        whole_bytes = request.prompt_tokens * bytes_per_token
        if later or known_bytes < 0.8 * whole_bytes:
            self._store.add(chunks)
        if not later and known_bytes < 0.8 * whole_bytes:
            return request.prompt_tokens
        return int(known_bytes / bytes_per_token)


class InFlightLoad:
    """Requests sent and not ended, and their tokens: those of the prompt that the server had not cached,
    until the first token; with addEstimatedOutputTokens those of the output, too, until the end. A prefill
    server has the request until its first token."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._setting, self._prefixes = setting, plugin.prefixes
        self._with_output = parameters.flag("addEstimatedOutputTokens", False)
        self._ratio = parameters.number("outputRatio", 1.5)
        self._most_output = parameters.number("maxEstimatedOutputTokens", 1e12)
        self._requests, self._tokens = Tally(), Tally()
        self._added: dict[int, list[list[int]]] = {}  # request -> servers, its tokens there, prefill or not

    def requests(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._requests.of(numbers)

    def tokens(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._tokens.of(numbers)

    def uncached(self, cycle: Cycle) -> NDArray[np.int64]:
        return self._uncached(cycle, cycle.known.numbers)

    def _uncached(self, cycle: Cycle, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        tokens = self._setting.prompt_tokens(cycle.request)
        found = np.full(len(numbers), tokens)
        if self._prefixes:
            match = self._setting.prefixes[self._prefixes].match(cycle)
            looked_at = int(match.total * match.block_tokens)
            new = ((match.total - match.of(numbers)) * match.block_tokens).astype(np.int64)
            found = new + max(tokens - looked_at, 0)
        if self._with_output:
            found += int(min(round(tokens * self._ratio), cycle.request.max_tokens, self._most_output))
        return found

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        index = backend.index
        tokens = int(self._uncached(cycle, np.array([index]))[0])
        self._requests.add(index, 1)
        self._tokens.add(index, tokens)
        entry = [index, tokens, int(backend.role == "prefill")]
        self._added.setdefault(cycle.request.request_id, []).append(entry)

    def answered(self, request: Request, index: int) -> None:
        added = self._added.get(request.request_id)
        for entry in added or ():
            where, tokens, prefill = entry
            if prefill or not self._with_output:
                self._tokens.add(where, -tokens)
                entry[1] = 0
            if prefill:
                self._requests.add(where, -1)
        if added is not None:
            self._added[request.request_id] = [entry for entry in added if not entry[2]]

    def ended(self, request: Request, index: int) -> None:
        for where, tokens, _ in self._added.pop(request.request_id, ()):
            self._tokens.add(where, -tokens)
            self._requests.add(where, -1)


PREFIXES: dict[str, Callable[[Plugin, Setting], ApproximatePrefixes | PrecisePrefixes]] = {
    "approx-prefix-cache-producer": ApproximatePrefixes,
    "precise-prefix-cache-producer": PrecisePrefixes,
}
