"""What the router's side of a fleet knows of its replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.kv_events import KVEvent, publish_kv_events
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.inputs.units import to_ps
from servecast.sim.routing.backends import Backends, Columns
from servecast.sim.routing.gauges import Gauges, Scrape
from servecast.sim.routing.options import RouterOptions


class News:
    """What becomes known of replicas, and when: who has something new by now, without asking each."""

    def __init__(self) -> None:
        self._coming: list[tuple[int, int]] = []  # (known from, number of the replica)
        self.numbers: set[int] = set()

    def expect(self, time: int, number: int) -> None:
        """A replica has something new from a time on."""
        heappush(self._coming, (time, number))

    def by(self, now: int) -> set[int]:
        """Numbers of the replicas that have something new, until they are taken out."""
        coming = self._coming
        while coming and coming[0][0] <= now:
            self.numbers.add(heappop(coming)[1])
        return self.numbers


class Board:
    """What the endpoints of a fleet share: the time in picoseconds, the requests sent to each replica and not
    ended, and whose gauges and KV events are news. count: of the most replicas that there may be."""

    def __init__(self, count: int, clock: Callable[[], int]) -> None:
        self.clock, self.outstanding = clock, np.zeros(count, np.int64)
        self.scrapes, self.tells = News(), News()


class Endpoint:
    """A replica as the router sees it; see ``Backend``.

    Args:
        replica: the server. life: when it is there. options: how late the router knows things. rng: for the
            phase of its scrapes.
    """

    def __init__(
        self,
        replica: Replica,
        life: Life,
        options: RouterOptions,
        rng: np.random.Generator,
        board: Board,
    ) -> None:
        self.replica = replica
        self.life = life
        self.index = replica.index
        self.block_size = replica.config.block_size
        self.num_gpu_blocks = replica.config.num_gpu_blocks
        self.max_loras = replica.config.max_loras
        self.role = replica.role
        self._board = board
        self._options = options
        self._rng = rng
        self._scrape: Scrape | None = None
        self._lag = to_ps(options.event_lag_s)
        self._events: deque[tuple[int, KVEvent]] = deque()  # (known from, event)

    @property
    def outstanding(self) -> int:
        return int(self._board.outstanding[self.index])

    @property
    def gauges(self) -> Gauges:
        return Gauges() if self._scrape is None else self._scrape.get(self._board.clock())

    def scrape(self) -> None:
        interval, delay = to_ps(self._options.scrape_interval_s), to_ps(self._options.scrape_delay_s)
        phase = int(self._rng.integers(interval)) if interval else 0
        self._scrape = Scrape(interval, delay, to_ps(self.life.start_s) + phase)
        for loop in self.replica.loops:
            loop.after_step = self._set_gauges

    def _set_gauges(self, now: int) -> None:
        assert self._scrape is not None
        known_from = self._scrape.put(now, self.replica.gauges())
        if known_from is not None:
            self._board.scrapes.expect(known_from, self.index)

    def subscribe(self) -> None:
        for engine in self.replica.engines:
            publish_kv_events(engine, self._hear)

    def _hear(self, event: KVEvent) -> None:
        known_from = self.replica.now + self._lag
        if not self._events:
            self._board.tells.expect(known_from, self.index)
        self._events.append((known_from, event))

    def take_events(self) -> list[KVEvent]:
        now, events, taken = self._board.clock(), self._events, list[KVEvent]()
        while events and events[0][0] <= now:
            taken.append(events.popleft()[1])
        self._board.tells.numbers.discard(self.index)
        if events:
            self._board.tells.expect(events[0][0], self.index)
        return taken


class Endpoints(Backends):
    """Replicas of a fleet, with columns that are kept.

    Args:
        everyone: all endpoints, by number. members: those that are in it.
    """

    def __init__(self, everyone: Sequence[Endpoint], members: Sequence[Endpoint], board: Board) -> None:
        super().__init__(members)
        self._everyone, self._board = everyone, board
        n = len(board.outstanding)
        self._all = Columns(np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n))
        self._set_members(members)

    def _set_members(self, members: Sequence[Endpoint]) -> None:
        self.members = self._members = members
        self._numbers = np.array([each.index for each in members], np.int64)
        self._complete = len(members) == len(self._board.outstanding)
        self._columns: Columns | None = None
        self._positions = {each.index: position for position, each in enumerate(members)}

    def add(self, endpoint: Endpoint) -> None:
        """One is ready from now on."""
        self._set_members(sorted([*self._members, endpoint], key=lambda each: each.index))

    def remove(self, endpoint: Endpoint) -> None:
        """One is no longer."""
        self._set_members([each for each in self._members if each is not endpoint])

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._numbers

    @property
    def outstanding(self) -> NDArray[np.int64]:
        outstanding = self._board.outstanding
        return outstanding if self._complete else outstanding[self._numbers]

    def position(self, number: int) -> int | None:
        return self._positions.get(number)

    def columns(self) -> Columns:
        known, new = self._all, self._board.scrapes.by(self._board.clock())
        if new:
            for number in new:
                gauges = self._everyone[number].gauges
                known.waiting[number], known.running[number], known.kv_usage[number] = gauges[:3]
            new.clear()
            self._columns = None
        if self._columns is None:
            self._columns = known.at(slice(None) if self._complete else self._numbers)
            self._columns.numbers = self._numbers
        return self._columns

    def telling(self) -> Iterable[Endpoint]:
        numbers = self._board.tells.by(self._board.clock())
        return [self._everyone[number] for number in sorted(numbers)] if numbers else ()
