"""Who gets an encoder's time in a step, and whose output is kept: vLLM's EncoderCacheManager, and the part of
its scheduler that asks it.

Sizes are embeddings. An output is known by its content and kept while a request refers to it; then until its
room is needed, the one that was let go first before the others.
"""

from __future__ import annotations

from typing import Any

import cython

from servecast.sim.engine.encoder_rules import encoder_rules_for
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step
from servecast.sim.inputs.errors import InputError

if not cython.compiled:
    from servecast.sim.engine.sequence import FINISHED
    from servecast.sim.engine.step import own


class EncoderCache:
    """The encoder's budget and cache. A sequence has its items in ``media`` (``MediaItem``) and the places of
    those that it refers to in ``held``.

    Use: ``fit`` says how many tokens of a chunk can be computed; if that is scheduled, ``accept`` follows.

    Attributes:
        free_slots: embeddings that have room at once; free_able: with those that nobody refers to.
    """

    def __init__(self, config: Any) -> None:
        rules = encoder_rules_for(config.version)
        self.refers_by_item, self.holds_until_last = rules.refers_by_item, rules.holds_until_last
        self.frees_behind_placeholders = rules.frees_behind_placeholders
        self.counts_repeats, self.passes_over = rules.counts_repeats, rules.passes_over
        self.keeps_whole = config.disable_chunked_mm_input
        self.keeps_whole_first = rules.keeps_whole_first
        self.keeps_whole_at_start = rules.keeps_whole_at_start
        self.budget_of_step = config.max_num_encoder_input_tokens
        self.size = self.free_slots = self.free_able = config.encoder_cache_size
        self.budget = self.left = 0
        self.cached, self.let_go = {}, {}
        self.chosen, self.repeated = [], []

    @property
    def state(self) -> list[Any]:
        """Room, room with what can be evicted, that in its order, and what is cached."""
        return [self.free_slots, self.free_able, list(self.let_go), sorted(self.cached)]

    def admit(self, sequence: Sequence, media: tuple) -> cython.int:
        """A request with items is there.

        Raises:
            InputError: one of them never fits.
        """
        item: Any = media[len(media) - 1]
        sequence.media, sequence.held = media, set()
        sequence.media_end = item.offset + item.length
        for item in media:
            if item.embeds > self.budget_of_step or item.embeds > self.size:
                raise InputError(
                    f"an item of {item.embeds} embeddings is larger than the encoder's budget or cache, "
                    f"{min(self.budget_of_step, self.size)}",
                    where=f"request {sequence.request_id}",
                    fix="Raise max_num_batched_tokens, or carry smaller items.",
                )
        return 0

    def fit(self, sequence: Sequence, computed: cython.int, tokens: cython.int) -> cython.int:
        """How many of a chunk's ``tokens`` behind ``computed`` can be computed in this step, and what has to
        be encoded for them (Scheduler._try_schedule_encoder_inputs)."""
        end: cython.int = computed + tokens
        offset: cython.int
        length: cython.int
        size: cython.int
        pending: cython.int = 0
        place: cython.int
        known: set = set()
        self.chosen, self.repeated, self.left = [], [], self.budget
        if tokens == 0:
            return 0
        media: Any = sequence.media
        for place in range(len(media)):
            item: Any = media[place]
            offset, length, size = item.offset, item.length, item.embeds
            if offset >= end:
                break
            if offset + length <= computed:
                continue
            cut: cython.bint = (
                self.keeps_whole
                and (computed < offset or (self.keeps_whole_at_start and computed == offset))
                and end < offset + length
            )
            if cut and self.keeps_whole_first:
                tokens = offset - computed
                break
            if item.content in known:
                if self.counts_repeats:
                    self.repeated.append(place)
                continue
            if self.refer(sequence, place):
                continue
            if cut:
                tokens = offset - computed
                break
            if size > self.left or not self.make_room(pending + size):
                tokens = offset - computed if computed < offset else 0
                break
            if item.lead >= end - offset or length - item.tail <= computed - offset:
                continue  # nothing but tokens without an embedding
            pending += size
            self.left -= size
            known.add(item.content)
            self.chosen.append(place)
        return tokens

    def accept(self, sequence: Sequence, step: Step) -> cython.int:
        """The chunk of the last ``fit`` is scheduled (Scheduler._allocate_encoder_inputs)."""
        place: cython.int
        if not self.chosen:
            return 0
        self.budget = self.left
        step.encoded = own(step.encoded)
        for place in self.chosen:
            item: Any = sequence.media[place]
            self.cached.setdefault(item.content, set()).add(sequence.request_id)
            sequence.held.add(place)
            self.free_slots -= item.embeds
            self.free_able -= item.embeds
            step.encoded.append((sequence, place))
        for place in self.repeated:
            self.refer(sequence, place)
        return 0

    def withdraw(self, sequence: Sequence, step: Step) -> cython.int:
        """It is taken out of the step: its share of the budget is there again."""
        entry: tuple
        for entry in step.encoded:
            if entry[0] is sequence:
                self.budget += sequence.media[entry[1]].embeds
        step.encoded = [entry for entry in step.encoded if entry[0] is not sequence]
        return 0

    def refer(self, sequence: Sequence, place: cython.int) -> cython.bint:
        """Whether an item's output is there; then it is held (check_and_update_cache)."""
        item: Any = sequence.media[place]
        users: Any = self.cached.get(item.content)
        if users is None:
            return False
        if not users:
            self.free_able -= self.let_go.pop(item.content)
        users.add(sequence.request_id)
        sequence.held.add(place)
        return True

    def make_room(self, size: cython.int) -> cython.bint:
        """Whether so many embeddings have room, with the oldest of those evicted that nobody refers to
        (can_allocate)."""
        if size > self.free_slots and size > self.free_able:
            return False
        while size > self.free_slots:
            oldest: Any = next(iter(self.let_go))
            self.free_slots += self.let_go.pop(oldest)
            del self.cached[oldest]
        return True

    def places(self, sequence: Sequence) -> list:
        """Of its items those that it may refer to, in the order of a set of small integers
        (get_cached_input_ids)."""
        if self.refers_by_item:
            held: Any = sequence.held
            return list(held)
        media: Any = sequence.media
        found: set = {place for place, item in enumerate(media) if item.content in self.cached}
        return list(found)

    def release(self, sequence: Sequence, place: cython.int) -> cython.int:
        """It refers to one of its items no more (free_encoder_input)."""
        item: Any = sequence.media[place]
        other: cython.int
        sequence.held.discard(place)
        if not sequence.held:
            sequence.held = set()
        users: Any = self.cached.get(item.content)
        if not users:
            return 0
        if self.holds_until_last:
            for other in sequence.held:
                if sequence.media[other].content == item.content:
                    return 0
        users.discard(sequence.request_id)
        if not users:
            self.let_go[item.content] = item.embeds
            self.free_able += item.embeds
        return 0

    def free(self, sequence: Sequence) -> cython.int:
        """It needs none of its items any more."""
        place: cython.int
        for place in self.places(sequence):
            self.release(sequence, place)
        return 0

    def step_done(self, step: Step) -> cython.int:
        """A step has run: items that its requests have passed are let go, and all of those that end
        (Scheduler._free_encoder_inputs)."""
        sequence: Sequence
        place: cython.int
        passed: cython.int
        for sequence in step.looking:
            if sequence.status == FINISHED:
                continue
            passed = sequence.computed
            if self.frees_behind_placeholders:
                passed -= sequence.placeholders
            for place in self.places(sequence):
                item: Any = sequence.media[place]
                if item.offset + item.length <= passed:
                    self.release(sequence, place)
            if sequence.num_tokens + 1 >= sequence.final_tokens and sequence in step.samplers:
                self.free(sequence)
        return 0
