"""vLLM's counters of drafts, and what ``vllm bench serve`` makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from servecast.sim.metrics.records import Run


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """vLLM's counters of a run (``vllm:spec_decode_*``): steps of requests with drafts, their draft tokens,
    those accepted (before a request's end cuts them), and accepted by position."""

    drafts: int
    draft_tokens: int
    accepted: int
    by_position: tuple[int, ...]

    @classmethod
    def of(cls, counters: Sequence[Any]) -> DraftCounts:
        """Of several engines together (``sim.engine.drafts.Drafts``)."""
        each = [counter for counter in counters if counter is not None]
        positions = itertools.zip_longest(*(counter.per_position for counter in each), fillvalue=0)
        return cls(
            sum(counter.num_drafts for counter in each),
            sum(counter.num_draft_tokens for counter in each),
            sum(counter.num_accepted_tokens for counter in each),
            tuple(map(sum, positions)),
        )


def draft_summary(run: Run) -> dict[str, Any]:
    """What vllm bench serve says of drafts, under its keys; the acceptance rate in percent. Empty for a run
    without any."""
    found: DraftCounts | None = run.meta.get("spec_decode")
    if found is None or not found.drafts:
        return {}
    return {
        "spec_decode_acceptance_rate": 100.0 * found.accepted / found.draft_tokens,
        "spec_decode_acceptance_length": 1.0 + found.accepted / found.drafts,
        "spec_decode_num_drafts": found.drafts,
        "spec_decode_draft_tokens": found.draft_tokens,
        "spec_decode_accepted_tokens": found.accepted,
        "spec_decode_per_position_acceptance_rates": [each / found.drafts for each in found.by_position],
    }
