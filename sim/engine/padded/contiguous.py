"""Continuous batching on contiguous slots: a request joins as soon as one of the slots is free."""

from __future__ import annotations

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import PaddedBatch, PaddedStep, Row


class ContiguousBatching(PaddedBatch):
    """``max_num_seqs`` slots of ``max_model_len`` tokens of KV each. A row that ends frees its slot for the
    next step, in which the requests that take it are prefilled together, after the others have decoded."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.kv = self

    @property
    def usage(self) -> float:
        """Share of the slots that are taken."""
        return len(self._rows) / self.config.max_num_seqs

    def _admit(self, step: PaddedStep) -> list[Row]:
        free = self.config.max_num_seqs - len(self._rows)
        return [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
