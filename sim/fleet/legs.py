"""The two legs of requests whose prompts are computed by servers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.engine.engine_loop import OUTCOMES
from servecast.sim.engine.request import Requests
from servecast.sim.fleet.kv_connectors import Exchange
from servecast.sim.routing.backends import Backend
from servecast.sim.routing.pools import Splitting

_FINISH = OUTCOMES.index("finish")


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """What a fleet of prefill and decode servers has beside them. hop_s: see ``Proxy``. exchange: of their KV
    blocks, None where these go over a file system."""

    router: Splitting
    hop_s: float
    exchange: Exchange | None


class Legs:
    """Where the legs of requests go, by row of their table.

    Args:
        router: of both pools. hop_ps: what the proxy takes from a prefill server's answer to sending the
            request on.

    Attributes:
        prompts: the requests as prefill servers see them: of one output token.
        outcomes: (fields, n) of their first legs. prefill: (n,) the server of it, -1 where there was none.
    """

    def __init__(self, requests: Requests, router: Splitting, hop_ps: int) -> None:
        n = len(requests)
        ones = np.ones(n, np.int64)
        self.prompts = replace(requests, output_tokens=ones, max_tokens=ones.copy())
        self.outcomes = np.full((len(OUTCOMES), n), -1, np.int64)
        self.outcomes[-1] = 0
        self.prefill, self._decode = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
        self._requests, self._router, self._hop = requests, router, hop_ps

    def first(self, row: int, backends: Sequence[Backend]) -> int | None:
        """The number of the server that a request goes to first; None refuses it."""
        found = self._router.split(self._requests[row], backends)
        if found is None:
            return None
        decode, prefill = found
        if decode is not None:
            self._decode[row] = backends[decode].index
        if prefill is None:
            return int(self._decode[row])
        self.prefill[row] = backends[prefill].index
        return int(self.prefill[row])

    def second(self, row: int, backends: Sequence[Backend]) -> int | None:
        """That of the server that it goes on to; None where there is none."""
        if self._decode[row] < 0:
            position = self._router.pick_decode(self._requests[row], backends)
            self._decode[row] = -1 if position is None else backends[position].index
        return int(self._decode[row]) if self._decode[row] >= 0 else None

    def computed(self, row: int) -> int:
        """When a prompt whose token is on its way has come to its next server."""
        return int(self.outcomes[_FINISH, row]) + self._hop

    def home(self, row: int) -> int:
        """The server that a router knows a request's answer to come from."""
        return int(self._decode[row] if self._decode[row] >= 0 else self.prefill[row])

    def columns(
        self, exchange: Exchange | None, rows: NDArray[np.int64] | slice, own: NDArray[np.int64]
    ) -> dict[str, Any]:
        """What the table of requests says of first legs: times in seconds, NaN where there was none. own:
        cached tokens of the second legs, which count where there is no first one."""
        where, found = self.prefill[rows], dict[str, Any]()
        found["prefill_replica"] = pd.array(where, "Int64")
        found["prefill_replica"][where < 0] = pd.NA
        for name in ("queued", "scheduled", "ended"):
            ps = self.outcomes[OUTCOMES.index(name)][rows]
            found[f"prefill_{name}"] = np.where(ps < 0, np.nan, ps * 1e-12)
        cached = self.outcomes[OUTCOMES.index("cached_tokens")][rows]
        found["cached_tokens"] = pd.array(np.where(where < 0, own, cached), "Int64")
        found["cached_tokens"][found["cached_tokens"] < 0] = pd.NA
        reads = {} if exchange is None else exchange.reads
        read = [reads.get(number) for number in self._requests.request_id[rows].tolist()]
        for name in ("start", "end"):
            found[f"kv_transfer_{name}"] = np.array(
                [np.nan if each is None else getattr(each, name) * 1e-12 for each in read]
            )
        found["kv_transfer_bytes"] = np.array([0 if each is None else each.bytes for each in read])
        return found
