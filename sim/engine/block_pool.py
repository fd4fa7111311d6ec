"""The blocks of the KV cache: which are free, and in which a content is found."""

from __future__ import annotations

from array import array
from typing import Any

import cython
import numpy as np

if not cython.compiled:  # else the constants of block_pool.pxd
    UNHASHED, PRIVATE, BLOCKS_PER_CONTENT = -1, -2, 1 << 24
    GROUP_SHIFT = 56


class BlockPool:
    """The blocks: the list of those that are free, and which hold known content (vLLM's BlockPool).

    The free list is linked through the blocks in both directions; block 0, the null block, is its two ends. A
    content is an integer key, found through a hash table with open addresses; blocks with equal content are
    chained in the order in which they got it.

    prev, next: the free list. ref: how many hold a block. key: its content. later: the next block with equal
    content, -1 is none. table_key, table_block: the hash table.

    taken: a list that takes blocks when they are given to somebody, or None.

    ``on_store`` and ``on_evict`` are called, where they are set, with the keys of blocks whose content is
    known from now on, and with the key of one whose content is forgotten; with shared ones only.
    """

    def __init__(self, num_blocks: cython.int) -> None:
        size: cython.int = 16
        self.bits = 4
        while size < 2 * num_blocks:
            size *= 2
            self.bits += 1
        self.mask = size - 1
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks - 1
        self.prev = np.arange(-1, num_blocks - 1, dtype=np.int32)
        self.next = np.arange(1, num_blocks + 1, dtype=np.int32)
        self.prev[0], self.next[num_blocks - 1] = num_blocks - 1, 0
        self.ref, self.later = array("i", [0]) * num_blocks, array("i", [-1]) * num_blocks
        self.key, self.table_key = array("q", [-1]) * num_blocks, array("q", [-1]) * size
        self.table_block = array("i", [0]) * size
        self.contents, self.dense = [], {}
        self.on_store = self.on_evict = self.taken = None

    def usage(self) -> cython.double:
        """Share of the usable blocks in use, 0..1."""
        free: cython.double = self.free_blocks
        return 1.0 - free / (self.num_blocks - 1)

    @property
    def cached_keys(self) -> int:
        """Distinct contents in the prefix cache."""
        keys = np.asarray(self.key)
        return int((np.asarray(self.table_key) != UNHASHED).sum() + (keys == PRIVATE).sum())

    def free_list(self, limit: int) -> list[int]:
        """The first ``limit`` blocks of the free list, next one first."""
        found: list = []
        block: cython.int = self.next[0]
        while block != 0 and len(found) < limit:
            found.append(block)
            block = self.next[block]
        return found

    def shared_keys(
        self, content: tuple[tuple[int, int], ...], block_size: int, lookahead: int = 0
    ) -> list[int]:
        """Keys of the blocks whose last token, and ``lookahead`` behind it, lie in a shared part of the
        prompt."""
        keys: list = []
        for content_id, end_token in content:
            number = self.dense.get(content_id)
            if number is None:
                number = self.dense[content_id] = len(self.contents)
                self.contents.append(content_id)
            first = 2 * number * BLOCKS_PER_CONTENT  # even: shared, odd: private
            keys.extend(range(first + len(keys), first + (end_token - lookahead) // block_size))
        return keys

    def public_key(self, key: cython.longlong) -> Any:
        """The key as routers know it, by content id."""
        content: Any = self.contents[key // (2 * BLOCKS_PER_CONTENT)]
        return 2 * content * (1 << 24) + key % BLOCKS_PER_CONTENT

    # ---- the free list

    def unlink(self, block: cython.int) -> None:
        self.next[self.prev[block]] = self.next[block]
        self.prev[self.next[block]] = self.prev[block]
        self.free_blocks -= 1

    def append(self, block: cython.int) -> None:
        last: cython.int = self.prev[0]
        self.prev[block], self.next[block] = last, 0
        self.next[last] = self.prev[0] = block
        self.free_blocks += 1

    def prepend(self, block: cython.int) -> None:
        first: cython.int = self.next[0]
        self.next[block], self.prev[block] = first, 0
        self.prev[first] = self.next[0] = block
        self.free_blocks += 1

    def take(self) -> cython.int:
        """The block at the head of the free list; its content is forgotten (BlockPool.get_new_blocks)."""
        block: cython.int = self.next[0]
        self.unlink(block)
        self.forget(block)
        if self.taken is not None:
            self.taken.append(block)
        self.ref[block] = 1
        return block

    def forget(self, block: cython.int) -> cython.int:
        """Its content cannot be found in it any more (BlockPool._maybe_evict_cached_block)."""
        if self.key[block] >= 0:
            if self.on_evict is not None and not (
                self.key[block] & BLOCKS_PER_CONTENT or self.key[block] >> GROUP_SHIFT
            ):
                self.on_evict(self.public_key(self.key[block]))
            self.evict(block)
        self.key[block] = UNHASHED
        return 0

    # ---- which blocks hold what

    @cython.overflowcheck(False)
    def home(self, key: cython.longlong) -> cython.int:
        product: cython.ulonglong = cython.cast(cython.ulonglong, key) * cython.cast(
            cython.ulonglong, 0x9E3779B97F4A7C15
        )
        if not cython.compiled:
            product &= (1 << 64) - 1
        return cython.cast(cython.int, product >> (64 - self.bits))

    def find(self, key: cython.longlong) -> cython.int:
        """Where in the table a key is, or would be."""
        at: cython.int = self.home(key)
        while self.table_key[at] != UNHASHED and self.table_key[at] != key:
            at = (at + 1) & self.mask
        return at

    def lookup(self, key: cython.longlong) -> cython.int:
        """The block in which a content is found, -1 if in none."""
        at: cython.int = self.find(key)
        return self.table_block[at] if self.table_key[at] != UNHASHED else -1

    def cache(self, block: cython.int, key: cython.longlong) -> None:
        """Record a block's content. One that is known keeps being found where it was."""
        at: cython.int = self.find(key)
        other: cython.int
        self.key[block], self.later[block] = key, -1
        if self.table_key[at] == UNHASHED:
            self.table_key[at] = key
            self.table_block[at] = block
            return
        other = self.table_block[at]
        while self.later[other] != -1:
            other = self.later[other]
        self.later[other] = block

    def evict(self, block: cython.int) -> None:
        """Forget a block's content; further blocks that have it stay findable."""
        at: cython.int = self.find(self.key[block])
        later: cython.int = self.later[block]
        other: cython.int
        gap: cython.int
        if self.table_block[at] != block:
            other = self.table_block[at]
            while self.later[other] != block:
                other = self.later[other]
            self.later[other] = later
        elif later != -1:
            self.table_block[at] = later
        else:  # close the gap, so that no probe ends early
            gap, at = at, (at + 1) & self.mask
            while self.table_key[at] != UNHASHED:
                if ((at - self.home(self.table_key[at])) & self.mask) >= ((at - gap) & self.mask):
                    self.table_key[gap] = self.table_key[at]
                    self.table_block[gap] = self.table_block[at]
                    gap = at
                at = (at + 1) & self.mask
            self.table_key[gap] = UNHASHED
