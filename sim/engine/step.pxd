# What is fixed of step.py where it is compiled.
cimport cython

cdef list own(list entries)

@cython.final
cdef class Step:
    cdef readonly long long tick
    cdef readonly int total_tokens
    cdef readonly list chunks
    cdef readonly int decodes
    cdef readonly int drafts
    cdef readonly int drafters
    cdef readonly int draft_length
    cdef readonly long long decode_context
    cdef long long windowed
    cdef readonly list gaps
    cdef readonly int steady
    cdef readonly int emitted
    cdef readonly int outputs
    cdef Py_ssize_t row
    cdef long long start
    cdef long long end
    cdef readonly list samplers
    cdef readonly dict adapters
    cdef readonly bint deferred
    cdef bint borrowed  # samplers, from the list of the running
    cdef list verified
    cdef readonly list prefilling
    cdef readonly list joined
    cdef list joined_cached
    cdef list joined_again
    cdef readonly list victims
    cdef list firsts
    cdef list leavers
    cdef list composition
    cdef readonly list failed
    cdef readonly list encoded
    cdef list looking
    cdef readonly object connector_meta
    cdef public object transfers
