"""Which contents come into a KV cache and go, as vLLM tells it with ``--kv-events-config``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from servecast.sim.engine.engine import Engine
from servecast.sim.engine.scheduler import Scheduler

BLOCKS_PER_CONTENT = 1 << 24  # a content id owns this many keys of blocks


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


def publish_kv_events(engine: Engine, publish: Publish) -> None:
    """From now on, before its first request, an engine publishes its KV events. One without a prefix cache
    has none.

    Contents that only one request can have (its own prompt tokens and its output) are left out: no other
    prompt can ask for them.
    """
    if not isinstance(engine, Scheduler):
        return
    assert not engine.has_requests

    def stored(keys: Sequence[int]) -> None:
        publish(BlockStored(tuple(keys)))

    def evicted(key: int) -> None:
        publish(BlockRemoved(key))

    pool: Any = engine.kv.pool
    pool.on_store, pool.on_evict = stored, evicted
