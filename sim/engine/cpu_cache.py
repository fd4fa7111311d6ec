"""Chunks of KV cache in host memory: what vLLM's CPUOffloadingManager keeps, and what it lets go.

Followed: ``vllm/v1/kv_offload/cpu/manager.py`` and ``policies`` of 0.32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

BEING_STORED = -1  # readers of a chunk that is not there yet


@dataclass(slots=True)
class Access:
    """What a request has seen of the cache: its chunks with their places, those that it brought, those that
    it found, and those that it has asked for in vain."""

    places: dict[int, int] = field(default_factory=dict)
    inserted: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)

    def see(self, keys: Iterable[int], places: dict[int, int]) -> None:
        for key in keys:
            self.places.setdefault(key, places[key])


class Policy(Protocol):
    """Which chunks are there, by key to their readers, and which go first."""

    def get(self, key: int) -> int | None: ...

    def set(self, key: int, readers: int) -> None:
        """A chunk that is there has so many readers."""
        ...

    def insert(self, key: int) -> None:
        """One is being stored."""
        ...

    def missed(self, keys: Sequence[int]) -> None:
        """They are about to be stored."""
        ...

    def finished(self, keys: Sequence[int], access: Access) -> None:
        """A request ends that has seen them, from the head of its prompt on."""
        ...

    def evict(self, count: int, protected: Collection[int]) -> bool:
        """Let so many go, without readers and none of the ``protected``; all or none."""
        ...

    def __len__(self) -> int: ...


class Lru:
    """The least recently used goes first. A use is to be stored, and the end of a request that saw it."""

    def __init__(self, capacity: int) -> None:
        self._readers: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._readers)

    def get(self, key: int) -> int | None:
        return self._readers.get(key)

    def set(self, key: int, readers: int) -> None:
        self._readers[key] = readers

    def insert(self, key: int) -> None:
        self._readers[key] = BEING_STORED

    def missed(self, keys: Sequence[int]) -> None:
        """Teaches it nothing."""

    def finished(self, keys: Sequence[int], access: Access) -> None:
        for key in reversed(keys):
            if key in self._readers:
                self._readers.move_to_end(key)

    def evict(self, count: int, protected: Collection[int]) -> bool:
        found: list[int] = []
        for key, readers in self._readers.items():
            if len(found) == count:
                break
            if readers == 0 and key not in protected:
                found.append(key)
        if len(found) < count:
            return False
        for key in found:
            del self._readers[key]
        return True


class Arc:
    """Adaptive: what was used once and what was used more than once share the space by what turns out to be
    missed."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._once: OrderedDict[int, int] = OrderedDict()
        self._often: OrderedDict[int, int] = OrderedDict()
        self._once_gone: OrderedDict[int, None] = OrderedDict()
        self._often_gone: OrderedDict[int, None] = OrderedDict()
        self._target = 0.0  # chunks that those used once may have

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def get(self, key: int) -> int | None:
        return self._once[key] if key in self._once else self._often.get(key)

    def set(self, key: int, readers: int) -> None:
        (self._once if key in self._once else self._often)[key] = readers

    def insert(self, key: int) -> None:
        self._once[key] = BEING_STORED
        self._once_gone.pop(key, None)
        self._often_gone.pop(key, None)

    def missed(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            once, often = len(self._once_gone), len(self._often_gone)
            if key in self._once_gone:
                self._target = min(self._target + max(1, often / once), self._capacity)
                self._once_gone.move_to_end(key)
            elif key in self._often_gone:
                self._target = max(self._target - max(1, once / often), 0)
                self._often_gone.move_to_end(key)

    def finished(self, keys: Sequence[int], access: Access) -> None:
        for key in reversed(keys):
            own = key in access.inserted and key not in access.reused  # a store is not a second use
            if key in self._once and own:
                self._once.move_to_end(key)
            elif key in self._once and key in access.reused:
                self._often[key] = self._once.pop(key)
            elif key in self._often and (own or key in access.reused):
                self._often.move_to_end(key)

    def evict(self, count: int, protected: Collection[int]) -> bool:
        def idle(entries: OrderedDict[int, int]) -> Iterable[int]:
            return (key for key, readers in entries.items() if readers == 0 and key not in protected)

        once, often = iter(idle(self._once)), iter(idle(self._often))
        left, found = len(self._once), list[tuple[int, bool]]()
        for _ in range(count):
            key = next(once, None) if left >= int(self._target) else None
            came_once = key is not None
            if key is None:
                key = next(often, None)
            if key is None:
                key = next(once, None)
                came_once = key is not None
            if key is None:
                return False
            left -= came_once
            found.append((key, came_once))
        for key, came_once in found:
            del (self._once if came_once else self._often)[key]
            (self._once_gone if came_once else self._often_gone)[key] = None
        for gone in (self._once_gone, self._often_gone):
            while len(gone) > self._capacity:
                gone.popitem(last=False)
        return True


POLICIES = {"lru": Lru, "arc": Arc}


class CpuCache:
    """vLLM's CPUOffloadingManager.

    Args:
        capacity: chunks. policy: ``eviction_policy``. store_threshold: how often a chunk has to be offered
            before it is stored. max_tracker_size: chunks that are counted for that.

    Attributes:
        evictions: chunks that made room. failures: stores that found none.
    """

    def __init__(
        self, capacity: int, policy: str = "lru", store_threshold: int = 0, max_tracker_size: int = 64_000
    ) -> None:
        self.capacity = capacity
        self.evictions = self.failures = 0
        self._policy: Policy = POLICIES[policy](capacity)
        self._threshold, self._tracked = store_threshold, max_tracker_size
        self._offers: OrderedDict[int, int] = OrderedDict()
        self._idle = 0

    def __len__(self) -> int:
        return len(self._policy)

    def lookup(self, key: int) -> bool | None:
        """Whether a chunk is there; None: it is being stored."""
        readers = self._policy.get(key)
        return False if readers is None else None if readers == BEING_STORED else True

    def load(self, keys: Sequence[int], places: dict[int, int], access: Access) -> None:
        """Chunks are read, and stay until they were."""
        for key in keys:
            readers = self._policy.get(key)
            assert readers is not None
            assert readers >= 0
            self._idle -= readers == 0
            self._policy.set(key, readers + 1)
        access.see(keys, places)
        access.reused.update(key for key in keys if key not in access.inserted)

    def loaded(self, keys: Iterable[int]) -> None:
        for key in keys:
            readers = self._policy.get(key)
            assert readers is not None
            assert readers > 0
            self._policy.set(key, readers - 1)
            self._idle += readers == 1

    def store(self, keys: Sequence[int], places: dict[int, int], access: Access) -> list[int] | None:
        """Chunks are offered: those of them that are stored. None where they find no room: then none is."""
        if self._threshold >= 2:
            self._count(keys)
        new = [key for key in keys if self._policy.get(key) is None]
        there = [key for key in keys if (self._policy.get(key) or 0) >= 0 and key not in new]
        if self._threshold >= 2:
            new = [key for key in new if self._offers.get(key, 0) >= self._threshold]
        if missed := [key for key in new if key not in access.missed]:
            self._policy.missed(missed)
            access.missed.update(missed)
        seen = {*new, *there}
        access.see((key for key in keys if key in seen), places)
        access.reused.update(key for key in there if key not in access.inserted)
        too_many = len(new) - (self.capacity - len(self._policy))
        if new and too_many > 0:
            if too_many > self._idle or not self._policy.evict(too_many, set(keys)):
                self.failures += 1
                return None
            self._idle -= too_many
            self.evictions += too_many
        for key in new:
            self._policy.insert(key)
        access.inserted.update(new)
        return new

    def stored(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._policy.set(key, 0)
            self._idle += 1

    def finished(self, access: Access) -> None:
        """A request ends."""
        self._policy.finished(sorted(access.places, key=access.places.__getitem__), access)

    def _count(self, keys: Sequence[int]) -> None:
        """An offer of each; those of this offer are not forgotten for each other."""
        offers = self._offers
        known = {key for key in keys if key in offers}
        for key in keys:
            if key in known:
                offers.move_to_end(key)
                offers[key] += 1
        others = len(offers) - len(known)
        for key in keys:
            if key in offers:
                continue
            if len(offers) >= self._tracked:
                if others == 0:
                    continue
                offers.popitem(last=False)
                others -= 1
            offers[key] = 1
