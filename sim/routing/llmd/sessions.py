"""Which endpoint has a session (``Request.group`` is the session), to llm-d's session affinity."""

from __future__ import annotations

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend, Backends
from servecast.sim.routing.llmd.cycle import Cycle, Setting
from servecast.sim.routing.llmd.plugin import Plugin


class Sessions:
    """Under ``encoded_endpoint_header``, the endpoint that answered the session's last request. Under
    ``session_id``, the one that its first went to, until it is gone or the session was not seen for
    evictionTtlSeconds."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        strategy = parameters.text("strategy", "encoded_endpoint_header")
        if strategy not in ("encoded_endpoint_header", "session_id"):
            what = f"strategy is {strategy!r}"
            raise parameters.error(what, "strategy", "Known are encoded_endpoint_header and session_id.")
        self._by_id = strategy == "session_id"
        ttl_s = parameters.block("sessionIdConfig").number("evictionTtlSeconds", 0.0)
        self._ttl_s = ttl_s or 300.0
        self._clock = setting.clock
        self._homes: dict[int, tuple[int, float]] = {}  # session -> endpoint, last seen

    def home(self, request: Request) -> int | None:
        """The number of the session's endpoint, if it has one."""
        found = None if request.group is None else self._homes.get(request.group)
        if found is None or (self._by_id and self._clock() - found[1] > self._ttl_s):
            return None
        return found[0]

    def picked(self, cycle: Cycle, backend: Backend) -> None:
        """A request goes to an endpoint; one for its prompt alone has no session."""
        session = cycle.request.group
        if self._by_id and session is not None and backend.role != "prefill":
            home = self.home(cycle.request)
            there = home is not None and Backends.of(cycle.backends).position(home) is not None
            self._homes[session] = (home if home is not None and there else backend.index), self._clock()

    def ended(self, request: Request, index: int) -> None:
        """An endpoint has answered."""
        if not self._by_id and request.group is not None:
            self._homes[request.group] = index, self._clock()
