"""The engine: what a replica asks of a server's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import Pool
from servecast.sim.engine.request import Request
from servecast.sim.engine.step import Step


class Engine(Protocol):
    """Decides step by step who computes what. ``add``, then ``schedule`` and ``complete`` in turn."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def has_requests(self) -> bool:
        """Whether there is a step to decide."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting(self) -> Sequence[int]:
        """Request ids, next one first."""
        ...

    @property
    def kv(self) -> Pool: ...

    def add(self, request: Request, arrival: int) -> None:
        """Queue a request; ``arrival`` rises from call to call. InputError if it could never run."""
        ...

    def abort(self, request_id: int) -> None:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        ...

    def schedule(self) -> Step:
        """Decide the next step."""
        ...

    def complete(self, step: Step) -> None:
        """The step has run: say in it who got a first, a further, or the last token."""
        ...
