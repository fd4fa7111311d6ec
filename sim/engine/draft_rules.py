"""What differs between vLLM releases where drafts are verified; ``rules`` has the rest."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.engine.rules import RELEASES, in_force, minor_release


@dataclass(frozen=True, slots=True)
class DraftRules:
    """Rules of speculative decoding that changed between releases, or came with one.

    Attributes:
        reserves_at_admission: the lookahead slots are reserved at an admission, too (Scheduler.schedule:
            effective_lookahead_tokens).
        reserves_for_loads: and while a request waits for an asynchronous load, but for methods that take
            hidden states (limit_lookahead_tokens).
        infills: DFlash reserves one slot more than drafts, for its bonus query (num_lookahead_tokens).
        by_batch: num_speculative_tokens_per_batch_size.
        pads_admissions: an admission with one token left to compute gets 1 + k, whose drafts are never
            accepted, so that a step of decoding requests stays uniform (Scheduler.schedule: "Pad new decode
            requests"); pads_the_first: also where nobody decodes, if some of its tokens were computed;
            waits_at_the_end: near max_model_len it waits instead of going without.
        slots_by_request: the input slots that a drafter adds come off the step's budget with each request
            (Scheduler.schedule: input_budget); before, for max_num_seqs at start-up
            (VllmConfig._set_max_num_scheduled_tokens).
        infill_slots: DFlash adds k input slots, not k - 1; own_pass: DFlash and DSpark add none
            (SpeculativeConfig.max_num_new_slots_for_drafting), but no more requests run than their pass has
            room for (_set_max_num_scheduled_tokens: max_num_active_seqs).
        disable_eagle_block_drop: this option.
        hashes_next_token: a block's hash covers the token behind it where the drafter's KV depends on it,
            in place of computing a hit's last block again (VllmConfig.num_hash_lookahead_tokens).
        flags_mtp_group: of KV cache groups only that of MTP's layers gives up the last block of a hit
            (_annotate_eagle_groups), else all do.
        modules_look_ahead: several MTP modules read one prompt token more each: no chunk ends so near the end
            of a prompt that some are missing (Scheduler._reserve_prefill_lookahead), and what they may write
            once more is not cached (KVCacheCoordinator.get_num_cacheable_tokens).
        hashes_at_update: without async scheduling, too, blocks get their hash when a step's tokens arrive
            (Scheduler.update_from_output); before, in the next step.
        uncounts_what_ends_cut: tokens that a request's end has cut count no more as computed
            (_update_request_with_output).
    """

    reserves_at_admission: bool
    reserves_for_loads: bool
    infills: bool
    by_batch: bool
    pads_admissions: bool
    pads_the_first: bool
    waits_at_the_end: bool
    slots_by_request: bool
    infill_slots: bool
    own_pass: bool
    disable_eagle_block_drop: bool
    hashes_next_token: bool
    hashes_at_update: bool
    uncounts_what_ends_cut: bool
    flags_mtp_group: bool
    modules_look_ahead: bool


DRAFT_RULE_IN: dict[str, tuple[str, str | None]] = {
    "reserves_at_admission": ("0.23", None),
    "reserves_for_loads": ("0.23", "0.23"),
    "infills": ("0.23", None),
    "by_batch": ("0.24", None),
    "pads_admissions": ("0.25", None),
    "pads_the_first": ("0.30", None),
    "waits_at_the_end": ("0.25", "0.28"),
    "slots_by_request": ("0.28", None),
    "infill_slots": ("0.28", "0.32"),
    "own_pass": ("0.33", None),
    "disable_eagle_block_drop": ("0.30", None),
    "hashes_next_token": ("0.33", None),
    "hashes_at_update": ("0.33", None),
    "uncounts_what_ends_cut": ("0.33", None),
    "flags_mtp_group": ("0.31", "0.32"),
    "modules_look_ahead": ("0.28", None),
}
"""The first and the last release that has a rule; None is the newest."""

DRAFT_RULES = {release: DraftRules(**in_force(DRAFT_RULE_IN, release)) for release in RELEASES}


def draft_rules_for(version: str) -> DraftRules:
    """Those of a release in ``RELEASES``, or of its patches."""
    return DRAFT_RULES[minor_release(version)]
