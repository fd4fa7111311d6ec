"""What adapters, grammars and images cost beside a step's own time: loading, compiling, masks, processing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from servecast.sim.engine.request import MediaItem


class AdapterCache:
    """A worker's LoRA adapters: those in its slots on the GPU, and more in host memory, the least recently
    used going first (LRUCacheWorkerLoRAManager). What is missing is loaded inside the step that needs it.

    Args:
        slots: ``--max-loras``. host_slots: ``--max-cpu-loras``.
        disk_s, copy_s: seconds from disk to host memory, and from there into a slot.
        loaded: adapters that the server loads when it starts (``--lora-modules``), in their order.
    """

    def __init__(
        self, slots: int, host_slots: int, disk_s: float, copy_s: float, loaded: Iterable[int] = ()
    ) -> None:
        self._slots, self._host_slots, self._disk_s, self._copy_s = slots, host_slots, disk_s, copy_s
        self._on_gpu: OrderedDict[int, None] = OrderedDict()
        self._on_host: OrderedDict[int, None] = OrderedDict()
        self.load(loaded)

    def load(self, adapters: Iterable[int]) -> float:
        """Seconds until the adapters of a step are in their slots."""
        seconds = 0.0
        for adapter in adapters:
            seconds += self._disk_s * _use(self._on_host, adapter, self._host_slots)
            seconds += self._copy_s * _use(self._on_gpu, adapter, self._slots)
        return seconds


def _use(held: OrderedDict[int, None], adapter: int, room: int) -> bool:
    """Whether it has to be fetched; then the least recently used one makes room."""
    missing = adapter not in held
    held[adapter] = None
    held.move_to_end(adapter)
    if len(held) > room:
        held.popitem(last=False)
    return missing


@dataclass(frozen=True, slots=True)
class GrammarCosts:
    """compile_s: of a grammar that is new to the server. mask_s: of one request's token mask. threads: that
    compile, and that fill masks of many requests."""

    compile_s: float
    mask_s: float
    threads: int


_SERIAL, _BATCH = 128, 16  # StructuredOutputManager: fill_bitmask_parallel_threshold, .._batch_size


class Grammars:
    """StructuredOutputManager: grammars are compiled by a pool of threads, each once.

    Args:
        costs: what it takes.
    """

    def __init__(self, costs: GrammarCosts) -> None:
        self._costs = costs
        self._free = [0] * costs.threads
        self._ready: dict[int, int] = {}

    def ready(self, grammar: int, time: int) -> int:
        """When (ps) a grammar is there that is asked for at ``time``."""
        if grammar not in self._ready:
            start = max(time, min(self._free))
            self._ready[grammar] = start + round(self._costs.compile_s * 1e12)
            self._free[self._free.index(min(self._free))] = self._ready[grammar]
        return max(time, self._ready[grammar])

    def mask_seconds(self, requests: int) -> float:
        """Filling the masks of a step's requests, while its forward pass runs."""
        if requests < _SERIAL:
            return requests * self._costs.mask_s
        batches = -(-requests // _BATCH)
        return -(-batches // self._costs.threads) * _BATCH * self._costs.mask_s


class MediaProcessor:
    """The API server's processor of images and the like, and its cache, the least recently used going first
    (MultiModalProcessorSenderCache): what is in there takes no time.

    Args:
        item_s, pixel_s: for an item, and for each of its pixels as it is sent.
        cache_bytes: ``--mm-processor-cache-gb``. patch_bytes: of a patch in it.

    Attributes:
        queries, hits: items that were looked up, and found (vllm:mm_cache_queries, vllm:mm_cache_hits).
    """

    def __init__(self, item_s: float, pixel_s: float, cache_bytes: float, patch_bytes: int) -> None:
        self._item_s, self._pixel_s = item_s, pixel_s
        self._most = self._room = cache_bytes
        self._patch_bytes = patch_bytes
        self._held: OrderedDict[int, int] = OrderedDict()
        self.queries = self.hits = 0

    def seconds(self, items: Iterable[MediaItem]) -> float:
        """For the items of a request."""
        seconds = 0.0
        for item in items:
            self.queries += 1
            if item.content in self._held:
                self.hits += 1
                self._held.move_to_end(item.content)
                continue
            seconds += self._item_s + item.pixels * self._pixel_s
            size = item.patches * self._patch_bytes
            if size > self._most:
                continue  # larger than the cache
            while size > self._room:
                self._room += self._held.popitem(last=False)[1]
            self._held[item.content] = size
            self._room -= size
        return seconds
