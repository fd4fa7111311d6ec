"""What differs between vLLM releases where layers do not all keep the same; ``rules`` has the rest.

The functions are those of ``vllm/v1/core``: single_type_kv_cache_manager.py, kv_cache_coordinator.py and
kv_cache_manager.py. Windows and chunks are step-exact from 0.23 on, states in 0.23 and from 0.28 on; the
other releases run under the rules that are known of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.engine.rules import RELEASES, in_force, minor_release


@dataclass(frozen=True, slots=True)
class GroupRules:
    """Rules of KV cache groups that changed between releases.

    Attributes:
        loads_group_by_group: each group takes its hits and then blocks for what a connector loads, before the
            next one does; a hit may be given away (allocate_new_computed_blocks). Else all hits come first.
        splits_freed_windows: blocks without a hash go to the head of the free list where they leave a window
            or are a sliding window's, to its tail otherwise (free_blocks(prepend=True)).
        trims_what_is_processed: blocks leave the window by the tokens of finished steps, not of scheduled
            ones (KVCacheManager.allocate_slots: num_in_flight_tokens), and those in flight count for what a
            group may hold at once (VllmConfig.max_in_flight_tokens).
        pins_junctions: where one group's hit was longer than that of all, this is kept for the next request
            (request.shared_prefix_boundary), and a later pass takes full attention's hit as it was found.
        retains_states: the retention interval holds for states, too (MambaManager.reachable_block_mask).
        retires_all_states: states are given back wherever they stand (MambaManager._remove_blocks_in_range).
        aligns_chunk_ends: chunks end at block boundaries, counted from the sequence's start
            (Scheduler._mamba_block_aligned_split); keeps_last_token_from_states: the last such end leaves
            the last token, which a hit computes again.
        registers_boundary_state: the state at the prompt's last boundary is registered in the step that
            reaches it, even if it was a hit (MambaManager._cache_partial_tail_block);
            registers_boundary_state_again: even where it has its hash.
        checks_last_block: the block that proves a hit for a drafter may be the prompt's last one
            (HybridKVCacheCoordinator.find_longest_cache_hit: eagle_margin).
        keeps_replays_of_drops: what a hit ends at is a block earlier where one is dropped for a drafter
            (replay_boundaries).
        doubts_drafts: states are given back as if all drafts in flight were rejected
            (MambaManager.remove_skipped_blocks).
        looks_past_states: a look-up of states, too, goes a block further where one is dropped for a drafter,
            although none of them is (HybridKVCacheCoordinator.find_longest_cache_hit).
    """

    loads_group_by_group: bool
    splits_freed_windows: bool
    trims_what_is_processed: bool
    pins_junctions: bool
    retains_states: bool
    retires_all_states: bool
    aligns_chunk_ends: bool
    keeps_last_token_from_states: bool
    registers_boundary_state: bool
    registers_boundary_state_again: bool
    checks_last_block: bool
    keeps_replays_of_drops: bool
    doubts_drafts: bool
    looks_past_states: bool


GROUP_RULE_IN: dict[str, tuple[str, str | None]] = {
    "loads_group_by_group": ("0.20", "0.23"),
    "splits_freed_windows": ("0.23", "0.23"),
    "trims_what_is_processed": ("0.26", None),
    "pins_junctions": ("0.26", None),
    "retains_states": ("0.24", None),
    "retires_all_states": ("0.30", None),
    "aligns_chunk_ends": ("0.28", None),
    "keeps_last_token_from_states": ("0.32", None),
    "registers_boundary_state": ("0.32", None),
    "registers_boundary_state_again": ("0.32", "0.32"),
    "checks_last_block": ("0.32", None),
    "keeps_replays_of_drops": ("0.30", None),
    "doubts_drafts": ("0.20", "0.25"),
    "looks_past_states": ("0.20", "0.25"),
}
"""The first and the last release that has a rule; None is the newest."""

GROUP_RULES = {release: GroupRules(**in_force(GROUP_RULE_IN, release)) for release in RELEASES}
WINDOWS_SINCE = "0.23"
STATES_IN = ("0.23", *RELEASES[RELEASES.index("0.28") :])


def group_rules_for(version: str) -> GroupRules:
    """Those of a release in ``RELEASES``, or of its patches."""
    return GROUP_RULES[minor_release(version)]
