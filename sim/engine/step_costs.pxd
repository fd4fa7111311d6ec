# What is fixed of step_costs.py where it is compiled.
cimport cython
from servecast.sim.engine.step cimport Step

@cython.final
cdef class StepCosts:
    cdef double pair_s
    cdef double kv_read_s
    cdef double decode_kv_s
    cdef double mixed_decode_kv_s
    cdef double decode_s
    cdef double block_s
    cdef double chunk_token_s
    cdef double request_s
    cdef double eager_s  # of a step of more tokens than ``graphed`` at least
    cdef long long graphed
    cdef long long prompt_tile  # 0: chunks are not padded
    cdef long long layers
    cdef long long sliding_layers
    cdef long long sliding_window
    cdef object by_tokens
    cdef object by_rows
    cdef double[::1] tokens_s
    cdef double[::1] rows_s

    cdef double of_tokens(self, long long tokens) except? -1
    cdef double of_rows(self, long long rows) except? -1
    cdef long long kv_token_layers(self, long long context, long long sequences) noexcept
    cdef double attention_pairs(self, long long tokens, long long context) noexcept
    cdef double seconds(self, Step step) except? -1
