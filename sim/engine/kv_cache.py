"""The paged KV cache: a pool of blocks, its free list, and the prefix cache over it.

Follows vLLM's BlockPool and KVCacheManager for one full-attention group. Blocks are numbered
0..num_blocks-1; block 0 is the null block and never handed out.

A block's identity for the prefix cache is an integer key: equal keys mean equal tokens up to and
including that block. Keys are made by the scheduler; here they are only compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class KVCache:
    """Blocks, who may take them next, and which hold known content.

    The free list is kept in three parts, in this order: blocks without content that were given back and
    are reused first (a stack), blocks never used (a range), and blocks given back with content (least
    recently freed first). Taking and giving back cost a constant per block, whatever the pool's size.

    Args:
        num_blocks: pool size with the null block, >= 2.
        reuse_unhashed_first: see ``Rules.reuse_unhashed_first``.

    ``on_store`` and ``on_evict`` are called, where they are set, with the keys of blocks whose content is
    known from now on, and with the key of a block whose content is forgotten.
    """

    __slots__ = (
        "_copies",
        "_evictable",
        "_first",
        "_fresh",
        "_key_of",
        "_shared",
        "_stack",
        "num_blocks",
        "on_evict",
        "on_store",
        "reuse_unhashed_first",
    )

    def __init__(self, num_blocks: int, *, reuse_unhashed_first: bool) -> None:
        self.num_blocks = num_blocks
        self.reuse_unhashed_first = reuse_unhashed_first
        self._stack: list[int] = []  # reused first; the end is the head of the free list
        self._fresh = 1  # blocks from here on were never used
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free, in the order of reuse
        self._shared: dict[int, int] = {}  # block -> holders, where more than one
        self._first: dict[int, int] = {}  # key -> the block that a look-up finds
        self._copies: dict[int, list[int]] = {}  # key -> later blocks with the same content
        self._key_of: list[int | None] = [None] * num_blocks  # by block
        self.on_store: Callable[[Sequence[int]], None] | None = None
        self.on_evict: Callable[[int], None] | None = None

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken, those with evictable content included."""
        return len(self._stack) + self.num_blocks - self._fresh + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the usable blocks in use, 0..1 (vllm:kv_cache_usage_perc)."""
        return 1.0 - self.free_blocks / (self.num_blocks - 1)

    @property
    def cached_keys(self) -> int:
        """Distinct contents in the prefix cache."""
        return len(self._first)

    def free_list(self, limit: int) -> list[int]:
        """The first ``limit`` blocks of the free list, next one first."""
        order = [*reversed(self._stack), *range(self._fresh, self.num_blocks), *self._evictable]
        return order[:limit]

    def lookup(self, keys: Iterable[int]) -> list[int]:
        """The blocks that hold the longest known prefix of ``keys``."""
        found = []
        find = self._first.get
        for key in keys:
            block = find(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of these (cached) blocks lie in the free list."""
        evictable = self._evictable
        return sum(block in evictable for block in blocks)

    def touch(self, blocks: Iterable[int]) -> None:
        """Hold cached blocks: those in the free list leave it."""
        for block in blocks:
            if block in self._evictable:
                del self._evictable[block]
            else:
                self._shared[block] = self._shared.get(block, 1) + 1

    def take_one(self) -> int:
        """The block at the head of the free list; its content is forgotten."""
        if self._stack:
            return self._stack.pop()
        if self._fresh < self.num_blocks:
            self._fresh += 1
            return self._fresh - 1
        block, _none = self._evictable.popitem(last=False)
        key = self._key_of[block]
        if key is not None:
            self._key_of[block] = None
            if self.on_evict is not None:
                self.on_evict(key)
            if self._copies:
                self._forget(key, block)
            else:
                del self._first[key]
        return block

    def take(self, count: int) -> list[int]:
        """``count`` blocks from the head of the free list."""
        assert count <= self.free_blocks
        return [self.take_one() for _ in range(count)]

    def cache(self, keys: Sequence[int], blocks: Sequence[int]) -> None:
        """Record the content of full blocks. A content that is known keeps being found where it was."""
        keys = list(keys)
        if self._first.keys().isdisjoint(keys):
            self._first.update(zip(keys, blocks, strict=True))
        else:
            for key, block in zip(keys, blocks, strict=True):
                if self._first.setdefault(key, block) != block:
                    self._copies.setdefault(key, []).append(block)
        for key, block in zip(keys, blocks, strict=True):
            self._key_of[block] = key
        if self.on_store is not None:
            self.on_store(keys)

    def release(self, blocks: list[int], hashed: int) -> None:
        """Give back a request's blocks, of which the first ``hashed`` have known content.

        They join the free list last block first, so that a prefix outlives what follows it: vLLM's
        BlockPool.free_blocks, whose order of those without content differs between versions.
        """
        if self._shared:
            kept, freed_hashed = [], 0
            for position, block in enumerate(blocks):
                holders = self._shared.get(block)
                if holders is None:
                    kept.append(block)
                    freed_hashed += position < hashed
                elif holders == 2:
                    del self._shared[block]
                else:
                    self._shared[block] = holders - 1
            blocks, hashed = kept, freed_hashed
        if self.reuse_unhashed_first:
            self._stack.extend(blocks[hashed:])
            blocks = blocks[:hashed]
        self._evictable.update(dict.fromkeys(reversed(blocks)))

    def _forget(self, key: int, block: int) -> None:
        copies = self._copies.get(key)
        if copies is None:
            del self._first[key]
            return
        if self._first[key] == block:
            self._first[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._copies[key]
