"""Static batching: a batch is filled, runs until its last request is done, and only then comes the next."""

from __future__ import annotations

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import PaddedBatch, PaddedStep, Row

POLL_S = 1e-3  # how often the waiting engine looks at its queue


class StaticBatching(PaddedBatch):
    """A batch starts when ``max_num_seqs`` requests wait, or ``batch_wait_s`` after the first was seen.

    Its KV cache is made for it, right-padded: every row is as long as the longest prompt and all tokens
    since. A finished row stays in the batch, as padding, until the last one is done.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.kv = self
        self._polls = 0  # of the queue, since a first request was seen in it

    @property
    def usage(self) -> float:
        """Share of the reserved rows x max_model_len that the batch fills."""
        longest = max((row.tokens for row in self._rows), default=0)
        return len(self._rows) * longest / (self.config.max_num_seqs * self.config.max_model_len)

    def _admit(self, step: PaddedStep) -> list[Row]:
        if self._rows or not self._queue:
            return []
        full = len(self._queue) >= self.config.max_num_seqs
        if not full and self._polls * POLL_S < self.config.batch_wait_s:
            self._polls += 1
            step.idle_s = POLL_S
            return []
        self._polls = 0
        return [self._queue.popleft() for _ in range(min(len(self._queue), self.config.max_num_seqs))]

    def _extent(self, decoding: list[Row]) -> tuple[int, int]:
        longest = max(row.prompt for row in self._rows) + max(row.generated for row in self._rows)
        return len(self._rows), longest

    def _leave(self, row: Row) -> None:
        if all(each.done for each in self._rows):
            self._rows.clear()
