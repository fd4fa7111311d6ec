"""What a router remembers of the prompts that the servers have cached: guessed, or told by the servers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set

from servecast.sim.engine.kv_events import BLOCKS_PER_CONTENT, BlockStored, KVEvent

REMEMBERED = 4096  # different prompts


def content_of(key: int) -> int:
    """The content that a block belongs to."""
    return key // (2 * BLOCKS_PER_CONTENT)


class Lru:
    """The ``size`` keys that were added last."""

    __slots__ = ("_keys", "_size")

    def __init__(self, size: int) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()
        self._size = size

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def add(self, key: int) -> int | None:
        """Add or renew a key. Returns the one that falls out, if any."""
        keys = self._keys
        if key in keys:
            keys.move_to_end(key)
            return None
        keys[key] = None
        return keys.popitem(last=False)[0] if len(keys) > self._size else None


class ApproximateIndex:
    """Blocks of the prompts that were routed to each server, the least recently routed forgotten first.

    It never hears what the servers evict (llm-d's prefix-cache-scorer).
    """

    def __init__(self) -> None:
        self._servers: dict[int, dict[int, None]] = {}  # block -> servers
        self._known: dict[int, Lru] = {}  # server -> its blocks

    def match(self, blocks: Sequence[int]) -> dict[int, int]:
        """Blocks of the prompt that each server has, counted up to the first one that no server has."""
        counts: dict[int, int] = {}
        servers = self._servers
        for block in blocks:
            holders = servers.get(block)
            if not holders:
                break
            for server in holders:
                counts[server] = counts.get(server, 0) + 1
        return counts

    def add(self, server: int, blocks: Sequence[int], size: int) -> None:
        """A prompt of these blocks has been routed to a server. size: blocks remembered for it, as of its
        first prompt."""
        known, servers = self._known.setdefault(server, Lru(size)), self._servers
        for block in blocks:
            if block in servers:
                servers[block][server] = None
            else:
                servers[block] = {server: None}
            gone = known.add(block)
            if gone is not None:
                del servers[gone][server]
                if not servers[gone]:
                    del servers[gone]


class PreciseIndex:
    """Blocks that each server says it has cached (llm-d's KV cache indexer, in memory).

    Args:
        size: blocks remembered, the least recently stored forgotten first.
        pods: servers remembered for a block, the least recently added forgotten first.
    """

    def __init__(self, size: int = 100_000_000, pods: int = 10) -> None:
        self._size, self._pods = size, pods
        self._servers: OrderedDict[int, dict[int, None]] = OrderedDict()  # block -> servers
        self._expects = False
        self._version = 0
        self._changed: dict[int, int] = {}  # content -> version in which a block of it came or went
        self._found: dict[
            int, tuple[int, tuple[int, ...], dict[int, int]]
        ] = {}  # last key -> as of when, contents

    def expect(self, server: int, event: KVEvent) -> None:
        """An event that a server is expected to tell soon: it counts as its own, and is undone apart."""
        self._expects = True
        self.apply(~server, event)

    def apply(self, server: int, event: KVEvent) -> None:
        """An event of a server."""
        self._version += 1
        if isinstance(event, BlockStored):
            for key in event.keys:
                self._add(server, key)
            return
        holders = self._servers.get(event.key)
        if holders is not None:
            self._changed[content_of(event.key)] = self._version
            holders.pop(server, None)
            if not holders:
                del self._servers[event.key]

    def _add(self, server: int, key: int) -> None:
        holders = self._servers.get(key)
        self._changed[content_of(key)] = self._version
        if holders is None:
            self._servers[key] = {server: None}
            if len(self._servers) > self._size:
                gone, _holders = self._servers.popitem(last=False)
                self._changed[content_of(gone)] = self._version
            return
        self._servers.move_to_end(key)
        holders.pop(server, None)
        holders[server] = None
        if len(holders) > self._pods:
            del holders[next(iter(holders))]

    def match(self, keys: Sequence[int], limit: int) -> dict[int, int]:
        """How many of the first ``limit`` blocks, from the first on, each server has without a gap; those
        with none are left out. Not to be changed: it is remembered until a block of these contents comes or
        goes."""
        keys = keys if limit >= len(keys) else keys[:limit]
        if not keys:
            return {}
        last = keys[-1]  # a block stands for all before it, too
        if last in self._found:
            version, contents, counts = self._found[last]
            changed = self._changed.get
            if version == self._version:
                return counts
            if all(changed(each, 0) <= version for each in contents):
                self._found[last] = self._version, contents, counts
                return counts
        counts = self._count(keys)
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        self._found[last] = self._version, tuple(dict.fromkeys(map(content_of, keys))), counts
        return counts

    def _count(self, keys: Sequence[int]) -> dict[int, int]:
        counts: dict[int, int] = {}
        active: set[int] = set()
        reached = 0
        find = self._servers.get
        for key in keys:
            holders = find(key)
            if holders is None:
                break
            servers: Set[int] = holders.keys()
            if self._expects:
                servers = {max(server, ~server) for server in holders}
            if not reached:
                active = set(servers)
            elif not servers >= active:
                counts |= dict.fromkeys(active - servers, reached)
                active &= servers
                if not active:
                    break
            reached += 1
        return counts | dict.fromkeys(active, reached)


class TokenStore:
    """Which leading chunks of text were tokenized before, the least recently used forgotten first."""

    def __init__(self, size: int) -> None:
        self._chunks = Lru(size)

    def known(self, chunks: Sequence[int]) -> int:
        """How many leading chunks of a text were tokenized before."""
        for number, chunk in enumerate(chunks):
            if chunk not in self._chunks:
                return number
            self._chunks.add(chunk)
        return len(chunks)

    def add(self, chunks: Sequence[int]) -> None:
        """A text has been tokenized."""
        for chunk in chunks:
            self._chunks.add(chunk)
