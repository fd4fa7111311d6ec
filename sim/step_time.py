"""How long one engine step takes: the protocol that every step-time model meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StepShape(Protocol):
    """What a step-time model may know about a step (sim.scheduler.Step has these).

    chunks: (tokens, context) of every prompt chunk: tokens computed now, KV tokens already there.
    decodes: requests that compute one token each. decode_context: KV tokens that those read, summed,
    the new token included. samples: tokens sampled (decodes plus the chunks that end their prompt).
    """

    chunks: Sequence[tuple[int, int]]
    decodes: int
    decode_context: int
    samples: int


class StepTime(Protocol):
    """A step-time model. Never faster than its roofline."""

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds, without noise."""
        ...
