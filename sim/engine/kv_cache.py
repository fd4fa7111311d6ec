"""The KV cache: who holds which blocks, and what of a sequence is cached (vLLM's KVCacheManager)."""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from servecast.sim.engine.block_pool import BlockPool
from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.speculation import METHODS
from servecast.sim.inputs.errors import InputError

if not cython.compiled:
    from servecast.sim.engine.block_pool import BLOCKS_PER_CONTENT, PRIVATE, UNHASHED

REMEMBERED = cython.declare(cython.int, 4096)  # different shared prefixes whose keys are kept


class KVCache:
    """Block tables over a pool, for layers that attend to everything; ``group_cache`` has those of others.

    lookahead, hash_lookahead, drops_block: see ``Speculation``. rewritten: of the newest tokens those that
    MTP modules may write once more. processed: tick of the last step that is
    complete. aligned: chunks end where states are kept.

    Args:
        config: flags and pool size.
        reuse_unhashed_first: see ``Rules.reuse_unhashed_first``.
        rows: sequences that run at most.
    """

    def __init__(self, config: Any, reuse_unhashed_first: bool, rows: cython.int) -> None:
        speculation = config.speculation
        self.lookahead = self.hash_lookahead = self.load_lookahead = 0
        self.drops_block, self.reserves_at_admission, self.rewritten = False, True, 0
        if speculation is not None:
            self.lookahead, self.hash_lookahead = speculation.lookahead, speculation.hash_lookahead
            self.drops_block = speculation.drops_block
            self.rewritten = max(0, speculation.prompt_lookahead - 1)
            rules = draft_rules_for(config.version)
            self.reserves_at_admission = rules.reserves_at_admission
            if rules.reserves_for_loads and not METHODS[speculation.method].takes_hidden_states:
                self.load_lookahead = self.lookahead
        self.pool = BlockPool(config.num_gpu_blocks)
        self.reuse_unhashed_first = reuse_unhashed_first
        self.prefix_caching = config.enable_prefix_caching
        if self.prefix_caching and self.drops_block and config.block_size <= self.rewritten:
            raise InputError(
                f"{self.rewritten + 1} drafts by several MTP modules, with KV blocks of {config.block_size}",
                where="speculative_config.num_speculative_tokens",
                fix="Use larger blocks, or fewer drafts: vLLM's prefix cache wants a block for all of them.",
            )
        self.full_isl = config.scheduler_reserve_full_isl
        self.block_size = self.hash_block = config.block_size
        self.max_model_len = config.max_model_len
        self.keyed = False
        self.aligned, self.processed = False, -1
        self.width = self.blocks_for(self.max_model_len) + 1
        self.table = np.zeros((rows + 1) * self.width, np.int32)  # one row more: what a look-up finds
        self.slots = list(range(rows + 1))
        self.prefixes = {}

    @property
    def usage(self) -> float:
        """Share of the usable blocks in use, 0..1 (vllm:kv_cache_usage_perc)."""
        share: float = self.pool.usage()
        return share

    def block_ids(self, sequence: Sequence) -> list[int]:
        """The blocks that it holds."""
        first: cython.Py_ssize_t = sequence.slot * self.width
        return [int(self.table[first + i]) for i in range(sequence.blocks_end // self.block_size)]

    def hash_plainly(self) -> cython.int:
        """Hashes are the usual ones, and drafters give up the last block of a hit instead."""
        self.hash_lookahead, self.drops_block = 0, True
        return 0

    def shared_keys(self, content: tuple[tuple[int, int], ...]) -> Any:
        """Keys of the leading blocks that another request may have, too; None where there are none."""
        if not content or not (self.prefix_caching or self.keyed):
            return None
        keys: Any = self.prefixes.get(content)
        if keys is None:
            if len(self.prefixes) >= REMEMBERED:
                self.prefixes.clear()
            keys = self.prefixes[content] = self.pool.shared_keys(
                content, self.hash_block, self.hash_lookahead
            )
        return keys

    def blocks_for(self, tokens: cython.int) -> cython.int:
        if tokens > self.max_model_len:
            tokens = self.max_model_len
        return (tokens + self.block_size - 1) // self.block_size

    def most_blocks(self, tokens: cython.int) -> cython.int:
        """Blocks that a sequence of so many computed tokens holds at once, at most."""
        return self.blocks_for(tokens)

    def new_step_starts(self) -> cython.int:
        """A schedule() begins."""
        return 0

    def align_chunk(self, sequence: Sequence, start: cython.int, tokens: cython.int) -> cython.int:
        """Tokens of a chunk that begins behind ``start`` tokens, cut where it has to end."""
        return tokens

    # ---- blocks come and go -----------------------------------------------------------------------

    def get_computed_blocks(self, sequence: Sequence) -> cython.int:
        """How many leading tokens of a waiting sequence are cached; their blocks are noted in the row that it
        would get. The last token is always computed, for its logits (KVCacheManager.get_computed_blocks)."""
        row: cython.Py_ssize_t = self.slots[len(self.slots) - 1] * self.width
        index: cython.int
        block: cython.int
        shared: cython.int = 0
        key: cython.longlong
        most: cython.int = (sequence.num_tokens - 1) // self.block_size
        if not self.prefix_caching:
            return 0
        if sequence.shared_keys is not None:
            shared = len(sequence.shared_keys)
        for index in range(most):
            if index < shared:
                key = sequence.shared_keys[index]
            elif sequence.preemptions:
                key = self.private_key(sequence) + index
            else:
                most = index
                break
            block = self.pool.lookup(key)
            if block < 0:
                most = index
                break
            self.table[row + index] = block
        if self.drops_block and most > 0:  # its hidden states are needed
            most -= 1
        return most * self.block_size

    def allocate_slots(
        self, sequence: Sequence, tokens: cython.int, cached: cython.int, reserve: cython.int
    ) -> cython.bint:
        """Blocks for ``tokens`` more, behind ``cached`` tokens that ``get_computed_blocks`` has found; those
        that are full can be found from now on (KVCacheManager.allocate_slots).

        Returns:
            Whether it got them: they were free, and ``reserve`` others beside them.
        """
        hits: cython.int = cached // self.block_size
        end: cython.int = sequence.computed + cached + tokens
        held: cython.int = sequence.blocks_end // self.block_size + hits
        slots: cython.int = end
        need: cython.int
        fit: cython.int
        at: cython.Py_ssize_t
        i: cython.int
        if self.lookahead and (sequence.slot >= 0 or self.reserves_at_admission):
            slots += self.lookahead
        fit = need = max(self.blocks_for(slots) - held, 0)
        if sequence.slot < 0:  # an admission
            at = self.slots[len(self.slots) - 1] * self.width
            for i in range(hits):  # those that lie free are taken from the free list, too
                if self.pool.ref[self.table[at + i]] == 0:
                    reserve += 1
            if self.full_isl:  # full_sequence_must_fit
                fit = max(need, self.blocks_for(sequence.num_tokens) - hits)
        if fit + reserve > self.pool.free_blocks:
            return False
        if sequence.slot < 0:
            sequence.slot = self.slots.pop()
            self.touch(sequence, hits)
        at = sequence.slot * self.width + held
        for i in range(need):
            self.table[at + i] = self.pool.take()
        sequence.blocks_end += need * self.block_size
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
        """``allocate_slots`` for one that waits, where there is a connector: it may hold blocks already, and
        ``external`` tokens behind those that are cached are loaded. ``others`` more blocks must stay free
        beside those of now. Without ``tokens`` they are loaded aside, and nothing of it can be found yet."""
        hits: cython.int = cached // self.block_size
        end: cython.int = sequence.computed + cached + external + tokens
        held: cython.int = sequence.blocks_end // self.block_size + hits
        ahead: cython.int = 0
        need: cython.int
        at: cython.Py_ssize_t
        i: cython.int
        if not tokens:
            ahead = self.load_lookahead
        elif self.reserves_at_admission or sequence.computed > 0:
            ahead = self.lookahead
        need = max(0, self.blocks_for(end + ahead) - held)
        if sequence.slot < 0:
            if len(self.slots) < 2:
                self.add_rows()
            at = self.slots[len(self.slots) - 1] * self.width
            for i in range(hits):
                reserve += self.pool.ref[self.table[at + i]] == 0
        if (
            self.full_isl
            and max(0, self.blocks_for(sequence.num_tokens) - held) + reserve > self.pool.free_blocks
        ):
            return False
        if need + reserve + others > self.pool.free_blocks:
            return False
        if sequence.slot < 0:
            sequence.slot = self.slots.pop()
            self.touch(sequence, hits)
        at = sequence.slot * self.width + held
        for i in range(need):
            self.table[at + i] = self.pool.take()
        sequence.blocks_end += need * self.block_size
        if tokens:
            self.cache_blocks(sequence, min(end, sequence.num_tokens))
        return True

    def add_rows(self) -> cython.int:
        """Who waits or has ended may hold blocks, too: twice the rows."""
        rows: cython.Py_ssize_t = self.table.shape[0] // self.width
        self.table = np.concatenate((np.asarray(self.table), np.zeros_like(np.asarray(self.table))))
        self.slots = [*range(rows, 2 * rows), *self.slots]
        return 0

    def blocks_of(self, tokens: cython.int) -> cython.int:
        """Blocks that so many tokens fill, all groups."""
        return (tokens + self.block_size - 1) // self.block_size

    def missing_blocks(self, sequence: Sequence, drafts: cython.int) -> cython.int:
        """What it still needs for all its tokens and so many of drafts."""
        tokens: cython.int = min(sequence.num_tokens, self.max_model_len) + drafts
        return (tokens + self.block_size - 1) // self.block_size - sequence.blocks_end // self.block_size

    def trim(self, sequence: Sequence) -> cython.int:
        """Give back what nobody reads any more (remove_skipped_blocks)."""
        return 0

    def touch(self, sequence: Sequence, hits: cython.int) -> cython.int:
        """Hold cached blocks, too (BlockPool.touch)."""
        row: cython.Py_ssize_t = sequence.slot * self.width
        i: cython.int
        block: cython.int
        for i in range(hits):
            block = self.table[row + i]
            if self.pool.ref[block] == 0:
                self.pool.unlink(block)
            self.pool.ref[block] += 1
        sequence.blocks_end = sequence.cached_end = hits * self.block_size
        return 0

    def free(self, sequence: Sequence) -> cython.int:
        """Give its blocks back, last one first, so that a prefix outlives what follows it
        (BlockPool.free_blocks); see ``Rules`` for those without a hash."""
        pool: BlockPool = self.pool
        row: cython.Py_ssize_t = sequence.slot * self.width
        count: cython.int = sequence.blocks_end // self.block_size
        i: cython.int
        block: cython.int
        for i in range(count):
            block = self.table[row + count - 1 - i]
            pool.ref[block] -= 1
            if pool.ref[block] == 0 and (pool.key[block] != UNHASHED or not self.reuse_unhashed_first):
                pool.append(block)
        if self.reuse_unhashed_first:
            for i in range(count):
                block = self.table[row + i]
                if pool.ref[block] == 0 and pool.key[block] == UNHASHED:
                    pool.prepend(block)
        self.slots.append(sequence.slot)
        sequence.slot = -1
        sequence.blocks_end = sequence.cached_end = 0
        return 0

    def free_later(self, sequence: Sequence) -> cython.int:
        """``free`` of blocks that a step in flight could write (_drain_deferred_frees)."""
        return self.free(sequence)

    # ---- what can be found ------------------------------------------------------------------------

    def cache_blocks(self, sequence: Sequence, tokens: cython.int) -> cython.int:
        """The full blocks among the first ``tokens`` tokens can be found from now on. A content that only its
        own request can ask for has a mark until the request is preempted."""
        pool: BlockPool = self.pool
        row: cython.Py_ssize_t = sequence.slot * self.width
        index: cython.int = sequence.cached_end // self.block_size
        known: cython.int = sequence.num_tokens - self.hash_lookahead
        end: cython.int = min(tokens - self.rewritten, known) // self.block_size
        shared: cython.int = 0
        key: cython.longlong
        told: list = None
        sequence.kv_due = sequence.blocks_end + 1 - self.lookahead
        if not self.prefix_caching:
            return 0
        if index < end:
            if sequence.shared_keys is not None:
                shared = len(sequence.shared_keys)
                if pool.on_store is not None and index < shared:
                    told = [pool.public_key(key) for key in sequence.shared_keys[index:end]]
            while index < end:
                if index < shared:
                    key = sequence.shared_keys[index]
                    pool.cache(self.table[row + index], key)
                elif sequence.preemptions:
                    pool.cache(self.table[row + index], self.private_key(sequence) + index)
                else:
                    pool.key[self.table[row + index]] = PRIVATE
                index += 1
            sequence.cached_end = end * self.block_size
            if told:
                pool.on_store(told)
        sequence.kv_due = min(sequence.kv_due, sequence.cached_end + self.block_size)
        return 0

    def private_key(self, sequence: Sequence) -> cython.longlong:
        return (2 * sequence.serial + 1) * BLOCKS_PER_CONTENT

    def block_key(self, sequence: Sequence, index: cython.int) -> cython.longlong:
        """What its block of that index holds."""
        if sequence.shared_keys is not None and index < len(sequence.shared_keys):
            return sequence.shared_keys[index]
        return self.private_key(sequence) + index

    def publish(self, sequence: Sequence) -> cython.int:
        """It is preempted: from now on it may look for what is its own."""
        pool: BlockPool = self.pool
        row: cython.Py_ssize_t = sequence.slot * self.width
        i: cython.int
        for i in range(sequence.cached_end // self.block_size):
            if pool.key[self.table[row + i]] == PRIVATE:
                pool.cache(self.table[row + i], self.private_key(sequence) + i)
        return 0
