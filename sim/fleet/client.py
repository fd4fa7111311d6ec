"""The client: a process that sends requests and reads the tokens of all its streams."""

from __future__ import annotations

from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.units import to_ps


class Client:
    """The client's process: it sends requests and reads the tokens of all its streams, one thing at a time.

    Times are picoseconds.
    """

    __slots__ = ("_free_at", "_request_ps", "_token_ps")

    def __init__(self, costs: FrontEndCosts) -> None:
        self._free_at = 0
        self._request_ps = to_ps(costs.client_request_s)
        self._token_ps = to_ps(costs.client_token_s)

    @property
    def reading_costs(self) -> bool:
        return self._token_ps > 0

    @property
    def is_free(self) -> bool:
        """Whether it holds nothing up."""
        return not self._token_ps and not self._request_ps

    def send(self, now: int) -> int:
        """When a request that is started now is on the wire."""
        self._free_at = max(now, self._free_at) + self._request_ps
        return self._free_at

    def read(self, first: int, spacing: int, events: int, tokens: int) -> tuple[int, int]:
        """Read a batch of tokens which arrive from ``first`` on, ``spacing`` apart, in so many new events.

        Returns:
            When the first one is read, and the spacing of the others.
        """
        cost = self._token_ps
        if not cost:
            return first, spacing
        start = max(first, self._free_at) + cost
        end = max(start + cost * max(events - 1, 0), first + spacing * (tokens - 1) + cost)
        self._free_at = end
        return start, (end - start) // (tokens - 1) if tokens > 1 else 0
