"""Data parallelism inside one server: its engine cores, and what ties them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servecast.sim.engine.rules import since

Balancing = Literal["queues", "queues_in_turn", "in_flight"]
_BALANCING_SINCE: tuple[tuple[str, Balancing], ...] = (  # DPLBAsyncMPClient.get_core_engine_for_request
    ("0.27", "in_flight"),
    ("0.25", "queues_in_turn"),
    ("0.20", "queues"),
)
_SYNC_INTERVAL_SINCE = "0.30"  # --dp-sync-interval, and an agreement at a wave's first step


@dataclass(frozen=True, slots=True)
class DataParallel:
    """How the engine cores of a server belong together.

    Attributes:
        size: engine cores, each with a scheduler and a cache of its own (``--data-parallel-size``).
        local: of those, the ones behind the same API servers: all with internal balancing, one node's with
            hybrid, one with external. What is outside balances between them.
        api_servers: of each such group.
        lockstep: all cores run the same number of steps, since they share the layers of experts; else they
            know nothing of each other.
        balancing: the API servers' rule. "queues": 4 times the waiting plus the running, of the last
            snapshot; "queues_in_turn": the same, from another core on each time; "in_flight": see
            ``sim.fleet.balance``.
        sync_interval: steps from one agreement on whether anybody has work to the next. sync_first: they
            agree at a wave's first step, too.
        prefill_schedule_interval: of a core in lockstep, prompt work in every so many-th step only.
    """

    size: int
    local: int
    api_servers: int
    lockstep: bool
    balancing: Balancing = "in_flight"
    sync_interval: int = 16
    sync_first: bool = True
    prefill_schedule_interval: int = 1

    @property
    def groups(self) -> int:
        """Groups of cores behind API servers of their own: what the router sees as replicas."""
        return self.size // self.local


def balancing_of(release: str) -> Balancing:
    """The rule of a release of ``RELEASES``."""
    return next(rule for first, rule in _BALANCING_SINCE if since(release, first))


def sync_interval_of(release: str) -> tuple[int, bool]:
    """Default of ``--dp-sync-interval``, which once was fixed; whether cores agree at the first step."""
    return (16, True) if since(release, _SYNC_INTERVAL_SINCE) else (32, False)
