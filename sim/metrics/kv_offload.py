"""What KV cache outside of GPUs came to: hits by tier and bytes moved, under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COUNTERS = (  # vLLM's, without "vllm:"; summed over replicas
    "prefix_cache_queries",
    "prefix_cache_hits",
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "kv_offload_load_bytes",
    "kv_offload_load_time",
    "kv_offload_store_bytes",
    "kv_offload_store_time",
    "evicted_chunks",
)


def offload_counters(scheduler: Any, ranks: int) -> dict[str, Any]:
    """The counters of one engine with a connector, at the end of a run. Tokens, bytes of all ``ranks``, seconds
    that the links took; ``loaded_tokens`` by the tier that they came from."""
    tiers = scheduler.connector.tiers
    links = {"load": tiers.to_gpu, "store": tiers.to_host}
    found: dict[str, Any] = {
        "prefix_cache_queries": scheduler.prefix_queries,
        "prefix_cache_hits": scheduler.prefix_hits,
        "external_prefix_cache_queries": scheduler.external_queries,
        "external_prefix_cache_hits": scheduler.external_hits,
        "evicted_chunks": sum(tier.evictions for tier in tiers.tiers),
        "loaded_tokens": {name: count * tiers.chunk_tokens for name, count in tiers.loaded.items()},
    }
    for name, link in links.items():
        found[f"kv_offload_{name}_bytes"] = link.bytes * ranks
        found[f"kv_offload_{name}_time"] = link.busy_ps / 1e12
    return found


def offload_summary(counters: Sequence[Mapping[str, Any]], links: Mapping[str, float]) -> dict[str, Any]:
    """Those of all replicas together, with the shares of prompt tokens that were found locally and elsewhere.

    Args:
        links: the share of the run in which each link was busy, the busiest of its kind.
    """
    found: dict[str, Any] = {name: sum(each[name] for each in counters) for name in _COUNTERS}
    asked, external = found["prefix_cache_queries"], found["external_prefix_cache_queries"]
    found["local_hit_rate"] = found["prefix_cache_hits"] / asked if asked else None
    found["external_hit_rate"] = found["external_prefix_cache_hits"] / external if external else None
    tiers = sorted({name for each in counters for name in each["loaded_tokens"]})
    found["loaded_tokens"] = {
        name: sum(each["loaded_tokens"].get(name, 0) for each in counters) for name in tiers
    }
    found["link_busy"] = dict(links)
    return found
