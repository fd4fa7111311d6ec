"""A request inside the engine."""

from __future__ import annotations

import cython

if not cython.compiled:  # else the constants of sequence.pxd
    WAITING, RUNNING, PREEMPTED, FINISHED, LOADING = range(5)


class Sequence:
    """A request inside the engine. Counts are tokens, times picoseconds, -1 where it did not happen.

    computed: advanced when scheduled, before the step runs. placeholders: async, outputs that steps in flight
    sample, and drafts that they verify. drafts: those that its next step verifies. samplings: its steps that
    sampled and are complete, where it drafts. limit: prompt and max_tokens. decodes_until: computed tokens
    from which on a further one is not a matter of course. final_tokens: when it ends. catch_up: num_tokens at
    its last admission, which it has to compute before it decodes. token_tick: of the step that delivered its
    newest token. scheduled_tick, scheduled_tokens: with priorities or KV cache groups, its last step, and its
    tokens there; with a connector also its step before that, in previous_tick and previous_tokens.
    drops_before: its output of steps before this tick is void. aside: it waits beside the queue. passed: the
    last look at it passed it over. eligible: the first tick of its next decode, in a pipeline; stale_tick: of
    the last step that had it when it was preempted there. adapter: of LoRA, 0: none. constrained: by a
    grammar, which is there when the scheduler's clock shows ``ready``. media: its images and the like, which
    end before token media_end, or None; held: those of them whose encoder output it refers to. slot: its row
    of the block table.
    blocks_end: tokens that its blocks hold. cached_end: tokens whose blocks have their hash. kv_due: the
    tokens at which its KV cache has something to do: a block more, one that is full, or one out of its
    window. junction: tokens up to which some KV cache group had a longer hit than all, 0 is none. row: in the
    table of outcomes, -1 outside of it.
    """

    def __init__(
        self, request_id: cython.longlong, priority: cython.longlong, prompt_tokens: cython.int
    ) -> None:
        self.request_id, self.priority, self.prompt_tokens = request_id, priority, prompt_tokens
        self.status = WAITING
        self.shared_keys = None
        self.num_tokens = self.junction = self.limit = self.decodes_until = self.final_tokens = 0
        self.computed = self.placeholders = self.catch_up = self.preemptions = 0
        self.drafts = self.samplings = 0
        self.blocks_end = self.cached_end = self.kv_due = self.scheduled_tokens = 0
        self.slot = self.cached_tokens = self.row = -1
        self.token_tick = self.scheduled_tick = self.previous_tick = self.arrival = self.serial = -1
        self.drops_before = self.previous_tokens = self.eligible = 0
        self.stale_tick = -1
        self.adapter = self.ready = 0
        self.constrained = False
        self.media = self.held = None
        self.media_end = 0
        self.aside = self.passed = False
        self.queued = self.scheduled = self.ended = self.first_token = self.finish = -1

    @property
    def sort_key(self) -> tuple[int, int, int]:
        """The order of the priority queue."""
        return self.priority, self.arrival, self.request_id
