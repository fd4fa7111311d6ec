"""Drafts in the scheduler: how many are proposed, padded and accepted, and vLLM's counts."""

from __future__ import annotations

from array import array
from typing import Any

import cython

from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.speculation import METHODS, Kinds
from servecast.sim.inputs.errors import InputError

MASK = (1 << 64) - 1
KIND: cython.ulonglong = 1 << 62  # number of the draw of a request's kind, which no step comes to


class Drafts:
    """What an engine's scheduler asks about drafts; ``speculation`` says how a deployment drafts.

    told: request id -> accepted and proposed drafts of its sampling steps, both lists over and over, in place
    of what is drawn, as the drivers of vLLM's own scheduler have it; or None.

    num_drafts, num_draft_tokens, num_accepted_tokens, per_position: vLLM's counters (SpecDecodingStats); what
    is accepted counts before a request's end cuts it.

    Args:
        config: with ``speculation``.

    Raises:
        InputError: padded admissions are longer than ``long_prefill_token_threshold``, where vLLM ends.
    """

    def __init__(self, config: Any) -> None:
        speculation, rules = config.speculation, draft_rules_for(config.version)
        self.k, self.is_async = speculation.num_tokens, config.async_scheduling
        self.max_model_len = config.max_model_len
        self.pads = rules.pads_admissions and not speculation.by_batch
        self.pads_the_first, self.waits_at_the_end = rules.pads_the_first, rules.waits_at_the_end
        self.hashes_at_update = rules.hashes_at_update
        self.uncounts_cut = rules.uncounts_what_ends_cut
        self.seats = config.max_num_seqs
        if rules.own_pass and METHODS[speculation.method].parallel:
            self.seats = config.max_num_batched_tokens // speculation.lookahead
        self.slots = speculation.draft_slots if rules.slots_by_request else 0
        self.budget = config.max_num_batched_tokens - speculation.draft_slots * (
            1 if rules.slots_by_request else config.max_num_seqs
        )
        if self.budget <= 0 or self.seats == 0:
            raise InputError(
                f"drafting by {speculation.method} leaves no token of a step",
                where="engine.max_num_batched_tokens",
                fix="Raise it, or lower num_speculative_tokens or max_num_seqs.",
            )
        if self.pads and 0 < config.long_prefill_token_threshold <= self.k:
            raise InputError(
                f"vLLM {config.version} ends where it cuts an admission padded to {1 + self.k} tokens",
                where="engine.long_prefill_token_threshold",
                fix=f"Raise it to {1 + self.k}, or leave it out.",
            )
        self.by_requests = array("i", [self.k]) * (config.max_num_seqs + 1)
        for first, most in speculation.by_batch:
            for requests in range(first, config.max_num_seqs + 1):
                self.by_requests[requests] = min(most, self.k)
        kinds: Any = speculation.kinds or Kinds(((speculation.acceptance, speculation.proposed),))
        self.acceptance = array("d", [rate for rates, _ in kinds.laws for rate in rates])
        always = (0.0,) * self.k + (1.0,)
        self.proposed = array("d", [share for _, shares in kinds.laws for share in shares or always])
        self.misses = any(shares for _, shares in kinds.laws)
        self.from_tokens = array("i", kinds.from_tokens)
        self.kinds = len(kinds.laws) // len(kinds.from_tokens)
        told: Any = None
        self.seed, self.told = speculation.seed, told
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.accepted_at = array("q", [0]) * self.k

    @property
    def per_position(self) -> list[int]:
        """How often the draft at each position was accepted."""
        return list(self.accepted_at)

    def length(self, requests: cython.int) -> cython.int:
        """Drafts that each request gets after a step of so many requests (dynamic_sd_lookup)."""
        return self.by_requests[requests] if requests else self.k

    def padding(
        self, computed: cython.int, budget: cython.int, together: cython.bint, prefills: cython.bint
    ) -> cython.int:
        """Drafts that are put in for an admission with one token left; -1: it waits.

        Args:
            computed: its tokens that are. budget: of the step, left. together: whether running requests are
                scheduled, and ``prefills``, some of them in their prefill.
        """
        room: cython.bint
        if not self.pads or prefills or not (together or (self.pads_the_first and computed > 0)):
            return 0
        room = computed + 1 + self.k + (not self.waits_at_the_end) <= self.max_model_len
        if not room:
            return -1 if self.waits_at_the_end else 0
        return self.k if 1 + self.k <= budget else -1

    def accept(self, sequence: Sequence, verified: cython.int) -> cython.int:
        """How many drafts of a step are accepted; ``verified`` is -k where they were put in as padding, which
        no sampler accepts."""
        accepted: cython.int = 0
        drafts: cython.int = abs(verified)
        number: cython.longlong = sequence.samplings
        at: cython.int
        first: cython.Py_ssize_t
        chance: cython.double
        sequence.samplings += 1
        if drafts == 0:
            return 0
        if self.told is not None:
            accepted = self.listed(sequence, 0, number)
        elif verified > 0:
            chance = drawn(self.seed, sequence.request_id, 2 * number)
            first = self.kind(sequence) * self.k
            while accepted < drafts and chance < self.acceptance[first + accepted]:
                accepted += 1
            if self.is_async and self.misses:  # placeholders stand for what was not proposed
                accepted = min(accepted, self.propose(sequence, drafts))
        accepted = min(accepted, drafts)
        self.num_drafts += 1
        self.num_draft_tokens += drafts
        self.num_accepted_tokens += accepted
        for at in range(accepted):
            self.accepted_at[at] += 1
        return accepted

    def propose(self, sequence: Sequence, most: cython.int) -> cython.int:
        """Drafts that a request gets after its newest sampling step."""
        count: cython.int = 0
        number: cython.longlong = sequence.samplings - 1
        first: cython.Py_ssize_t
        chance: cython.double
        if self.told is not None:
            return min(most, self.listed(sequence, 1, number))
        if not self.misses:
            return most
        first = self.kind(sequence) * (self.k + 1)
        chance = drawn(self.seed, sequence.request_id, 2 * number + 1) - self.proposed[first]
        while count < most and chance >= 0.0:
            count += 1
            chance -= self.proposed[first + count]
        return count

    def kind(self, sequence: Sequence) -> cython.Py_ssize_t:
        """The number of a request's law: its class by the length of its output, and its draw in it."""
        last: cython.Py_ssize_t = len(self.from_tokens) - 1
        output: cython.int = sequence.final_tokens - sequence.prompt_tokens
        drawn_kind: cython.Py_ssize_t
        if last == 0 and self.kinds == 1:
            return 0
        while last > 0 and output < self.from_tokens[last]:
            last -= 1
        drawn_kind = int(drawn(self.seed, sequence.request_id, KIND) * self.kinds)
        return last * self.kinds + drawn_kind

    def listed(self, sequence: Sequence, which: cython.int, number: cython.longlong) -> cython.int:
        lists: Any = self.told[sequence.request_id]
        counts: Any = lists[which]
        return counts[number % len(counts)]


def mixed(bits: cython.ulonglong) -> cython.ulonglong:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit decides about every other."""
    bits = (bits ^ (bits >> 30)) * cython.cast(cython.ulonglong, 0xBF58476D1CE4E5B9)
    if not cython.compiled:
        bits &= MASK
    bits = (bits ^ (bits >> 27)) * cython.cast(cython.ulonglong, 0x94D049BB133111EB)
    if not cython.compiled:
        bits &= MASK
    return bits ^ (bits >> 31)


def drawn(seed: cython.ulonglong, request_id: cython.ulonglong, number: cython.ulonglong) -> cython.double:
    """A uniform number in [0, 1) that depends on nothing but these three, all >= 0."""
    bits: cython.ulonglong = mixed(seed)
    if not cython.compiled:
        request_id = int(request_id)  # NumPy's would overflow
    bits = mixed(bits ^ mixed(request_id + 1))
    bits = mixed(bits ^ mixed(number + 1))
    return (bits >> 11) * (1.0 / 9007199254740992.0)  # 2**53: the numbers of a double's fraction
