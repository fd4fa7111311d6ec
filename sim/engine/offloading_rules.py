"""What differs between vLLM releases where KV cache is offloaded to host memory; ``rules`` has the rest."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.engine.rules import RELEASES, in_force, minor_release


@dataclass(frozen=True, slots=True)
class OffloadingRules:
    """Rules of the OffloadingConnector that changed between releases: of its scheduler
    (``kv_connector/v1/offloading/scheduler.py``) and of what it keeps (``vllm/v1/kv_offload/cpu``).

    They are step-exact in 0.23, 0.32 and 0.33. From 0.24 to 0.30 chunks become the ones used last as their
    transfers end, which vLLM takes in the order of a set; here it is that of the tokens.

    Attributes:
        waits_for_own: a request with transfers is not looked up (get_num_new_matched_tokens); before, vLLM's
            engine ends where it is to be loaded while it is still stored.
        stores_ended: what a request's last step completed is stored, too, when it has ended
            (_build_store_jobs).
        flushes_at_the_end: with the last request all transfers are waited for (build_connector_meta); later
            the engine goes on until they are over.
        returns: a request that was preempted is offered to be stored anew, from where it goes on
            (advance_stored_idx); offers_again: and from its start, where it is looked up.
        touches: chunks of a request are used at its look-ups and stores (_touch), those in transfer too;
            before its end (CachePolicy.on_request_finished).
        orders_idle: of chunks only those without transfers have an order, which they enter at its end.
        counts_lookups: a chunk is stored when it has been looked up so often, not offered
            (CPUOffloadingManager.lookup).
        ranks_by_request: the chunks of one request have its recency from its first one on, the last of its
            tokens the oldest (LRUCachePolicy._get_request_rank).
        arc_takes_recent: ARC takes from its first list again where the second has nothing to give
            (ARCCachePolicy.evict).
    """

    waits_for_own: bool
    stores_ended: bool
    flushes_at_the_end: bool
    returns: bool
    offers_again: bool
    touches: bool
    orders_idle: bool
    counts_lookups: bool
    ranks_by_request: bool
    arc_takes_recent: bool


OFFLOADING_RULE_IN: dict[str, tuple[str, str | None]] = {
    "waits_for_own": ("0.24", None),
    "stores_ended": ("0.26", None),
    "flushes_at_the_end": (RELEASES[0], "0.23"),
    "returns": (RELEASES[0], "0.25"),
    "offers_again": ("0.33", None),
    "touches": (RELEASES[0], "0.30"),
    "orders_idle": ("0.24", "0.30"),
    "counts_lookups": (RELEASES[0], "0.29"),
    "ranks_by_request": ("0.33", None),
    "arc_takes_recent": ("0.28", None),
}
"""The first and the last release that has a rule; None is the newest."""

OFFLOADING_RULES = {release: OffloadingRules(**in_force(OFFLOADING_RULE_IN, release)) for release in RELEASES}


def offloading_rules_for(version: str) -> OffloadingRules:
    """Those of a release in ``RELEASES``, or of its patches."""
    return OFFLOADING_RULES[minor_release(version)]
