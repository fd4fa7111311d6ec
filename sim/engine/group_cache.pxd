# What is fixed of group_cache.py where it is compiled.
cimport cython
from servecast.sim.engine.block_pool cimport GROUP_SHIFT, PRIVATE, UNHASHED, BlockPool
from servecast.sim.engine.kv_cache cimport KVCache
from servecast.sim.engine.sequence cimport Sequence

cdef enum:
    FULL = 0
    SLIDING = 1
    CHUNKED = 2
    MAMBA = 3
    DENSE = -1  # no retention interval: all that could be found again is kept
    FAR = 1073741824

@cython.final
cdef class GroupCache(KVCache):
    cdef tuple specs
    cdef int count
    cdef bint hybrid  # several groups
    cdef int lookups  # groups of equal specs are looked up together
    cdef bint simple  # full attention and one other spec: one pass of the look-up
    cdef bint splits_windows
    cdef bint trims_processed
    cdef bint pins_junctions
    cdef bint retains_states
    cdef bint retires_states
    cdef bint registers_tail
    cdef bint registers_again
    cdef bint aligns_ends
    cdef bint spares_last
    cdef bint checks_last_block
    cdef bint keeps_replays
    cdef bint drops_somewhere
    cdef bint doubts_drafts
    cdef bint proves_states
    cdef int[::1] drafts_at  # 1 where a drafter has layers
    cdef bint loads_in_turn
    cdef int scheduler_block
    cdef int retention
    cdef int largest_chunk
    cdef int in_flight
    cdef int told  # the group of which routers are told
    cdef int[::1] code  # of a group in keys
    cdef int[::1] kind
    cdef int[::1] block
    cdef int[::1] ratio  # hashes a block
    cdef int[::1] window
    cdef int[::1] run  # blocks in a row that a hit of a sliding group needs
    cdef int[::1] drops  # 1 where the last block of a hit is given up
    cdef int[::1] cap  # most blocks at once; 0 is no bound
    cdef int[::1] checkpoint
    cdef int[::1] spare  # blocks for the states of drafts
    cdef int[::1] by_state  # whether blocks go by states: mamba, aligned
    cdef int[::1] first  # of a look-up: where its groups begin in member
    cdef int[::1] member
    cdef int[::1] found
    cdef int[::1] held
    cdef int[::1] cached
    cdef int[::1] last_state
    cdef int[::1] retired
    cdef int[::1] saves
    cdef int[::1] freed
    cdef set fresh

    cdef int known(self, Sequence sequence, int group) except -1
    cdef long long key(self, Sequence sequence, int group, int index) noexcept
    cdef bint in_all(self, int lookup, Sequence sequence, int slot, int index) except? -1
    cdef int keep_found(self, int lookup, int slot, int nulls, int blocks) noexcept
    cdef int find(self, int lookup, Sequence sequence, int slot, int limit, int drop) except -1
    cdef int whole_steps(self, int blocks, int b, int step) noexcept
    cdef int refuse_drafts(self, str version, object speculation, set kinds) except -1
    cdef int skipped(self, int group, int tokens) noexcept
    cdef bint saves_inside(self, Sequence sequence, int group, int at, int start, int end) noexcept
    cdef bint fits_inside(self, int start, int end, int position, int b, int step) noexcept
    cdef int boundary(self, int tokens, int size) noexcept
    cdef int prefill_end(self, Sequence sequence) noexcept
    cdef int needed(self, Sequence sequence, int slot, int computed, int end, bint admits, bint gate) except? -1
    cdef int publish_block(self, Sequence sequence, int group, int index) noexcept
    cdef int give_back(self, int count, bint split) noexcept
    cdef int adopt(self, int slot, int hit, int external) except -1
    cdef int collect(self, int at, int n) noexcept
    cdef int take_loaded(self, int group, int at, int tokens) except -1
    cdef int ahead(self, int end, bint admits) noexcept
    cdef int take(self, int slot, int end, bint admits) except -1
    cdef int due(self, Sequence sequence) noexcept
    cdef int register_boundary(self, Sequence sequence, int group, int at, int tokens) except -1
    cdef bint reachable(self, Sequence sequence, int group, int index) noexcept
    cdef bint ends_at(self, int index, int run, int end) noexcept
    cdef bint all_save(self, int start, int end, int prefill_end) noexcept
