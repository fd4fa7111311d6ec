"""The KV cache of models whose layers do not all keep the same: several lists of blocks a sequence.

vLLM has a manager for each group (single_type_kv_cache_manager.py) and a coordinator over them
(kv_cache_coordinator.py); here a group is a row of numbers, and what its kind decides is a branch. All groups
take their blocks from one pool; the null block, 0, stands where a group holds none.
"""

from __future__ import annotations

from array import array
from typing import Any

import cython
import numpy as np

from servecast.sim.engine.block_pool import BlockPool
from servecast.sim.engine.group_rules import group_rules_for
from servecast.sim.engine.kv_cache import KVCache
from servecast.sim.engine.kv_groups import hash_block, in_flight_tokens, most_blocks, scheduler_block
from servecast.sim.engine.sequence import Sequence
from servecast.sim.inputs.errors import InputError

if not cython.compiled:
    from servecast.sim.engine.block_pool import GROUP_SHIFT, PRIVATE, UNHASHED

    FULL, SLIDING, CHUNKED, MAMBA = range(4)
    DENSE, FAR = -1, 1 << 30

KINDS = ("full", "sliding", "chunked", "mamba")


class GroupCache(KVCache):
    """Which blocks each sequence holds in each group, and which of them a look-up finds.

    A slot is a running sequence's row; one more row holds what a look-up finds, until it is admitted.

    drops: whether a group gives up the last block of a hit for a drafter.
    held: blocks of a sequence in a group, null ones included. cached: those that were judged for the prefix
    cache. last_state: the block of the state before the newest one. retired: leading blocks that were
    given back. saves: whether the chunk in hand saves a state inside itself. fresh: keys of
    states that were registered in this schedule().

    Args: see ``KVCache``.
    """

    def __init__(self, config: Any, reuse_unhashed_first: bool, rows: cython.int) -> None:
        super().__init__(config, reuse_unhashed_first, rows)
        rules = group_rules_for(config.version)
        specs = config.kv_groups
        self.specs, self.count, self.hybrid = specs, len(specs), len(specs) > 1
        if config.speculation is not None:
            self.refuse_drafts(config.version, config.speculation, {spec.kind for spec in specs})
        kinds = config.speculation.drafter_kinds if config.speculation is not None else ()
        self.drafts_at = ints(not kinds or spec.kind in kinds for spec in specs)
        self.drops = ints(self.drops_block and here for here in self.drafts_at)
        self.drops_somewhere = any(self.drops)
        self.loads_in_turn = rules.loads_group_by_group
        self.checks_last_block = rules.checks_last_block
        self.keeps_replays = rules.keeps_replays_of_drops
        self.doubts_drafts, self.proves_states = rules.doubts_drafts, rules.looks_past_states
        self.splits_windows = rules.splits_freed_windows
        self.trims_processed, self.pins_junctions = rules.trims_what_is_processed, rules.pins_junctions
        self.retains_states, self.retires_states = rules.retains_states, rules.retires_all_states
        self.registers_tail = rules.registers_boundary_state
        self.registers_again = rules.registers_boundary_state_again
        self.aligns_ends = rules.aligns_chunk_ends
        self.spares_last = rules.keeps_last_token_from_states
        self.scheduler_block = scheduler_block(specs)
        self.hash_block = hash_block(specs, caching=self.prefix_caching)
        retention = config.prefix_cache_retention_interval
        self.retention = DENSE if retention is None else retention
        chunk = config.max_num_batched_tokens
        if config.long_prefill_token_threshold:
            chunk = min(chunk, config.long_prefill_token_threshold)
        self.largest_chunk = chunk
        self.in_flight = in_flight_tokens(
            config.version, config.max_num_batched_tokens, async_scheduling=config.async_scheduling
        )
        self.kind = ints(KINDS.index(spec.kind) for spec in specs)
        self.block = ints(spec.block_size for spec in specs)
        self.ratio = ints(max(1, spec.block_size // self.hash_block) for spec in specs)
        self.window = ints(spec.window for spec in specs)
        self.run = ints(-(-(spec.window - 1) // spec.block_size) for spec in specs)
        self.cap = ints(
            most_blocks(spec, self.max_model_len, self.in_flight)
            if spec.kind in ("sliding", "chunked")
            else 0
            for spec in specs
        )
        self.checkpoint = ints(spec.checkpoint for spec in specs)
        self.spare = ints(spec.drafts for spec in specs)
        self.by_state = ints(spec.kind == "mamba" and spec.mode == "align" for spec in specs)
        self.aligned = any(self.by_state)
        together: list[list[int]] = []
        for g, spec in enumerate(specs):
            same = [members for members in together if specs[members[0]] == spec]
            if same:
                same[0].append(g)
            else:
                together.append([g])
        together.sort(key=lambda members: specs[members[0]].kind != "full")
        self.lookups = len(together)
        self.simple = self.lookups == 2 and specs[together[0][0]].kind == "full"
        starts = [sum(map(len, together[:i])) for i in range(self.lookups + 1)]
        self.first, self.member = ints(starts), ints(g for members in together for g in members)
        self.found = ints(0 for _ in together)
        self.width = -(-self.max_model_len // self.block_size) + 2 + max(self.spare)
        self.told = next((g for g, spec in enumerate(specs) if spec.kind == "full"), -1)
        self.code = ints(0 if g == self.told else g + 1 for g in range(self.count))
        none, lists = ints([0]), (rows + 1) * self.count
        self.table = np.zeros(lists * self.width, np.int32)
        self.held, self.cached, self.saves, self.retired = (none * lists for _ in range(4))
        self.last_state = ints([-1]) * lists
        self.freed = none * (self.width * self.count)
        self.fresh = set()

    def hash_plainly(self) -> cython.int:
        self.hash_lookahead, self.drops_block = 0, True
        self.drops, self.drops_somewhere = self.drafts_at, any(self.drafts_at)
        return 0

    def refuse_drafts(self, version: str, speculation: Any, kinds: set) -> cython.int:
        """Raises: InputError: vLLM refuses such drafts beside such layers, or they are not modelled."""
        what: str = ""
        fix: str = "Leave it out, take ngram or suffix, or disable_hybrid_kv_cache_manager."
        if any([spec.checkpoint for spec in self.specs]):
            what = f"vLLM {version} ends where drafts cross a block and a chunk can save a state in itself"
            fix = "Leave it out, or turn prefix caching off."
        elif speculation.prompt_lookahead:
            what = "several MTP modules for layers that do not all keep the same: not modelled"
        elif self.drops_block and "chunked" in kinds:
            what = "vLLM's hybrid KV cache is not supported for EAGLE and chunked local attention"
        if what:
            raise InputError(what, where="speculative_config", fix=fix)
        return 0

    def block_ids(self, sequence: Sequence) -> list[Any]:
        """A list a group; 0 where it holds none."""
        slot = sequence.slot
        if slot < 0:
            return [[] for _ in self.specs]
        rows = np.asarray(self.table).reshape(-1, self.width)
        return [rows[i, : self.held[i]].tolist() for i in range(slot * self.count, (slot + 1) * self.count)]

    def most_blocks(self, tokens: cython.int) -> cython.int:
        """Blocks that a sequence of so many computed tokens holds at once, at most, all groups."""
        return sum(most_blocks(spec, tokens, self.in_flight) for spec in self.specs)

    def new_step_starts(self) -> cython.int:
        self.fresh.clear()
        return 0

    # ---- look-up ----------------------------------------------------------------------------------

    def known(self, sequence: Sequence, group: cython.int) -> cython.int:
        """Blocks of a sequence, from its first one on, whose content may be cached."""
        if sequence.preemptions:
            return FAR
        if sequence.shared_keys is None:
            return 0
        return len(sequence.shared_keys) // self.ratio[group]

    def key(self, sequence: Sequence, group: cython.int, index: cython.int) -> cython.longlong:
        """Of the content at the end of a group's block."""
        at: cython.int = (index + 1) * self.ratio[group] - 1
        key: cython.longlong
        if sequence.shared_keys is not None and at < len(sequence.shared_keys):
            key = sequence.shared_keys[at]
        else:
            key = self.private_key(sequence) + at
        return key | (cython.cast(cython.longlong, self.code[group]) << GROUP_SHIFT)

    def in_all(
        self, lookup: cython.int, sequence: Sequence, slot: cython.int, index: cython.int
    ) -> cython.bint:
        """Whether every group of a look-up has a block; they are written down."""
        g: cython.int
        block: cython.int
        i: cython.int
        for i in range(self.first[lookup], self.first[lookup + 1]):
            g = self.member[i]
            block = self.pool.lookup(self.key(sequence, g, index))
            if block < 0:
                return False
            self.table[(slot * self.count + g) * self.width + index] = block
        return True

    def keep_found(
        self, lookup: cython.int, slot: cython.int, nulls: cython.int, blocks: cython.int
    ) -> cython.int:
        """What was found has this many blocks, the first of them null. Returns its tokens."""
        g: cython.int
        i: cython.int
        j: cython.int
        row: cython.Py_ssize_t
        for i in range(self.first[lookup], self.first[lookup + 1]):
            g = self.member[i]
            row = (slot * self.count + g) * self.width
            self.held[slot * self.count + g] = blocks
            for j in range(nulls):
                self.table[row + j] = 0
        return blocks * self.block[self.member[self.first[lookup]]]

    def find(
        self, lookup: cython.int, sequence: Sequence, slot: cython.int, limit: cython.int, drop: cython.int
    ) -> cython.int:
        """The longest hit up to ``limit`` tokens in the groups of one spec, ``drop`` of its blocks given up
        again for a drafter (find_longest_cache_hit)."""
        g: cython.int = self.member[self.first[lookup]]
        b: cython.int = self.block[g]
        step: cython.int = self.scheduler_block if self.hybrid else b
        most: cython.int = limit // b
        known: cython.int = min(most, self.known(sequence, g))
        kind: cython.int = self.kind[g]
        n: cython.int = 0
        i: cython.int
        run: cython.int = 0
        if kind == FULL:
            while n < known and self.in_all(lookup, sequence, slot, n):
                n += 1
            n = max(0, n - drop)
            return self.keep_found(lookup, slot, 0, n * b // step * step // b)
        if kind == CHUNKED:
            i = limit // self.window[g] * self.window[g] // b
            n = i
            while n < known and self.in_all(lookup, sequence, slot, n):
                n += 1
            return self.keep_found(lookup, slot, i, n)
        i = known - 1
        while i >= 0:
            if run == 0 and (i + 1 - drop) * b % step:
                pass
            elif not self.in_all(lookup, sequence, slot, i):
                run = 0
            else:
                run += 1
                if kind == MAMBA or run >= self.run[g] + drop:
                    return self.keep_found(lookup, slot, i, self.whole_steps(i + run - drop, b, step))
            i -= 1
        if kind == MAMBA:
            run = 0
        run = self.whole_steps(run, b, step)
        return self.keep_found(lookup, slot, 0, self.whole_steps(max(0, run - drop), b, step))

    def whole_steps(self, blocks: cython.int, b: cython.int, step: cython.int) -> cython.int:
        """As many of these blocks of b tokens as fill whole steps."""
        while blocks * b % step:
            blocks -= 1
        return blocks

    def get_computed_blocks(self, sequence: Sequence) -> cython.int:
        """Tokens that are cached in all groups; the last token is always computed. Remembers how far some
        group would have reached (KVCacheManager.get_computed_blocks, HybridKVCacheCoordinator)."""
        slot: cython.int = self.slots[len(self.slots) - 1]
        hit: cython.int = sequence.num_tokens - 1
        longest: cython.int = 0
        current: cython.int
        again: cython.bint = False
        g: cython.int
        i: cython.int
        look: cython.int
        drop: cython.int
        limit: cython.int
        before: cython.int
        proven: cython.int = 0  # bits of the look-ups that gave up a block for this length
        most: cython.int = sequence.num_tokens - 1
        if self.checks_last_block:
            most = (sequence.num_tokens - self.hash_lookahead) // self.hash_block * self.hash_block
        if not self.prefix_caching:
            return 0
        while True:
            current = hit
            for look in range(self.lookups):
                g = self.member[self.first[look]]
                if again and self.kind[g] == FULL:
                    if self.pins_junctions:
                        current = min(current, self.found[look])
                    else:
                        current = current // self.block[g] * self.block[g]
                    continue
                drop = self.drops[g] if not proven >> look & 1 else 0
                limit = before = current
                if drop and self.hybrid and (self.kind[g] != MAMBA or self.proves_states):
                    limit = min(current + self.block[g], most)
                current = self.find(look, sequence, slot, limit, drop if self.kind[g] != MAMBA else 0)
                if drop:
                    proven |= 1 << look
                elif current < before:
                    proven = 0
                self.found[look] = current
                longest = max(longest, current)
            if current >= hit:
                break
            hit = current
            if self.simple or not self.hybrid:
                break
            again = True
        for g in range(self.count):
            if self.kind[g] == FULL:
                i = slot * self.count + g
                self.held[i] = min(self.held[i], (hit + self.block[g] - 1) // self.block[g])
        sequence.junction = longest if longest > hit and self.pins_junctions and self.hybrid else 0
        return hit

    # ---- blocks needed, taken and given back ------------------------------------------------------

    def skipped(self, group: cython.int, tokens: cython.int) -> cython.int:
        """Blocks that nobody reads any more, with these tokens computed (get_num_skipped_tokens)."""
        kind: cython.int = self.kind[group]
        gone: cython.int = 0
        if kind == SLIDING:
            gone = tokens - self.window[group] + 1
        elif kind == CHUNKED:
            gone = tokens // self.window[group] * self.window[group]
        elif kind == MAMBA:
            gone = tokens - 1
        return gone // self.block[group] if gone > 0 else 0

    def saves_inside(
        self, sequence: Sequence, group: cython.int, at: cython.int, start: cython.int, end: cython.int
    ) -> cython.bint:
        """Whether a chunk that ends a prefill saves a state before its end (_needs_internal_checkpoint).
        at: of the blocks that the sequence holds; -1: none yet."""
        b: cython.int = self.block[group]
        position: cython.int = self.boundary(end, self.scheduler_block)
        column: cython.int = (end + b - 1) // b - 2
        if not self.checkpoint[group]:
            return False
        if self.retention == 0 and end < self.prefill_end(sequence):
            return False
        if not self.fits_inside(start, end, position, b, self.checkpoint[group]) or column < 0:
            return False
        if at < 0 or column >= self.held[at]:
            return True
        return self.table[at * self.width + column] == 0

    def fits_inside(
        self, start: cython.int, end: cython.int, position: cython.int, b: cython.int, step: cython.int
    ) -> cython.bint:
        """Whether a state at ``position`` can be saved in a chunk (is_mamba_prefill_checkpoint_valid)."""
        before: cython.int = (start - 1) // b if start > 0 else -1
        return (
            start % self.hash_block == 0
            and (end + b - 1) // b - 2 > before
            and start + self.hash_block <= position
            and position < end
            and (position - start) % step == 0
        )

    def boundary(self, tokens: cython.int, size: cython.int) -> cython.int:
        """Where the last state of so many tokens is kept that a hit may end with
        (get_mamba_prefill_checkpoint_position)."""
        if self.drops_block:
            return max(tokens // size - 1, 0) * size
        return max(tokens - max(self.spares_last, self.hash_lookahead), 0) // size * size

    def prefill_end(self, sequence: Sequence) -> cython.int:
        return max(sequence.prompt_tokens, sequence.num_tokens - 1)

    def needed(
        self,
        sequence: Sequence,
        slot: cython.int,
        computed: cython.int,
        end: cython.int,
        admits: cython.bint,
        gate: cython.bint,
    ) -> cython.int:
        """Free blocks that it takes to compute up to ``end``, all groups (get_num_blocks_to_allocate).

        Args:
            computed: tokens that are computed, hits included. admits: its blocks are hits that are to be
                taken, too. gate: the whole prompt is looked at, no more than what is held at once.
        """
        total: cython.int = 0
        g: cython.int
        i: cython.int
        at: cython.int
        b: cython.int
        need: cython.int
        gone: cython.int
        saves: cython.bint
        slots: cython.int = min(end if gate else self.ahead(end, admits), self.max_model_len)
        row: cython.Py_ssize_t
        for g in range(self.count):
            at = slot * self.count + g
            row = at * self.width
            b = self.block[g]
            gone = 0
            if admits and self.kind[g] == MAMBA and self.held[at]:
                i = self.table[row + self.held[at] - 1]
                if i and self.pool.key[i] in self.fresh:
                    return self.pool.num_blocks + 1  # a state that is computed in this step
            if self.by_state[g]:
                saves = self.saves_inside(sequence, g, -1 if admits else at, computed, end)
                if not gate:
                    self.saves[at] = saves
                need = (end + b - 1) // b + self.spare[g] - self.held[at]
                need = min(need, 1 + saves + (self.spare[g] if admits else 0))
            else:
                need = (slots + b - 1) // b + self.spare[g]
                if gate and self.cap[g]:
                    need = min(need, self.cap[g])
                if admits:
                    gone = self.skipped(g, computed)
                need = max(need - max(gone, self.held[at]), 0)
            total += need
            if admits:
                for i in range(gone, self.held[at]):
                    if self.table[row + i] and self.pool.ref[self.table[row + i]] == 0:
                        total += 1
        return total

    def allocate_slots(
        self, sequence: Sequence, tokens: cython.int, cached: cython.int, reserve: cython.int
    ) -> cython.bint:
        """As ``KVCache.allocate_slots``; gives back first what is out of the window."""
        admits: cython.bint = sequence.slot < 0
        computed: cython.int = sequence.computed + cached
        end: cython.int = computed + tokens
        slot: cython.int = sequence.slot
        need: cython.int = 0
        if admits:
            slot = self.slots[len(self.slots) - 1]
            if self.full_isl:  # full_sequence_must_fit
                need = min(sequence.num_tokens, self.max_model_len)
                need = self.needed(sequence, slot, computed, need, True, True)
        else:
            self.trim(sequence)
        need = max(need, self.needed(sequence, slot, computed, end, admits, False))
        if need + reserve > self.pool.free_blocks:
            return False
        if admits:
            sequence.slot = self.slots.pop()
            self.adopt(slot, computed, 0)
        self.take(slot, end, admits)
        self.cache_blocks(sequence, min(end, sequence.num_tokens))
        return True

    def allocate_remote(
        self,
        sequence: Sequence,
        tokens: cython.int,
        external: cython.int,
        cached: cython.int,
        reserve: cython.int,
        others: cython.int,
    ) -> cython.bint:
        admits: cython.bint = sequence.slot < 0
        computed: cython.int = sequence.computed + cached + external
        end: cython.int = computed + tokens
        slots: cython.int = end if tokens else end + self.load_lookahead - self.ahead(0, admits)
        slot: cython.int = sequence.slot
        most: cython.int = min(sequence.num_tokens, self.max_model_len)
        if admits:
            if len(self.slots) < 2:
                self.add_rows()
            slot = self.slots[len(self.slots) - 1]
        free: cython.int = self.pool.free_blocks
        if self.full_isl and self.needed(sequence, slot, computed, most, admits, True) + reserve > free:
            return False
        if not admits:
            self.trim(sequence)
        reserve += others
        if self.needed(sequence, slot, computed, slots, admits, False) + reserve > self.pool.free_blocks:
            return False
        if admits:
            sequence.slot = self.slots.pop()
            self.adopt(slot, computed, external)
        self.take(slot, slots, admits)
        if tokens:
            self.cache_blocks(sequence, min(end, sequence.num_tokens))
        return True

    def add_rows(self) -> cython.int:
        lists: cython.Py_ssize_t = len(self.held)
        rows: cython.Py_ssize_t = lists // self.count
        none: Any = ints([0]) * lists
        self.table = np.concatenate((np.asarray(self.table), np.zeros_like(np.asarray(self.table))))
        self.held, self.cached = ints(self.held) + none, ints(self.cached) + none
        self.saves, self.retired = ints(self.saves) + none, ints(self.retired) + none
        self.last_state = ints(self.last_state) + ints([-1]) * lists
        self.slots = [*range(rows, 2 * rows), *self.slots]
        return 0

    def blocks_of(self, tokens: cython.int) -> cython.int:
        g: cython.int
        total: cython.int = 0
        for g in range(self.count):
            total += (tokens + self.block[g] - 1) // self.block[g]
        return total

    def missing_blocks(self, sequence: Sequence, drafts: cython.int) -> cython.int:
        g: cython.int
        need: cython.int
        total: cython.int = 0
        tokens: cython.int = min(sequence.num_tokens, self.max_model_len) + drafts
        for g in range(self.count):
            need = (tokens + self.block[g] - 1) // self.block[g]
            if self.cap[g]:
                need = min(need, self.cap[g])
            if sequence.slot >= 0:
                need -= self.held[sequence.slot * self.count + g]
            total += max(need, 0)
        return total

    def ahead(self, end: cython.int, admits: cython.bint) -> cython.int:
        """Tokens up to which slots are reserved where a step computes up to ``end``."""
        return end + self.lookahead if self.reserves_at_admission or not admits else end

    def trim(self, sequence: Sequence) -> cython.int:
        """Give back what is out of the window (remove_skipped_blocks)."""
        g: cython.int
        i: cython.int
        n: cython.int
        at: cython.int
        first: cython.int
        end: cython.int
        row: cython.Py_ssize_t
        told: cython.int
        slot: cython.int = sequence.slot
        tokens: cython.int = sequence.computed
        if self.trims_processed and sequence.scheduled_tick > self.processed:
            tokens -= sequence.scheduled_tokens  # its step is in flight
            if sequence.previous_tick > self.processed:
                tokens -= sequence.previous_tokens
            tokens = max(0, tokens)
        told = tokens
        for g in range(self.count):
            if self.kind[g] == FULL:
                continue
            at = slot * self.count + g
            row = at * self.width
            if self.doubts_drafts:  # all in flight may be rejected
                tokens = max(0, told - self.spare[g])
            end = min(self.skipped(g, tokens), self.held[at])
            n = 0
            if self.by_state[g] and self.retires_states:
                first = self.retired[at]
                if end > first:
                    self.retired[at] = end
                for i in range(end - 1, first - 1, -1):
                    if self.table[row + i]:
                        self.freed[n] = self.table[row + i]
                        self.table[row + i] = 0
                        n += 1
            else:
                i = end - 1
                while i >= 0 and self.table[row + i]:
                    self.publish_block(sequence, g, i)
                    self.freed[n] = self.table[row + i]
                    self.table[row + i] = 0
                    n += 1
                    i -= 1
                self.retired[at] = max(self.retired[at], end)
            self.give_back(n, self.reuse_unhashed_first or self.splits_windows)
            if self.by_state[g] and self.last_state[at] >= 0:
                i = self.last_state[at]
                if i < (tokens + self.block[g] - 1) // self.block[g] - 1 and self.table[row + i]:
                    self.freed[0] = self.table[row + i]
                    self.table[row + i] = 0
                    self.give_back(1, self.reuse_unhashed_first)
        return 0

    def give_back(self, count: cython.int, split: cython.bint) -> cython.int:
        """The first ``count`` of ``freed``, to be reused in this order; ``split``: those without a hash
        before all others (BlockPool.free_blocks)."""
        pool: BlockPool = self.pool
        i: cython.int
        block: cython.int
        for i in range(count):
            block = self.freed[i]
            pool.ref[block] -= 1
            if pool.ref[block] == 0 and (not split or pool.key[block] != UNHASHED):
                pool.append(block)
        if split:
            for i in range(count - 1, -1, -1):
                block = self.freed[i]
                if pool.ref[block] == 0 and pool.key[block] == UNHASHED:
                    pool.prepend(block)
        return 0

    def adopt(self, slot: cython.int, hit: cython.int, external: cython.int) -> cython.int:
        """What a look-up found becomes the sequence's, and it gets blocks for the ``external`` tokens among
        ``hit`` (allocate_new_computed_blocks)."""
        pool: BlockPool = self.pool
        g: cython.int
        i: cython.int
        at: cython.int
        gone: cython.int
        block: cython.int
        row: cython.Py_ssize_t
        for g in range(self.count):
            at = slot * self.count + g
            row = at * self.width
            gone = self.skipped(g, hit)
            self.last_state[at], self.retired[at] = -1, 0 if self.by_state[g] else gone
            for i in range(gone):
                self.table[row + i] = 0
            for i in range(gone, self.held[at]):
                block = self.table[row + i]
                if block:
                    if pool.ref[block] == 0:
                        pool.unlink(block)
                    pool.ref[block] += 1
            self.held[at] = self.cached[at] = max(gone, self.held[at])
            if external and self.loads_in_turn:
                self.take_loaded(g, at, hit)
        if external and not self.loads_in_turn:
            for g in range(self.count):
                self.take_loaded(g, slot * self.count + g, hit)
        return 0

    def take_loaded(self, group: cython.int, at: cython.int, tokens: cython.int) -> cython.int:
        """Blocks for what is loaded, up to ``tokens`` (allocate_external_computed_blocks)."""
        b: cython.int = self.block[group]
        w: cython.int = self.window[group]
        out: cython.bint = (
            w == 1 if self.kind[group] == SLIDING else self.kind[group] == CHUNKED and tokens % w == 0
        )
        if out and (tokens >= b or not self.loads_in_turn):
            return 0  # nobody reads it any more
        while self.held[at] < (tokens + b - 1) // b:
            self.table[at * self.width + self.held[at]] = self.pool.take()
            self.held[at] += 1
        return 0

    def take(self, slot: cython.int, end: cython.int, admits: cython.bint) -> cython.int:
        """Blocks for all tokens up to ``end`` (allocate_new_blocks)."""
        g: cython.int
        at: cython.int
        b: cython.int
        i: cython.int
        need: cython.int
        nulls: cython.int
        spare: cython.int
        before: cython.int
        row: cython.Py_ssize_t
        slots: cython.int = min(self.ahead(end, admits), self.max_model_len)
        for g in range(self.count):
            at = slot * self.count + g
            row = at * self.width
            b = self.block[g]
            spare = self.spare[g]
            need = (slots + b - 1) // b + spare
            if self.by_state[g]:
                need = (end + b - 1) // b + spare
                before = self.held[at]
                if need <= before and not self.saves[at]:
                    continue
                if before:
                    self.last_state[at] = before - 1 - (0 if admits else spare)
                nulls = need - spare - 1 - self.saves[at]
                while self.held[at] < nulls:
                    self.table[row + self.held[at]] = 0
                    self.held[at] += 1
                for i in range(before if admits else before - spare, min(before, nulls)):
                    self.table[row + self.held[at]] = self.table[row + i]  # those of drafts move along
                    self.table[row + i] = 0
                    self.held[at] += 1
            while self.held[at] < need:
                self.table[row + self.held[at]] = self.pool.take()
                self.held[at] += 1
        return 0

    def publish(self, sequence: Sequence) -> cython.int:
        """As ``KVCache.publish``; what left its window was published then."""
        g: cython.int
        i: cython.int
        for g in range(self.count):
            for i in range(self.held[sequence.slot * self.count + g]):
                self.publish_block(sequence, g, i)
        return 0

    def publish_block(self, sequence: Sequence, group: cython.int, index: cython.int) -> cython.int:
        """What only its sequence can ask for gets its key."""
        block: cython.int = self.table[(sequence.slot * self.count + group) * self.width + index]
        if self.pool.key[block] == PRIVATE:
            self.pool.cache(block, self.key(sequence, group, index))
        return 0

    def free(self, sequence: Sequence) -> cython.int:
        """Give everything back, group by group, last blocks first."""
        g: cython.int
        for g in range(self.count):
            self.give_back(
                self.collect(sequence.slot * self.count + g, 0),
                self.reuse_unhashed_first or (self.splits_windows and self.kind[g] == SLIDING),
            )
        self.slots.append(sequence.slot)
        sequence.slot = -1
        return 0

    def free_later(self, sequence: Sequence) -> cython.int:
        """All groups at once, the last of them first."""
        g: cython.int
        n: cython.int = 0
        for g in range(self.count - 1, -1, -1):
            n = self.collect(sequence.slot * self.count + g, n)
        self.give_back(n, self.reuse_unhashed_first)
        self.slots.append(sequence.slot)
        sequence.slot = -1
        return 0

    def collect(self, at: cython.int, n: cython.int) -> cython.int:
        """Its blocks in a group go behind the first ``n`` of ``freed``, last ones first; returns how many
        these are."""
        i: cython.int
        row: cython.Py_ssize_t = at * self.width
        for i in range(self.held[at] - 1, -1, -1):
            if self.table[row + i]:
                self.freed[n] = self.table[row + i]
                n += 1
        self.held[at] = self.cached[at] = self.retired[at] = self.saves[at] = 0
        self.last_state[at] = -1
        return n

    # ---- which blocks are kept for others ---------------------------------------------------------

    def cache_blocks(self, sequence: Sequence, tokens: cython.int) -> cython.int:
        """The full blocks among the first ``tokens`` tokens can be found from now on (cache_blocks); marks
        are as in ``KVCache.cache_blocks``, but a state always has its key."""
        g: cython.int
        i: cython.int
        at: cython.int
        end: cython.int
        block: cython.int
        key: cython.longlong
        row: cython.Py_ssize_t
        shared: cython.int = 0
        known: cython.int
        reached: cython.int
        told: list = None
        computed: cython.int = min(tokens, sequence.num_tokens - self.hash_lookahead)
        tokens = computed
        if self.prefix_caching:
            if self.hybrid:
                tokens = tokens // self.scheduler_block * self.scheduler_block
            if self.pool.on_store is not None and sequence.shared_keys is not None:
                told, shared = [], len(sequence.shared_keys)
            for g in range(self.count):
                at = sequence.slot * self.count + g
                row = at * self.width
                reached = tokens
                if self.drops[g] and self.hybrid and tokens > 0:  # the block that proves a hit
                    reached = min(computed, tokens + self.block[g])
                end = reached // self.block[g]
                known = FAR if self.kind[g] == MAMBA else self.known(sequence, g)
                for i in range(self.cached[at], end):
                    block = self.table[row + i]
                    if block and self.reachable(sequence, g, i):
                        if i >= known:
                            self.pool.key[block] = PRIVATE
                            continue
                        key = self.key(sequence, g, i)
                        self.pool.cache(block, key)
                        if self.kind[g] == MAMBA:
                            self.fresh.add(key)
                        if told is not None and g == self.told and (i + 1) * self.ratio[g] <= shared:
                            told.append(self.pool.public_key(key))
                self.cached[at] = max(end, self.cached[at])
                if self.by_state[g] and self.registers_tail and not self.saves[at]:
                    self.register_boundary(sequence, g, at, reached)
            if told:
                self.pool.on_store(told)
        sequence.kv_due = self.due(sequence)
        return 0

    def due(self, sequence: Sequence) -> cython.int:
        """Tokens below which there is nothing to take, to give back or to cache."""
        g: cython.int
        at: cython.int
        b: cython.int
        gone: cython.int
        least: cython.int = FAR
        step: cython.int
        for g in range(self.count):
            at = sequence.slot * self.count + g
            b = self.block[g]
            least = min(least, self.held[at] * b + 1 - self.lookahead)
            step = self.scheduler_block if self.hybrid else b
            if self.prefix_caching:
                least = min(least, (self.cached[at] * b // step + 1) * step)
                if self.drops[g]:
                    least = min(least, (self.cached[at] + 1) * b)
            if self.kind[g] == MAMBA:
                return 0
            gone = self.retired[at]
            if self.kind[g] == SLIDING:
                least = min(least, (gone + 1) * b + self.window[g])
            elif self.kind[g] == CHUNKED:
                least = min(least, (gone * b // self.window[g] + 1) * self.window[g] + 1)
        return least

    def register_boundary(
        self, sequence: Sequence, group: cython.int, at: cython.int, tokens: cython.int
    ) -> cython.int:
        """The state at the prompt's last boundary counts as registered now (_cache_partial_tail_block)."""
        index: cython.int = tokens // self.block[group] - 1
        block: cython.int
        key: cython.longlong
        boundary: cython.int = self.boundary(sequence.prompt_tokens, self.hash_block)
        if tokens <= 0 or tokens != boundary or index >= self.held[at]:
            return 0
        block = self.table[at * self.width + index]
        if block == 0:
            return 0
        key = self.key(sequence, group, index)
        if self.pool.key[block] == UNHASHED:
            self.pool.cache(block, key)
        elif not self.registers_again:
            return 0
        self.fresh.add(key)
        return 0

    def reachable(self, sequence: Sequence, group: cython.int, index: cython.int) -> cython.bint:
        """Whether a look-up could ever use a block, by the retention interval (reachable_block_mask)."""
        step: cython.int = self.scheduler_block
        b: cython.int = self.block[group]
        run: cython.int = 1
        segment: cython.int = self.retention
        drop: cython.int = self.drops[group] if self.kind[group] != MAMBA else 0
        end: cython.int = sequence.prompt_tokens
        if self.kind[group] == SLIDING:
            run = self.run[group] + drop
        elif self.kind[group] != MAMBA or not self.retains_states:
            return True
        if segment == DENSE:
            if self.kind[group] == MAMBA:
                return True
            segment = step
        if segment > 0:
            segment = segment // b
            if run >= segment or (index >= drop and (index - drop) % segment >= segment - run):
                return True
        if self.retention == DENSE:
            return False
        if sequence.junction > 0 and self.ends_at(index, run, sequence.junction // step * step // b + drop):
            return True
        if not (self.drops_somewhere and self.keeps_replays):
            return self.ends_at(index, run, (end - 1) // step * step // b + drop)
        return self.ends_at(index, run, max((end - 1) // step - 1, 0) * step // b + drop) or self.ends_at(
            index, run, max(end // step - 1, 0) * step // b + drop
        )

    def ends_at(self, index: cython.int, run: cython.int, end: cython.int) -> cython.bint:
        """Whether a block is among the last ``run`` blocks before block ``end``."""
        return end - run <= index and index < end

    # ---- chunks -----------------------------------------------------------------------------------

    def align_chunk(self, sequence: Sequence, start: cython.int, tokens: cython.int) -> cython.int:
        """Tokens of a chunk that ends where a state is to be kept (_mamba_block_aligned_split)."""
        b: cython.int = self.block_size
        prefill_end: cython.int = self.prefill_end(sequence)
        end: cython.int = start + tokens
        last: cython.int
        stop: cython.int
        cut: cython.int
        inside: cython.bint
        if start >= prefill_end or tokens <= 0:
            return tokens
        last = self.boundary(sequence.num_tokens, b)
        if not self.aligns_ends:
            if end < last:
                return tokens // b * b
            return last - start if start < last < end else tokens
        inside = end >= prefill_end and self.all_save(start, end, prefill_end)
        if inside:
            last = 0
        if end < prefill_end:
            cut = end // b * b
            if cut > start or b <= self.largest_chunk:
                end = cut
        stop = end
        cut = (start // b + 1) * b
        if start % b and not inside and cut < stop:
            stop = cut
        if start < last < stop:
            stop = last
        cut = sequence.junction
        if start < cut < end:
            cut = start + (cut - start) // b * b
            if start < cut < stop:
                stop = cut
        return max(stop - start, 0)

    def all_save(self, start: cython.int, end: cython.int, prefill_end: cython.int) -> cython.bint:
        """Whether the states of all groups can be saved inside the last chunk of a prefill."""
        g: cython.int
        step: cython.int = 0
        position: cython.int = self.boundary(prefill_end, self.scheduler_block)
        for g in range(self.count):
            if self.kind[g] == MAMBA:
                if not self.checkpoint[g]:
                    return False
                step = step or self.checkpoint[g]
        return self.fits_inside(start, end, position, self.block_size, step)


def ints(values: Any) -> Any:
    return array("i", values)
