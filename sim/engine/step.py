"""What one call of ``schedule`` decided."""

from __future__ import annotations

import cython

NOBODY: list = []  # never written to: see ``own``


def own(entries: list) -> list:
    """Entries that may be added to: most lists of most steps stay empty, and none is made for them."""
    return [] if entries is NOBODY else entries


class Step:
    """What one ``schedule`` decided, and after ``complete`` what came of it; see ``Step`` in
    ``servecast.sim.engine.engine``.

    samplers: sequences that sample a token, in the order of the batch. joined: those admitted and resumed,
    with what they found cached, and whether resumed. firsts, leavers: those that got their first or last
    token. failed: those that end with an error. prefilling: with priorities or a connector, whose the chunks
    are. connector_meta: what the connector's workers are told; transfers: what they report (``Transfers``).
    deferred: it samples when the step before is complete, whose tokens a grammar needs.
    encoded: (sequence, place) of items that are encoded before the forward pass; looking: sequences in the
    step that may still need encoder outputs. adapters: of LoRA, with how many of the step's tokens each has,
    or None.
    composition: with ``trace``, all and their tokens. verified: where it drafts, how many drafts each of
    samplers verifies, -k where they are padding. outputs: requests that got tokens, each in one message. row:
    in the table of steps. windowed: of decode_context, what layers with a window attend to, if the scheduler
    was told one.
    """

    def __init__(self, tick: cython.longlong) -> None:
        self.tick = tick
        self.total_tokens = self.decodes = self.drafts = self.steady = self.emitted = self.outputs = 0
        self.drafters = self.draft_length = self.row = 0
        self.decode_context = self.windowed = self.start = self.end = 0
        self.chunks = self.gaps = self.samplers = self.verified = self.prefilling = NOBODY
        self.joined = self.joined_cached = self.joined_again = self.victims = NOBODY
        self.firsts = self.leavers = self.failed = self.encoded = self.looking = NOBODY
        self.composition, self.borrowed, self.deferred = None, False, False
        self.adapters = None
        self.connector_meta = self.transfers = None

    @property
    def samples(self) -> int:
        return len(self.samplers) + self.drafts

    @property
    def admitted(self) -> list[int]:
        return [s.request_id for s, again in zip(self.joined, self.joined_again, strict=True) if not again]

    @property
    def resumed(self) -> list[int]:
        return [s.request_id for s, again in zip(self.joined, self.joined_again, strict=True) if again]

    @property
    def cached_tokens(self) -> dict[int, int]:
        return {s.request_id: cached for s, cached in zip(self.joined, self.joined_cached, strict=True)}

    @property
    def preempted(self) -> list[int]:
        return [s.request_id for s in self.victims]

    @property
    def first_tokens(self) -> list[int]:
        return [s.request_id for s in self.firsts]

    @property
    def finished(self) -> list[int]:
        return [s.request_id for s in [*self.leavers, *self.failed]]

    @property
    def encoder_inputs(self) -> dict[int, list[int]]:
        """Request id -> places of its items that are encoded in the step (scheduled_encoder_inputs)."""
        found: dict[int, list[int]] = {}
        for s, place in self.encoded:
            found.setdefault(s.request_id, []).append(place)
        return found

    @property
    def idle_s(self) -> float:
        return 0.0

    def scheduled(self) -> dict[int, int]:
        """Request id -> tokens, in vLLM's order. Only from a scheduler made with ``trace=True``."""
        assert self.composition is not None, "the scheduler was not made with trace=True"
        return {s.request_id: tokens for s, tokens in self.composition}
