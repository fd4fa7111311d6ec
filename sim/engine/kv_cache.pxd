# What is fixed of kv_cache.py where it is compiled.
cimport cython
from servecast.sim.engine.block_pool cimport BLOCKS_PER_CONTENT, PRIVATE, UNHASHED, BlockPool
from servecast.sim.engine.sequence cimport Sequence

cdef class KVCache:
    cdef readonly BlockPool pool
    cdef bint reuse_unhashed_first
    cdef bint prefix_caching
    cdef bint keyed  # contents have keys, whether they are looked up or not
    cdef bint full_isl
    cdef readonly bint aligned
    cdef public long long processed
    cdef readonly int block_size
    cdef int hash_block
    cdef readonly int lookahead
    cdef int load_lookahead  # of who waits for an asynchronous load
    cdef public int hash_lookahead
    cdef int rewritten
    cdef public bint drops_block
    cdef bint reserves_at_admission
    cdef int max_model_len
    cdef Py_ssize_t width
    cdef int[::1] table  # KV blocks of the running, a row a slot
    cdef list slots
    cdef dict prefixes

    cdef int blocks_for(self, int tokens) noexcept
    cdef int most_blocks(self, int tokens) except -1
    cdef int new_step_starts(self) except -1
    cdef int align_chunk(self, Sequence sequence, int start, int tokens) except? -1
    cdef int get_computed_blocks(self, Sequence sequence) except -1
    cdef bint allocate_slots(self, Sequence sequence, int tokens, int cached, int reserve) except? -1
    cdef bint allocate_remote(
        self, Sequence sequence, int tokens, int external, int cached, int reserve, int others
    ) except? -1
    cdef int add_rows(self) except -1
    cdef int blocks_of(self, int tokens) noexcept
    cdef int missing_blocks(self, Sequence sequence, int drafts) except? -1
    cdef int trim(self, Sequence sequence) except -1
    cdef int hash_plainly(self) except -1
    cdef int touch(self, Sequence sequence, int hits) except -1
    cdef int free(self, Sequence sequence) except -1
    cdef int free_later(self, Sequence sequence) except -1
    cdef int cache_blocks(self, Sequence sequence, int tokens) except -1
    cdef long long private_key(self, Sequence sequence) noexcept
    cdef long long block_key(self, Sequence sequence, int index) except *
    cdef int publish(self, Sequence sequence) except -1
