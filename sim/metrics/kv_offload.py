"""What KV cache outside of GPUs came to: hits by tier and bytes moved, under vLLM's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from servecast.sim.engine.offloading import OffloadingConnector


def offload_counters(scheduler: Any, ranks: int, end_ps: int) -> dict[str, Any]:
    """vLLM's counters of one engine with a connector, without "vllm:", at the end of a run. Tokens, bytes of
    all ``ranks``, seconds that the links took; ``loaded_tokens`` by the tier that they came from; ``links``:
    the share of the time in which each was busy."""
    every = getattr(scheduler.connector, "connectors", (scheduler.connector,))
    parts = [_part(each, scheduler) for each in every]
    links = {name: link for part in parts for name, link in part["links"].items()}
    loaded: Counter[str] = Counter()
    for part in parts:
        loaded.update(part["loaded"])
    return {
        "prefix_cache_queries": scheduler.prefix_queries,
        "prefix_cache_hits": scheduler.prefix_hits,
        "external_prefix_cache_queries": scheduler.external_queries,
        "external_prefix_cache_hits": scheduler.external_hits,
        "kv_offload_load_bytes": links["host_to_gpu"].bytes * ranks,
        "kv_offload_load_time": links["host_to_gpu"].busy_ps / 1e12,
        "kv_offload_store_bytes": links["gpu_to_host"].bytes * ranks,
        "kv_offload_store_time": links["gpu_to_host"].busy_ps / 1e12,
        "evicted_chunks": sum(part["evictions"] for part in parts),
        "loaded_tokens": dict(loaded),
        "links": {name: link.busy_ps / max(end_ps, 1) for name, link in links.items()},
    }


def _part(connector: Any, scheduler: Any) -> dict[str, Any]:
    """Links, tokens loaded by tier, and chunks that made room, of one connector."""
    if isinstance(connector, OffloadingConnector):
        copies: Any = connector.copies
        return {
            "links": {"host_to_gpu": copies.to_gpu, "gpu_to_host": copies.to_host},
            "loaded": {"cpu": copies.loaded_blocks * scheduler.config.block_size},
            "evictions": connector.cache.evictions,
        }
    names = {"links": "links", "loaded": "loaded_tokens", "evictions": "evictions"}
    return {name: getattr(connector, own) for name, own in names.items()}


def busiest(counters: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each kind of link the share of the busiest replica's."""
    names = dict.fromkeys(name for each in counters for name in each["links"])
    return {name: max(each["links"].get(name, 0.0) for each in counters) for name in names}


def offload_summary(counters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of all replicas together, with the shares of prompt tokens found locally and elsewhere."""
    counted = [name for name in counters[0] if name not in ("loaded_tokens", "links")]
    found: dict[str, Any] = {name: sum(each[name] for each in counters) for name in counted}
    asked, external = found["prefix_cache_queries"], found["external_prefix_cache_queries"]
    found["local_hit_rate"] = found["prefix_cache_hits"] / asked if asked else None
    found["external_hit_rate"] = found["external_prefix_cache_hits"] / external if external else None
    tiers = sorted({name for each in counters for name in each["loaded_tokens"]})
    found["loaded_tokens"] = {
        name: sum(each["loaded_tokens"].get(name, 0) for each in counters) for name in tiers
    }
    found["link_busy"] = busiest(counters)
    return found
