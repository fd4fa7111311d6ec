"""Whether layers are managed by kind, with KV cache groups of their own: vLLM's hybrid KV cache manager
(``VllmConfig.__post_init__``), which some KV connectors turn off."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from servecast.sim.engine.kv_groups import (
    CacheOptions,
    block_bytes,
    blocks_per_sequence,
    groups_of,
    specs,
)
from servecast.sim.engine.rules import since
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.kv_transfer import KVTransfer

_FLAG = "disable_hybrid_kv_cache_manager"
_ASKED_SINCE = "0.23"  # before, any connector turns it off (KVConnectorFactory.supports_hma_config)
_TAKES_GROUPS_SINCE = {  # SupportsHMA
    "NixlConnector": "0.20",
    "NixlPullConnector": "0.24",
    "NixlPushConnector": "0.24",
    "MooncakeConnector": "0.20",
    "OffloadingConnector": "0.21",
    "MultiConnector": "0.21",
}


def by_kind(flags: EngineFlags, kinds: Collection[str], release: str) -> bool:
    """Whether layers of these ``kinds`` are managed by kind, not all as full attention.

    Raises:
        InputError: it is asked for, and vLLM refuses it.
    """
    transfer, off = flags.kv_transfer, flags.disable_hybrid_kv_cache_manager
    refusing = None if transfer is None else _without_groups(transfer, release)
    if off is False and (refusing or "chunked" in kinds):
        raise InputError(
            f"{refusing} does not support the hybrid KV cache manager, which {_FLAG} false turns on"
            if refusing
            else f"{_FLAG} false: vLLM does not support the hybrid KV cache manager with chunked attention",
            where=f"engine.{_FLAG}",
            fix="Leave it out: vLLM refuses this.",
        )
    if off is None and transfer is not None:
        off = refusing is not None or not since(release, _ASKED_SINCE)
    return not off and "chunked" not in kinds


def _without_groups(transfer: KVTransfer, release: str) -> str | None:
    """The first of its connectors that takes one KV cache group only."""
    for each in (transfer, *transfer.connectors):
        first = _TAKES_GROUPS_SINCE.get(each.connector)
        if first is None or not since(release, first):
            return each.connector
    return None


def note(
    flags: EngineFlags,
    memory: KVMemory,
    shard: Shard,
    drafter: Drafter | None,
    cache: CacheOptions,
    in_flight: int,
) -> str | None:
    """Said of models with sliding windows, where a connector is there: which of the two it is, and what it
    costs where windows are kept whole."""
    if not any(layer.kind == "sliding" for layer in shard.model.cache_layers):
        return None
    if memory.kv_groups:
        return (
            "the hybrid KV cache manager is on beside the KV connector: sliding windows keep, and move, no "
            "more than their window"
        )
    cache = replace(
        cache,
        ranks=shard.tensor_parallel_size,
        context_ranks=shard.context_ranks,
        kv_bytes=shard.kv_dtype_bytes,
        max_model_len=memory.max_model_len,
    )
    layers = (*shard.model.cache_layers, *(drafter.cache_layers(shard) if drafter else ()))
    groups = groups_of(specs(layers, cache), cache.release)
    blocks = memory.kv_bytes // block_bytes(groups)
    tokens = blocks * memory.max_model_len // blocks_per_sequence(groups, memory.max_model_len, in_flight)
    transfer = flags.kv_transfer
    what = _FLAG
    if flags.disable_hybrid_kv_cache_manager is None and transfer is not None:
        what = _without_groups(transfer, cache.release) or f"a KV connector in vLLM {cache.release}"
    return (
        f"{what} turns the hybrid KV cache manager off: sliding windows are kept, and move, as full "
        f"attention, so that the KV cache holds {memory.logged_tokens:,} tokens in sequences of "
        f"{memory.max_model_len:,}, where it could hold {tokens:,}"
    )
