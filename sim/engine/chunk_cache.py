"""The chunks of KV cache that lie in host memory, and which of them make room (vLLM's CPUOffloadingManager).

The policies are those of ``vllm/v1/kv_offload/cpu/policies``: least recently used, and ARC (Megiddo and Modha
2003). What counts as a use differs between releases (``OffloadingRules``).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from servecast.sim.engine.offloading_rules import OffloadingRules

Policy = Literal["lru", "arc"]


@dataclass(slots=True)
class Accesses:
    """What one request did with chunks; keys by their place in its tokens. rank: that all its chunks have
    until it ends, from its first use of one on; 0: none yet."""

    places: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    inserted: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)
    rank: int = 0

    def note(self, keys: Iterable[int], *, reused: Iterable[int] = ()) -> list[int]:
        """Chunks that it uses. Returns those that are new to it."""
        new = [key for key in keys if key not in self.seen]
        self.seen.update(new)
        self.reused.update(key for key in reused if key not in self.inserted)
        return new

    def tail_first(self) -> list[int]:
        return sorted(self.seen, key=self.places.__getitem__, reverse=True)


class LeastRecentlyUsed:
    """Chunks in the order of their use: by rank, and within that of a request its last tokens first.

    The heap has an entry for each rank that a chunk got; all but its newest are void.
    """

    def __init__(self, capacity: int, rules: OffloadingRules) -> None:
        self.rules, self.newest = rules, 0
        self.ranks: dict[int, tuple[int, int]] = {}
        self.heap: list[tuple[tuple[int, int], int]] = []

    def _rank(self, key: int, rank: tuple[int, int]) -> None:
        self.ranks[key] = rank
        heapq.heappush(self.heap, (rank, key))
        if len(self.heap) > 64 + 4 * len(self.ranks):
            self.heap = [(rank, key) for key, rank in self.ranks.items()]
            heapq.heapify(self.heap)

    def _use(self, keys: Iterable[int]) -> None:
        for key in keys:
            if key in self.ranks:
                self.newest += 1
                self._rank(key, (self.newest, 0))

    def _of_request(self, key: int, accesses: Accesses) -> tuple[int, int]:
        if not accesses.rank:
            self.newest += 1
            accesses.rank = self.newest
        return accesses.rank, -accesses.places[key]

    def insert(self, key: int, accesses: Accesses) -> None:
        if self.rules.ranks_by_request:
            self._rank(key, self._of_request(key, accesses))
            return
        self.newest += 1
        self._rank(key, (self.newest, 0))

    def on_access(self, keys: Sequence[int], accesses: Accesses) -> None:
        """A request uses these for the first time."""
        for key in keys if self.rules.ranks_by_request else ():
            rank = self._of_request(key, accesses)
            if key in self.ranks and self.ranks[key] < rank:
                self._rank(key, rank)

    def on_store_miss(self, keys: Sequence[int]) -> None:
        pass

    def on_request_finished(self, accesses: Accesses) -> None:
        self._use(accesses.tail_first())

    def touch(self, keys: Sequence[int], pins: Mapping[int, int]) -> None:
        idle_only = self.rules.orders_idle
        self._use(key for key in reversed(keys) if not idle_only or pins.get(key) == 0)

    def on_idle(self, key: int) -> None:
        """Its transfers are over."""
        if self.rules.orders_idle:
            self._use((key,))

    def victims(self, count: int, idle: set[int], protected: set[int]) -> list[int] | None:
        found: list[int] = []
        kept: list[tuple[tuple[int, int], int]] = []
        while self.heap and len(found) < count:
            entry = heapq.heappop(self.heap)
            if self.ranks.get(entry[1]) != entry[0]:
                continue
            kept.append(entry)
            if entry[1] in idle and entry[1] not in protected:
                found.append(entry[1])
        if len(found) == count:
            for key in found:
                del self.ranks[key]
        for entry in kept:
            if entry[1] in self.ranks:
                heapq.heappush(self.heap, entry)
        return found if len(found) == count else None


class AdaptiveReplacement:
    """Chunks used once (t1) and again (t2), with ghosts of those that were evicted (b1, b2)."""

    def __init__(self, capacity: int, rules: OffloadingRules) -> None:
        self.capacity, self.target, self.rules = capacity, 0.0, rules
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int, accesses: Accesses) -> None:
        self.t1[key] = None
        self.b1.pop(key, None)
        self.b2.pop(key, None)

    def on_access(self, keys: Sequence[int], accesses: Accesses) -> None:
        pass

    def on_idle(self, key: int) -> None:
        pass

    def touch(self, keys: Sequence[int], pins: Mapping[int, int]) -> None:
        for key in reversed(keys):
            if key in self.t1 and pins[key] < 0:
                self.t1.move_to_end(key)
            elif key in self.t1:
                self.t2[key] = self.t1.pop(key)
            elif key in self.t2:
                self.t2.move_to_end(key)
            else:
                self.on_store_miss((key,))

    def on_store_miss(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            if key in self.b1:
                self.target = min(self.target + max(1, len(self.b2) / len(self.b1)), self.capacity)
                self.b1.move_to_end(key)
            elif key in self.b2:
                self.target = max(self.target - max(1, len(self.b1) / len(self.b2)), 0)
                self.b2.move_to_end(key)

    def on_request_finished(self, accesses: Accesses) -> None:
        for key in accesses.tail_first():
            if key in accesses.inserted and key not in accesses.reused:
                if key in self.t1:
                    self.t1.move_to_end(key)
                elif key in self.t2:
                    self.t2.move_to_end(key)
            elif key in accesses.reused and key in self.t1:
                self.t2[key] = self.t1.pop(key)
            elif key in accesses.reused and key in self.t2:
                self.t2.move_to_end(key)

    def victims(self, count: int, idle: set[int], protected: set[int]) -> list[int] | None:
        once = (key for key in self.t1 if key in idle and key not in protected)
        again = (key for key in self.t2 if key in idle and key not in protected)
        left, found = len(self.t1), list[int]()
        for _ in range(count):
            key = next(once, None) if left >= int(self.target) else None
            left -= key is not None
            if key is None:
                key = next(again, None)
            if key is None and self.rules.arc_takes_recent:
                key = next(once, None)
                left -= 1
            if key is None:
                return None
            found.append(key)
        for key in found:
            if key in self.t1:
                del self.t1[key]
                self.b1[key] = None
            else:
                del self.t2[key]
                self.b2[key] = None
        for ghosts in (self.b1, self.b2):
            while len(ghosts) > self.capacity:
                ghosts.popitem(last=False)
        return found


class ChunkCache:
    """Chunks in host memory, by key.

    Args:
        capacity: chunks. policy: who makes room. store_threshold: a chunk is stored when it has been offered,
            or looked up, so often; tracked: chunks that this is remembered of.
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy,
        rules: OffloadingRules,
        *,
        store_threshold: int = 1,
        tracked: int = 64_000,
    ) -> None:
        self.capacity, self.rules = capacity, rules
        self.store_threshold, self.tracked = store_threshold, tracked
        self.policy = (AdaptiveReplacement if policy == "arc" else LeastRecentlyUsed)(capacity, rules)
        self.pins: dict[int, int] = {}  # transfers that read a chunk; -1: it is being written
        self.idle: set[int] = set()
        self.evictions = 0
        self.offers: OrderedDict[int, int] = OrderedDict()

    def lookup(self, key: int) -> bool | None:
        """Whether it is there; None: it is being written."""
        if self.rules.counts_lookups and self.store_threshold > 1:
            self._count_offers((key,))
        pins = self.pins.get(key)
        return None if pins == -1 else pins is not None

    def touch(self, keys: Sequence[int]) -> None:
        """They are used, the first of them last."""
        if self.rules.touches:
            self.policy.touch(keys, self.pins)

    def prepare_load(self, keys: Sequence[int], accesses: Accesses) -> None:
        """These are read from now on."""
        for key in keys:
            self.pins[key] += 1
            self.idle.discard(key)
        self.policy.on_access(accesses.note(keys, reused=keys), accesses)

    def complete_load(self, keys: Iterable[int]) -> None:
        for key in keys:
            self.pins[key] -= 1
            if not self.pins[key]:
                self._rests(key)

    def _rests(self, key: int) -> None:
        self.idle.add(key)
        self.policy.on_idle(key)

    def prepare_store(self, keys: Sequence[int], accesses: Accesses) -> list[int] | None:
        """Which of them are written from now on; None: there is no room for all of those, and none is."""
        by_lookups = self.rules.counts_lookups
        if self.store_threshold > 1 and by_lookups:
            keys = [key for key in keys if self.offers.get(key, 0) >= self.store_threshold]
        elif self.store_threshold > 1:
            self._count_offers(keys)
        new = [key for key in keys if key not in self.pins]
        ready = [key for key in keys if self.pins.get(key, -1) >= 0]
        if self.store_threshold > 1:
            new = [key for key in new if self.offers.get(key, 0) >= self.store_threshold]
        if not self.rules.touches:
            missed = [key for key in new if key not in accesses.missed]
            if missed:
                self.policy.on_store_miss(missed)
                accesses.missed.update(missed)
            used = set(new).union(ready)
            firsts = accesses.note([key for key in keys if key in used], reused=ready)
            if firsts:
                self.policy.on_access(firsts, accesses)
        more = len(new) - (self.capacity - len(self.pins))
        if new and more > 0:
            victims = self.policy.victims(more, self.idle, set(keys)) if more <= len(self.idle) else None
            if victims is None:
                return None
            self.evictions += len(victims)
            for key in victims:
                del self.pins[key]
                self.idle.discard(key)
        for key in new:
            self.policy.insert(key, accesses)
            self.pins[key] = -1
        accesses.inserted.update(new)
        return new

    def _count_offers(self, keys: Sequence[int]) -> None:
        """vLLM's _record_accesses: an offer pushes none of its own chunks out of the count."""
        known = {key for key in keys if key in self.offers}
        for key in keys:
            if key in known:
                self.offers.move_to_end(key)
                self.offers[key] += 1
        others = len(self.offers) - len(known)
        for key in keys:
            if key in self.offers:
                continue
            if len(self.offers) >= self.tracked:
                if not others:
                    continue
                self.offers.popitem(last=False)
                others -= 1
            self.offers[key] = 1

    def complete_store(self, keys: Iterable[int]) -> None:
        for key in keys:
            if self.pins.get(key) == -1:
                self.pins[key] = 0
                self._rests(key)

    def on_request_finished(self, accesses: Accesses) -> None:
        """A request has ended: its chunks are the ones used last, its first one the last of them."""
        if not self.rules.touches:
            self.policy.on_request_finished(accesses)
