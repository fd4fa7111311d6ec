"""A KV cache that tells which contents come and go, as vLLM does with ``--kv-events-config``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servecast.sim.engine.engines import Engine
from servecast.sim.engine.kv_cache import KVCache
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.sequence import is_shared


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks with these contents are in the prefix cache from now on."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A cached free block with this content is reused. Another block may still hold the same: vLLM does
    not look, and neither does who listens."""

    key: int


KVEvent = BlockStored | BlockRemoved
Publish = Callable[[KVEvent], None]


class PublishingKVCache(KVCache):
    """Makes the same decisions as a KVCache, and publishes events.

    Contents that only one request can have (its own prompt tokens and its output) are left out: no other
    prompt can ask for them.
    """

    __slots__ = ("_publish",)

    def __init__(self, num_blocks: int, *, reuse_unhashed_first: bool, publish: Publish) -> None:
        super().__init__(num_blocks, reuse_unhashed_first=reuse_unhashed_first)
        self._publish = publish

    def cache(self, keys: Sequence[int], blocks: Sequence[int]) -> None:
        super().cache(keys, blocks)
        stored = tuple(key for key in keys if is_shared(key)) if is_shared(keys[0]) else ()
        if stored:
            self._publish(BlockStored(stored))

    def take_one(self) -> int:
        if not self._stack and self._fresh >= self.num_blocks:
            key = self._key_of[next(iter(self._evictable))]
            if key is not None and is_shared(key):
                self._publish(BlockRemoved(key))
        return super().take_one()


def publish_kv_events(engine: Engine, publish: Publish) -> None:
    """From now on, before its first request, an engine publishes its KV events. One without a prefix cache
    has none."""
    if isinstance(engine, Scheduler):
        assert not engine.has_requests
        engine.kv = PublishingKVCache(
            engine.config.num_gpu_blocks,
            reuse_unhashed_first=engine.rules.reuse_unhashed_first,
            publish=publish,
        )
