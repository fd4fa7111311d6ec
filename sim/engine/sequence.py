"""A request inside the engine."""

from __future__ import annotations

from servecast.sim.engine.request import Request

WAITING, RUNNING, PREEMPTED, FINISHED = range(4)

BLOCKS_PER_CONTENT = 1 << 24  # a content id owns this many block keys


def is_shared(key: int) -> bool:
    """Whether another request can have a block of this key."""
    return not key & BLOCKS_PER_CONTENT


class Sequence:
    """The engine's state of one request.

    A *cruising* sequence decodes one token in every step until it ends or is disturbed. Nothing in it
    changes from step to step: its computed tokens are ``tick - base``, and its block and its end fall due
    at known ticks. For all others ``num_tokens`` and ``computed`` are kept.

    Attributes:
        arrival: rising with the order of arrival.
        order: rising with the order of admission; the running list is sorted by it.
        final_tokens: prompt and output tokens when it ends.
        stops_by_length: it ends by max_tokens or max_model_len, which the scheduler foresees.
        num_tokens: prompt plus delivered outputs.
        computed: tokens whose KV is computed once the steps scheduled so far have run.
        prefill_tokens: what it had to compute before it decoded, at its last admission.
        blocks, num_cached: its KV blocks; how many leading ones have a key in the prefix cache.
        token_tick: tick of the step that delivered its newest token, None before the first.
    """

    __slots__ = (
        "arrival",
        "base",
        "block_tick",
        "blocks",
        "computed",
        "cruising",
        "final_tokens",
        "join_tick",
        "last_tick",
        "num_cached",
        "num_tokens",
        "order",
        "preemptions",
        "prefill_tokens",
        "private_key",
        "request",
        "request_id",
        "shared_keys",
        "status",
        "stops_by_length",
        "token_tick",
    )

    def __init__(self, request: Request, arrival: int, block_size: int, max_model_len: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.arrival = arrival
        self.status = WAITING
        self.order = -1
        self.preemptions = 0
        limit = min(request.prompt_tokens + request.max_tokens, max_model_len)
        self.final_tokens = min(request.prompt_tokens + request.output_tokens, limit)
        self.stops_by_length = self.final_tokens == limit
        self.num_tokens = request.prompt_tokens
        self.computed = 0
        self.prefill_tokens = 0
        self.blocks: list[int] = []
        self.num_cached = 0
        self.token_tick: int | None = None
        self.cruising = False
        self.base = self.join_tick = self.last_tick = self.block_tick = -1
        self.shared_keys = _shared_keys(request, block_size)
        self.private_key = (2 * request.request_id + 1) * BLOCKS_PER_CONTENT

    @property
    def prefills(self) -> bool:
        """Not cruising: it still computes what it was admitted with (Request.is_prefill_chunk)."""
        return self.computed < self.prefill_tokens

    def keys(self, start: int, end: int) -> range | list[int]:
        """Identities of blocks ``start`` to ``end`` (exclusive)."""
        shared = self.shared_keys
        if start >= len(shared):
            return range(self.private_key + start, self.private_key + end)
        return shared[start:end] + list(range(self.private_key + len(shared), self.private_key + end))


def _shared_keys(request: Request, block_size: int) -> list[int]:
    """Keys of the blocks whose last token lies in a shared part of the prompt."""
    keys: list[int] = []
    for content_id, end_token in request.content:
        first = 2 * content_id * BLOCKS_PER_CONTENT  # even: shared, odd: private
        keys.extend(range(first + len(keys), first + end_token // block_size))
    return keys
