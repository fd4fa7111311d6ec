"""What the router's side of a fleet knows of a replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.kv_events import KVEvent, publish_kv_events
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.inputs.units import to_ps
from servecast.sim.routing.gauges import Gauges, Scrape
from servecast.sim.routing.options import RouterOptions


class Endpoint:
    """A replica as the router sees it; see ``router.Backend``.

    Args:
        replica: the server. life: when it is there. rng: for the phase of its scrapes. clock: picoseconds.
        outstanding: requests sent to each replica and not ended.
    """

    def __init__(
        self,
        replica: Replica,
        life: Life,
        options: RouterOptions,
        rng: np.random.Generator,
        clock: Callable[[], int],
        outstanding: NDArray[np.int64],
    ) -> None:
        self.replica = replica
        self.life = life
        self.index = replica.index
        self.block_size = replica.config.block_size
        self.num_gpu_blocks = replica.config.num_gpu_blocks
        self._clock = clock
        self._outstanding = outstanding
        self._options = options
        self._rng = rng
        self._scrape: Scrape | None = None
        self._events: deque[tuple[int, KVEvent]] = deque()  # (known from, event)

    @property
    def outstanding(self) -> int:
        return int(self._outstanding[self.index])

    @property
    def gauges(self) -> Gauges:
        return Gauges() if self._scrape is None else self._scrape.get(self._clock())

    def scrape(self) -> None:
        interval, delay = to_ps(self._options.scrape_interval_s), to_ps(self._options.scrape_delay_s)
        phase = int(self._rng.integers(interval)) if interval else 0
        self._scrape = Scrape(interval, delay, to_ps(self.life.start_s) + phase)
        self.replica.loop.after_step = self._set_gauges

    def _set_gauges(self, now: int) -> None:
        assert self._scrape is not None
        engine = self.replica.engine
        gauges = Gauges(engine.num_waiting, engine.num_running, engine.kv.usage)
        self._scrape.put(now, gauges)

    def subscribe(self) -> None:
        lag, events, replica = to_ps(self._options.event_lag_s), self._events, self.replica
        publish_kv_events(replica.engine, lambda event: events.append((replica.now + lag, event)))

    def take_events(self) -> Iterator[KVEvent]:
        now, events = self._clock(), self._events
        while events and events[0][0] <= now:
            yield events.popleft()[1]
