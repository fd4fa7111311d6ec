"""Routers of a fleet with servers for prompts and servers for answers, each picked by a policy of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend
from servecast.sim.routing.routers import Router


class Splitting(Protocol):
    """Picks a server for the prompt and one for the answer."""

    def split(self, request: Request, backends: Sequence[Backend]) -> tuple[int | None, int | None] | None:
        """Positions in ``backends`` of the servers that decode (None: picked when the prompt is computed) and
        that compute the prompt (None: the former does); None refuses the request."""
        ...

    def pick_decode(self, request: Request, backends: Sequence[Backend]) -> int | None:
        """Position of the server that decodes, once the prompt is computed."""
        ...


class Pools:
    """A policy for each pool.

    Args:
        direct_below: prompts of fewer tokens go straight to a decode server. late: the decode server is
            picked when the prompt is computed.
    """

    def __init__(self, prefill: Router, decode: Router, direct_below: int = 0, *, late: bool = True) -> None:
        self._routers = {"prefill": prefill, "decode": decode}
        self._direct_below, self._late = direct_below, late

    def _pick(self, role: str, request: Request, backends: Sequence[Backend]) -> int | None:
        places = [place for place, each in enumerate(backends) if each.role == role]
        if not places:
            return None
        position = self._routers[role].pick(request, [backends[place] for place in places])
        return None if position is None else places[position]

    def split(self, request: Request, backends: Sequence[Backend]) -> tuple[int | None, int | None] | None:
        if request.prompt_tokens < self._direct_below:
            decode = self.pick_decode(request, backends)
            return None if decode is None else (decode, None)
        prefill = self._pick("prefill", request, backends)
        if prefill is None:
            return None
        if self._late:
            return None, prefill
        decode = self.pick_decode(request, backends)
        return None if decode is None else (decode, prefill)

    def pick_decode(self, request: Request, backends: Sequence[Backend]) -> int | None:
        return self._pick("decode", request, backends)
