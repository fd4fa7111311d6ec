"""Which replica takes a request: a policy is a class with one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from servecast.sim.request import Request


class Backend(Protocol):
    """What a router may know of a replica."""

    @property
    def outstanding(self) -> int:
        """Requests sent to it and not finished."""
        ...


class Router(Protocol):
    """Picks the replica at the moment a request is sent."""

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        """Index of the replica that takes the request."""
        ...


class RoundRobin:
    """In turn."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        index = self._next % len(backends)
        self._next = index + 1
        return index


class LeastOutstanding:
    """The one with the fewest requests in flight; the first of equals."""

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        return min(range(len(backends)), key=lambda index: backends[index].outstanding)


ROUTERS: dict[str, type[RoundRobin] | type[LeastOutstanding]] = {
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
}
