"""The chunks of KV cache that lie in host memory, and which of them make room (vLLM's CPUOffloadingManager).

The policies are those of ``vllm/v1/kv_offload/cpu/policies``: least recently used, and ARC (Megiddo and Modha
2003), both with the recency that requests give their chunks when they end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["lru", "arc"]


@dataclass(slots=True)
class Accesses:
    """What one request did with chunks; keys by their place in its tokens."""

    places: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    inserted: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)

    def note(self, keys: Iterable[int], *, reused: Iterable[int] = ()) -> None:
        self.seen.update(keys)
        self.reused.update(key for key in reused if key not in self.inserted)

    def tail_first(self) -> list[int]:
        return sorted(self.seen, key=self.places.__getitem__, reverse=True)


class LeastRecentlyUsed:
    """Chunks in the order of their use; a pinned one keeps its place."""

    def __init__(self, capacity: int) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int) -> None:
        self.order[key] = None

    def on_store_miss(self, keys: Sequence[int]) -> None:
        pass

    def on_request_finished(self, accesses: Accesses) -> None:
        for key in accesses.tail_first():
            if key in self.order:
                self.order.move_to_end(key)

    def victims(self, count: int, idle: set[int], protected: set[int]) -> list[int] | None:
        found: list[int] = []
        for key in self.order:
            if len(found) == count:
                break
            if key in idle and key not in protected:
                found.append(key)
        if len(found) < count:
            return None
        for key in found:
            del self.order[key]
        return found


class AdaptiveReplacement:
    """Chunks used once (t1) and again (t2), with ghosts of those that were evicted (b1, b2)."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.target = capacity, 0.0
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int) -> None:
        self.t1[key] = None
        self.b1.pop(key, None)
        self.b2.pop(key, None)

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
            if key is None:
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
        capacity: chunks. policy: who makes room. store_threshold: a chunk is stored when it has been offered
        so
            often; tracked: offers that are remembered, of different chunks.
    """

    def __init__(self, capacity: int, policy: Policy = "lru", store_threshold: int = 1) -> None:
        self.capacity, self.store_threshold, self.tracked = capacity, store_threshold, 64_000
        self.policy = (AdaptiveReplacement if policy == "arc" else LeastRecentlyUsed)(capacity)
        self.pins: dict[int, int] = {}  # transfers that read a chunk; -1: it is being written
        self.idle: set[int] = set()
        self.evictions = 0
        self.offers: OrderedDict[int, int] = OrderedDict()

    def lookup(self, key: int) -> bool | None:
        """Whether it is there; None: it is being written."""
        pins = self.pins.get(key)
        return None if pins == -1 else pins is not None

    def prepare_load(self, keys: Sequence[int], accesses: Accesses) -> None:
        """These are read from now on."""
        for key in keys:
            self.pins[key] += 1
            self.idle.discard(key)
        accesses.note(keys, reused=keys)

    def complete_load(self, keys: Iterable[int]) -> None:
        for key in keys:
            self.pins[key] -= 1
            if not self.pins[key]:
                self.idle.add(key)

    def prepare_store(self, keys: Sequence[int], accesses: Accesses) -> list[int] | None:
        """Which of them are written from now on; None: there is no room for all of those, and none is."""
        if self.store_threshold > 1:
            self._count_offers(keys)
        new = [key for key in keys if key not in self.pins]
        ready = [key for key in keys if self.pins.get(key, -1) >= 0]
        if self.store_threshold > 1:
            new = [key for key in new if self.offers.get(key, 0) >= self.store_threshold]
        missed = [key for key in new if key not in accesses.missed]
        if missed:
            self.policy.on_store_miss(missed)
            accesses.missed.update(missed)
        accesses.note([*new, *ready], reused=ready)
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
            self.policy.insert(key)
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
                self.idle.add(key)

    def on_request_finished(self, accesses: Accesses) -> None:
        """A request has ended: its chunks are the ones used last, its first one the last of them."""
        self.policy.on_request_finished(accesses)
