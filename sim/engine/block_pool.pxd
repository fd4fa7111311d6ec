# What is fixed of block_pool.py where it is compiled.
cimport cython

cdef enum:
    # What a block holds for the prefix cache, where it is no key: nothing, or what only its own request can ask
    # for, and that only once it is preempted.
    UNHASHED = -1
    PRIVATE = -2
    BLOCKS_PER_CONTENT = 16777216  # a content owns this many keys of blocks
    GROUP_SHIFT = 56  # of a KV cache group's number in a key; 0 is the one that is told of

@cython.final
cdef class BlockPool:
    cdef readonly int num_blocks
    cdef readonly int free_blocks
    cdef public object on_store
    cdef public object on_evict
    cdef list contents  # dense number of a content -> its id
    cdef list taken
    cdef dict dense
    cdef int bits
    cdef int mask
    cdef int[::1] prev
    cdef int[::1] next
    cdef int[::1] ref
    cdef int[::1] later
    cdef long long[::1] key
    cdef long long[::1] table_key
    cdef int[::1] table_block

    cdef double usage(self) noexcept
    cpdef object public_key(self, long long key)
    cdef void unlink(self, int block) noexcept
    cdef void append(self, int block) noexcept
    cdef void prepend(self, int block) noexcept
    cdef int take(self) except -1
    cdef int forget(self, int block) except -1
    cdef int home(self, long long key) noexcept
    cdef int find(self, long long key) noexcept
    cdef int lookup(self, long long key) noexcept
    cdef void cache(self, int block, long long key) noexcept
    cdef void evict(self, int block) noexcept
