"""How surely and how closely the planner answers, and what it spends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servecast.sim.inputs.errors import InputError

LEAST_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Effort:
    """confidence: with which a rate must pass or fail; at 0.5 the estimates themselves decide, and one
    replication is enough. tolerance: relative width to which it is bracketed.

    replications: rising numbers of replications, at least 2 each: a rate that the first cannot decide gets
    the next. least_requests, max_requests: bounds on the counted requests of a replication (see
    `prober.requests_needed`). jobs: processes over which replications run; results do not depend on it.

    Raises:
        InputError: a value out of its range.
    """

    confidence: float = 0.95
    tolerance: float = 0.03
    replications: tuple[int, ...] = (4, 8, 16)
    max_requests: int = 20_000
    least_requests: int = LEAST_REQUESTS
    jobs: int = 1

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            what = f"{self.confidence:g} is out of range"
            raise InputError(what, where="confidence", fix="Give 0.5 to 1, as 0.95.")
        if not 0 < self.tolerance < math.inf:
            fix = "Give a positive number."
            raise InputError(f"{self.tolerance:g} is not positive and finite", where="tolerance", fix=fix)
        rising = sorted(set(self.replications))
        least = 1 if self.confidence == 0.5 else 2
        if not rising or rising[0] < least or list(self.replications) != rising:
            where, fix = "replications", "One replication gives no interval: try 4, 8, 16."
            raise InputError(f"{list(self.replications)} does not rise from at least 2", where, fix)
