"""What differs between vLLM releases where requests carry images, videos or audio; ``rules`` has the rest."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.engine.rules import RELEASES, in_force, minor_release


@dataclass(frozen=True, slots=True)
class EncoderRules:
    """Rules of the encoder cache and its budget that changed between releases.

    Attributes:
        refers_by_item: a request refers to what it has looked up or encoded
            (EncoderCacheManager.request_cached_ids); before, to all of its items that are cached.
        frees_behind_placeholders: an item is let go once the text position without what is in flight has
            passed it (Scheduler._free_encoder_inputs: "- request.num_output_placeholders").
        holds_until_last: an item that stands twice in a request is held for its last place
            (EncoderCacheManager.free_encoder_input).
        counts_repeats: its second place in one step refers to it, too (duplicate_encoder_inputs).
        keeps_whole_first: with disable_chunked_mm_input a chunk ends before an item that it would cut,
            even if that is cached (Scheduler._try_schedule_encoder_inputs).
        keeps_whole_at_start: even one that begins where the chunk does ("num_computed_tokens <= start_pos").
        passes_over: a waiting request whose item finds no budget or room is passed over; before, nobody
            behind it was admitted (Scheduler.schedule, where num_new_tokens is 0).
    """

    refers_by_item: bool
    frees_behind_placeholders: bool
    holds_until_last: bool
    counts_repeats: bool
    keeps_whole_first: bool
    keeps_whole_at_start: bool
    passes_over: bool


ENCODER_RULE_IN: dict[str, tuple[str, str | None]] = {
    "refers_by_item": ("0.23", None),
    "frees_behind_placeholders": ("0.24", None),
    "holds_until_last": ("0.29", None),
    "counts_repeats": ("0.32", None),
    "keeps_whole_first": ("0.32", None),
    "keeps_whole_at_start": ("0.33", None),
    "passes_over": ("0.33", None),
}
"""The first and the last release that has a rule; None is the newest."""

ENCODER_RULES = {release: EncoderRules(**in_force(ENCODER_RULE_IN, release)) for release in RELEASES}


def encoder_rules_for(version: str) -> EncoderRules:
    """Those of a release in ``RELEASES``, or of its patches."""
    return ENCODER_RULES[minor_release(version)]
