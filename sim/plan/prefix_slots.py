"""Do the shared prefixes fit? KV capacity in slots of one prefix each, against the prefixes in use.

The arithmetic of llm-d's capacity benchmarks: what a replica's requests in flight hold for themselves (their
own prompt tokens, and half of their output, since it grows from nothing to all of it) is taken from its KV
tokens, and the rest is divided by a prefix's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from servecast.sim.metrics.records import Run
from servecast.sim.traffic.content import SharedPrefix
from servecast.sim.traffic.spec import StreamSpec


@dataclass(frozen=True, slots=True)
class PrefixSlots:
    """The arithmetic. ``in_flight``: requests that run on a replica at a time; ``own_tokens``: what each of
    them holds beside its prefix, on average."""

    kv_tokens: int
    replicas: int
    groups: int
    prefix_tokens: int
    own_tokens: float
    in_flight: float

    @property
    def ephemeral_tokens(self) -> float:
        """KV tokens of a replica that its requests hold for themselves."""
        return self.in_flight * self.own_tokens

    @property
    def slots_per_replica(self) -> int:
        """Prefixes that fit beside them."""
        return max(0, math.floor((self.kv_tokens - self.ephemeral_tokens) / self.prefix_tokens))

    @property
    def slots(self) -> int:
        """The same for the fleet."""
        return self.slots_per_replica * self.replicas

    @property
    def overfill(self) -> float | None:
        """Prefixes over slots of the fleet, less 1: below 0 each finds a place. None without a slot."""
        return self.groups / self.slots - 1 if self.slots else None

    @property
    def overfill_each(self) -> float | None:
        """The same if every replica sees every prefix, as under a router that does not look at them."""
        return self.groups / self.slots_per_replica - 1 if self.slots_per_replica else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kv_tokens_per_replica": self.kv_tokens,
            "in_flight_per_replica": self.in_flight,
            "own_tokens_per_request": self.own_tokens,
            "ephemeral_tokens_per_replica": self.ephemeral_tokens,
            "slots_per_replica": self.slots_per_replica,
            "slots": self.slots,
            "prefixes": self.groups,
            "working_set_tokens": self.groups * self.prefix_tokens,
            "overfill": self.overfill,
            "overfill_if_each_replica_sees_all": self.overfill_each,
        }

    def to_text(self) -> str:
        """Three lines."""
        lines = [
            f"{self.kv_tokens:,} KV tokens a replica, less {self.in_flight:.1f} requests in flight x "
            f"{self.own_tokens:,.0f} tokens of their own: {self.slots_per_replica} slots of "
            f"{self.prefix_tokens:,}, {self.slots} in {self.replicas} replica{'s' * (self.replicas > 1)}",
            f"{self.groups} prefixes ({self.groups * self.prefix_tokens:,} tokens): " + _fill(self.overfill),
        ]
        if self.replicas > 1:
            lines.append("if every replica sees every prefix: " + _fill(self.overfill_each))
        return "\n".join(lines)


def _fill(overfill: float | None) -> str:
    if overfill is None:
        return "no slot is left for them"
    return f"{overfill:+.0%} ({'they do not fit' if overfill > 0 else 'they fit'})"


def prefix_slots(stream: StreamSpec, run: Run, *, kv_tokens: int, replicas: int) -> PrefixSlots | None:
    """The arithmetic of a stream's traffic, with lengths and requests in flight as a run of it had them; None
    if its prompts have no groups."""
    content = stream.content
    if not isinstance(content, SharedPrefix):
        return None
    requests, steps = run.requests, run.steps
    shared = content.prefix_tokens + stream.system_prompt_tokens
    own = float(requests["prompt_tokens"].mean()) - shared + float(requests["output_tokens"].mean()) / 2
    sending = steps[steps["start"] <= requests["arrival"].max()]
    busy_s = float(sending["duration"].sum())
    in_flight = float((sending["running"] * sending["duration"]).sum()) / busy_s if busy_s else 0.0
    return PrefixSlots(kv_tokens, replicas, content.groups, shared, own, in_flight)
