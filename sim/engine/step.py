"""What one call of ``schedule`` decided."""

from __future__ import annotations

from servecast.sim.engine.sequence import Sequence


class Step:
    """What one ``schedule`` decided, and after ``complete`` what came of it.

    Attributes:
        chunks: (tokens, context) of each prompt chunk: computed now, KV tokens already there.
        decodes, decode_context: requests with one token each; KV tokens they read, that one included.
        samples: tokens sampled. total_tokens: tokens computed.
        admitted, resumed, preempted: request ids, in order (victims in the order they fell).
        cached_tokens: request id -> computed tokens at admission, for admitted and resumed.
        first_tokens, finished: ids of requests that got their first or last token from this step.
        gaps: ticks of the steps that delivered the previous token of those whose tokens do not come from
            successive steps. steady: tokens delivered whose predecessor came from the step before.
        emitted: tokens delivered.
    """

    idle_s = 0.0  # an engine that waits for more requests has a step of its own (sim.padded_batch)

    __slots__ = (
        "_composition",
        "admitted",
        "cached_tokens",
        "chunks",
        "cruisers",
        "decode_context",
        "decodes",
        "dropped",
        "emitted",
        "entries",
        "finished",
        "first_tokens",
        "gaps",
        "preempted",
        "resumed",
        "samples",
        "steady",
        "stragglers",
        "tick",
        "total_tokens",
    )

    def __init__(self, tick: int) -> None:
        self.tick = tick
        self.chunks: list[tuple[int, int]] = []
        self.decodes = self.decode_context = self.samples = self.total_tokens = 0
        self.admitted: list[int] = []
        self.resumed: list[int] = []
        self.preempted: list[int] = []
        self.cached_tokens: dict[int, int] = {}
        self.first_tokens: list[int] = []
        self.finished: list[int] = []
        self.gaps: list[int] = []
        self.steady = self.emitted = 0
        self.entries: list[tuple[Sequence, int]] = []  # scheduled one by one: (sequence, tokens)
        self.cruisers = 0  # scheduled as cruising
        self.dropped = 0  # cruisers of this step whose token nobody takes any more
        self.stragglers: list[Sequence] = []  # cruisers of this step that stopped cruising in flight
        self._composition: dict[int, int] | None = None

    def scheduled(self) -> dict[int, int]:
        """Request id -> tokens, in vLLM's order. Only from a scheduler made with ``trace=True``."""
        assert self._composition is not None, "the scheduler was not made with trace=True"
        return self._composition
