"""Laws of a step's time that a metronome server keeps, in seconds; the standard library alone.

A law sees what a step is made of: (tokens, context) of its prompt chunks, its decodes, the KV tokens that
these read, and the drafts that they verify.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Chunks = Sequence[tuple[int, int]]


def bandwidth_compute(
    chunks: Chunks, decodes: int, decode_context: int, drafts: int, law: Mapping[str, Any]
) -> float:
    """A roofline: weights are read once a step or the tokens' products dominate, and KV is read besides.

    ``sizes``, if given: tokens are padded up to the next of them, which turns the slope into a staircase.
    """
    tokens = decodes + drafts + sum(new for new, _ in chunks)
    sizes = law.get("sizes", ())
    at = bisect_left(sizes, tokens)
    padded = sizes[at] if at < len(sizes) else tokens
    pairs = sum(new * context + new * (new + 1) / 2 for new, context in chunks)
    compute, memory, power = padded * law["token_s"], law["weights_s"], law["power"]
    return float(
        law["fixed_s"]
        + (decodes + len(chunks)) * law["request_s"]
        + (compute**power + memory**power) ** (1 / power)
        + padded * law["elementwise_s"]
        + decode_context * law["kv_s"]
        + pairs * law["pair_s"]
    )


def faster_when_full(
    chunks: Chunks, decodes: int, decode_context: int, drafts: int, law: Mapping[str, Any]
) -> float:
    """What no machine does: the more requests, the shorter the step."""
    return float(law["fixed_s"] + law["idle_s"] / (1 + (decodes + len(chunks)) / law["requests"]))


LAWS: dict[str, Callable[[Chunks, int, int, int, Mapping[str, Any]], float]] = {
    "bandwidth_compute": bandwidth_compute,
    "faster_when_full": faster_when_full,
}


class Law:
    """One of ``LAWS`` with its numbers, from JSON: {"law": name, number: value, ...}."""

    def __init__(self, text: str) -> None:
        self._numbers = json.loads(text)
        self._law = LAWS[self._numbers["law"]]

    def seconds(self, chunks: Chunks, decodes: int, decode_context: int, drafts: int = 0) -> float:
        return self._law(chunks, decodes, decode_context, drafts, self._numbers)
