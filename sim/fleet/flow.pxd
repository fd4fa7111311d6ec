# What is fixed of flow.py where it is compiled.
cimport cython
from servecast.sim.engine.engine_loop cimport ABORTS, BUSY, ENDED, POLLING, EngineLoop

@cython.final
cdef class Sender:
    cdef readonly Py_ssize_t first
    cdef readonly Py_ssize_t started  # sent, all before it
    cdef readonly Py_ssize_t ready  # arrived, all before it
    cdef readonly Py_ssize_t open  # not done
    cdef readonly bint stopped
    cdef readonly object sessions
    cdef bint told
    cdef Py_ssize_t end
    cdef Py_ssize_t limit
    cdef Py_ssize_t in_flight
    cdef long long last  # when its client has all answers that are on their way, unless it waits for each

@cython.final
cdef class Engines:
    cdef readonly object runner
    cdef readonly list loops
    cdef EngineLoop compiled  # the runner, where it is one core's loop of vLLM's
    cdef Py_ssize_t number
    cdef bint idle
    cdef bint failed
    cdef bint polling
    cdef long long due  # with a connector: when it goes on, if nobody wakes it

    cdef bint connected(self)
    cdef int advance(self, long long until) except? -1
    cdef long long wake(self) except *

@cython.final
cdef class Front:
    cdef Py_ssize_t number
    cdef long long tokenizer_free
    cdef long long busy_until
    cdef list rounds  # ends of rounds of preparation, and who is in each

@cython.final
cdef class Server:
    cdef list loops
    cdef list inboxes
    cdef list engines
    cdef list fronts
    cdef object balance
    cdef object spread
    cdef double latency_s
    cdef double request_s
    cdef double prompt_token_s
    cdef object variation
    cdef public object processor
    cdef Py_ssize_t most
    cdef dict inside  # rows that were sent to it and have not ended, in order
    cdef bint failed
    cdef bint prefills

    cpdef bint connected(self)

    cdef long long varied(self, double seconds) except *

@cython.final
cdef class Flow:
    cdef public long long now
    cdef readonly long long sent
    cdef readonly object requests
    cdef readonly object ready
    cdef public list finished
    cdef readonly dict failures
    cdef readonly list servers
    cdef readonly list senders
    cdef list engines
    cdef list fronts
    cdef readonly dict columns
    cdef readonly list order  # rows as they arrived, where there are several streams
    cdef object send
    cdef object router
    cdef bint looks  # the router at the request
    cdef object ended
    cdef object answered
    cdef bint quiet
    cdef bint ordered
    cdef object legs
    cdef Engines running
    cdef bint gives_up
    cdef dict objects  # rows that the router knows, as requests
    cdef list heap  # (time, order, what, number)
    cdef long long count
    cdef long long until
    cdef long long[::1] prompt
    cdef object media
    cdef double[::1] abort_s
    cdef long long[:, ::1] outcomes
    cdef long long[::1] arrival
    cdef int[::1] replica
    cdef int[::1] rank
    cdef int[::1] front
    cdef signed char[::1] status
    cdef int[::1] stream
    cdef long long[::1] outstanding

    cpdef bint advance(self, long long until) except? -1
    cdef int push(self, long long time, long long rank, int what, Py_ssize_t number) except -1
    cdef int arrive(self, Py_ssize_t number) except -1
    cdef int send_ready(self, Sender sender) except -1
    cdef int start(self, Sender sender, Py_ssize_t row) except -1
    cdef int give_up(self, Py_ssize_t row) except -1
    cdef int done(self, Py_ssize_t row) except -1
    cdef int tell_finished(self, Sender sender, Py_ssize_t number) except -1
    cdef int route(self, Py_ssize_t row) except -1
    cdef int send_to(self, int index, Py_ssize_t row) except -1
    cdef int split(self, Py_ssize_t row) except -1
    cdef int hand_on(self, Py_ssize_t row) except -1
    cdef int refuse(self, Py_ssize_t row, object why) except -1
    cdef Server server_of(self, Py_ssize_t row)
    cdef int accept(self, Server server, Py_ssize_t row) except -1
    cdef int prepare(self, Py_ssize_t row) except -1
    cdef int end_round(self, Py_ssize_t number) except -1
    cdef int encode(self, Server server, Py_ssize_t row) except -1
    cdef int put(self, Py_ssize_t row) except -1
    cdef int assign(self, Server server, Py_ssize_t row) except -1
    cdef int publish(self, Py_ssize_t index) except -1
    cdef int wake_connected(self, Server server) except -1
    cdef int wake(self, Engines engines) except -1
    cdef int take_lost(self, object loop) except -1
    cdef int run_engine(self, Py_ssize_t number) except -1
    cdef int drain(self, Engines engines) except -1
    cdef int take_ended(self, Engines engines) except -1
    cdef int end(self, Server server, Py_ssize_t index, Py_ssize_t row, int status) except -1
