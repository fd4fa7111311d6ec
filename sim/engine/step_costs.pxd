# What is fixed of step_costs.py where it is compiled.
cimport cython
from servecast.sim.engine.step cimport Step

@cython.final
cdef class StepCosts:
    cdef double[:, ::1] attention  # a row a kind: pair_s, read_s, expand_s, decode_s, mixed decode_s, block_s, decode_pair_s, rows; at the datasheet's rates pair_s, decode_pair_s, read_s
    cdef long long[:, ::1] shapes  # a row a kind: layers, window
    cdef long long window  # KV tokens that a token attends to in layers with a window; 0: there are none
    cdef bint chunked  # the window is a chunk
    cdef double decode_s
    cdef double chunk_token_s
    cdef double chunk_s
    cdef double serial_s
    cdef double request_s
    cdef double eager_s  # of a step of more tokens than ``graphed`` at least
    cdef long long graphed
    cdef long long prompt_tile  # 1: chunks are not padded
    cdef double lora_s
    cdef double lora_adapter_s
    cdef double lora_token_s
    cdef object by_tokens
    cdef object by_rows
    cdef object by_uniform
    cdef object by_exchanged
    cdef bint exchanges_decodes
    cdef dict exchanged_s
    cdef long long slots  # tokens more of a request
    cdef dict uniform_s
    cdef bint drafting
    cdef bint skips
    cdef bint infills
    cdef bint at_once
    cdef double step_s
    cdef double lookup_request_s
    cdef double lookup_token_s
    cdef StepCosts first
    cdef StepCosts later
    cdef double[::1] tokens_s
    cdef double[::1] rows_s
    cdef object least_tokens
    cdef object least_rows
    cdef double bandwidth
    cdef double[::1] least_tokens_s  # at the datasheet's rates, by tokens; -1: not asked for
    cdef double[::1] least_rows_s
    cdef double[::1] read  # bytes of weights, by tokens
    cdef double[::1] read_rows

    cdef double of_tokens(self, long long tokens) except? -1
    cdef double of_rows(self, long long rows) except? -1
    cdef long long reached(self, long long tokens, long long window) noexcept
    cdef long long before(self, long long context, long long window) noexcept
    cdef double of_chunks(self, list chunks) except? -1
    cdef double of_exchange(self, list chunks, long long decodes) except? -1
    cdef double of_adapters(self, dict adapters) except? -1
    cdef double of_uniform(self, long long tokens, long long requests) except? -1
    cdef double of_draft(self, Step step) except? -1
    cdef double of(
        self,
        long long tokens,
        list chunks,
        long long decodes,
        long long drafts,
        long long context,
        long long windowed,
        long long rows,
        double adapters_s,
    ) except? -1
    cdef double attending(
        self, list chunks, long long decodes, long long drafts, long long context, long long windowed
    ) except? -1
    cdef double pass_at(self, Step step, long long tokens, long long rows, bint later) except? -1
    cdef double seconds(self, Step step) except? -1
    cdef double least(self, Step step) except? -1
    cdef double at(self, Step step, long long tokens) except? -1
