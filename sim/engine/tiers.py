"""Where KV cache is kept outside of GPUs: tiers of chunks, the least recently used forgotten first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from servecast.sim.engine.kv_events import BLOCKS_PER_CONTENT
from servecast.sim.engine.pipe import Pipe

_OF_REPLICA = 60  # bits of a key


class Tier:
    """Chunks in one medium. Several engines may share it: then they ask in the order of time.

    Args:
        name: "cpu", "disk" or "remote". capacity: chunks that it holds.
        read, write: its own links, of all ranks together; None of host memory, which has those of the GPUs.

    Attributes:
        evictions: chunks that made room. dropped: that found none, as all others were being loaded.
    """

    def __init__(self, name: str, capacity: int, read: Pipe | None = None, write: Pipe | None = None) -> None:
        self.name, self.capacity, self.read, self.write = name, capacity, read, write
        self.evictions = self.dropped = 0
        self._ready: OrderedDict[int, int] = OrderedDict()  # key -> from when it can be read, ps
        self._pins: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._ready)

    def __contains__(self, key: int) -> bool:
        """Whether it is there, or on its way in."""
        return key in self._ready

    def has(self, key: int, now: int) -> bool:
        """Whether it can be read."""
        return self._ready.get(key, now + 1) <= now

    def touch(self, keys: Iterable[int]) -> None:
        """They were used, the first of them last: a prefix outlives what follows it."""
        for key in reversed(list(keys)):
            if key in self._ready:
                self._ready.move_to_end(key)

    def pin(self, keys: Iterable[int]) -> None:
        """They are being read, and stay."""
        self._pins.update(keys)

    def unpin(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]

    def add(self, key: int, ready: int) -> bool:
        """A chunk comes in, and can be read from ``ready`` on. False where nothing can make room for it."""
        if key in self._ready:
            self._ready.move_to_end(key)
            return True
        if len(self._ready) >= self.capacity:
            oldest = next((each for each in self._ready if each not in self._pins), None)
            if oldest is None:
                self.dropped += 1
                return False
            del self._ready[oldest]
            self.evictions += 1
        self._ready[key] = ready
        return True


class Hierarchy:
    """The tiers that an engine looks through, the fastest first, and the link to its GPUs.

    Host memory, if there, is the first tier and takes what is loaded from those below it. Everything is
    stored in all tiers. Chunks are whole, and a look-up ends at the first that no tier has.

    Args:
        tiers: in their order. to_gpu, to_host: each way between one GPU and its host, of a rank's bytes.
        chunk_tokens: tokens a chunk. chunk_bytes: on one rank. copies: ranks whose bytes are all different;
            1 where all hold the same.

    Attributes:
        loaded: chunks by the tier that they came from.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        to_gpu: Pipe,
        to_host: Pipe,
        *,
        chunk_tokens: int,
        chunk_bytes: int,
        copies: int = 1,
    ) -> None:
        self.tiers, self.to_gpu, self.to_host = tuple(tiers), to_gpu, to_host
        self.chunk_tokens, self.chunk_bytes, self.copies = chunk_tokens, chunk_bytes, copies
        self.loaded: Counter[str] = Counter()
        self._came_from: dict[int, str] = {}  # chunks that are fetched for a load

    def _source(self, key: int, now: int) -> Tier | None:
        return next((tier for tier in self.tiers if tier.has(key, now)), None)

    def lookup(self, keys: Sequence[int], now: int) -> int:
        """How many leading chunks can be read."""
        for place, key in enumerate(keys):
            if self._source(key, now) is None:
                return place
        return len(keys)

    def pin(self, keys: Sequence[int]) -> None:
        for tier in self.tiers:
            tier.pin(keys)

    def unpin(self, keys: Sequence[int]) -> None:
        for tier in self.tiers:
            tier.unpin(keys)

    def fetch(self, keys: Sequence[int], now: int) -> int:
        """Bring chunks that a look-up found into host memory; when all are there, ps."""
        below: dict[Tier, list[int]] = {}
        for key in keys:
            tier = self._source(key, now)
            if tier is not None and tier.read is not None:
                below.setdefault(tier, []).append(key)
                self._came_from[key] = tier.name
        there = now
        for tier, missing in below.items():
            assert tier.read is not None
            end = tier.read.send(len(missing) * self.chunk_bytes * self.copies, now)
            there = max(there, end)
            if self.tiers[0].read is None:
                for key in missing:
                    self.tiers[0].add(key, end)
        for tier in self.tiers:
            tier.touch(keys)
        return there

    def to_gpus(self, keys: Sequence[int], now: int) -> int:
        """Copy chunks from host memory; when they are in the GPUs' memory, ps."""
        self.loaded.update(self._came_from.pop(key, "cpu") for key in keys)
        return self.to_gpu.send(len(keys) * self.chunk_bytes, now) if keys else now

    def store(self, keys: Sequence[int], now: int) -> int:
        """Copy chunks from the GPUs, unless each tier has them; when the GPUs' memory may be reused, ps. They
        go on from host memory to the tiers below it."""
        new = [key for key in keys if not all(key in tier for tier in self.tiers)]
        if not new:
            return now
        end = self.to_host.send(len(new) * self.chunk_bytes, now)
        for tier in self.tiers:
            missing = [key for key in new if key not in tier]
            ready = end
            if tier.write is not None and missing:
                ready = tier.write.send(len(missing) * self.chunk_bytes * self.copies, end)
            for key in missing:
                tier.add(key, ready)
            tier.touch(keys)
        return end


def chunk_keys(scheduler: Any, sequence: Any, chunk_tokens: int, tokens: int, replica: int) -> list[int]:
    """What identifies the whole chunks among the first ``tokens`` tokens of a request, for all replicas: the
    last block of each, which stands for all before it. Contents that only it can have are negative."""
    per_chunk = chunk_tokens // scheduler.kv.block_size
    keys = scheduler.block_keys(sequence, tokens // chunk_tokens * per_chunk)[per_chunk - 1 :: per_chunk]
    pool, own = scheduler.kv.pool, (replica + 1) << _OF_REPLICA
    return [-(own + key) if key & BLOCKS_PER_CONTENT else pool.public_key(key) for key in keys]
