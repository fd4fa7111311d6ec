"""llm-d's endpoint picker (EPP) as a router: filters, scorers, picker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.routing.llmd.config import EppConfig
from servecast.sim.routing.llmd.pickers import PICKERS
from servecast.sim.routing.llmd.release import EPP_RELEASES
from servecast.sim.routing.llmd.scorers import SCORERS, Connects, Cycle, HearsEnds, HearsPicks, Setting
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import Backend


class EndpointPicker:
    """The total of an endpoint is the sum of weight x score, not divided by anything; the picker sees totals.

    Nothing corrects the gauges for requests sent since the last scrape. The only filter that is modelled,
    decode-filter, lets every replica pass: without roles all of them decode.

    Args:
        config: what ``read_epp`` gave.
        rng: for the picker. clock: simulated seconds.
    """

    def __init__(
        self, config: EppConfig, options: RouterOptions, rng: np.random.Generator, clock: Callable[[], float]
    ) -> None:
        release = EPP_RELEASES[options.epp_release]
        setting = Setting(release, options.bytes_per_token, rng, clock)
        self._clamps = release.clamps
        self._scorers = [(SCORERS[plugin.type](plugin, setting), weight) for plugin, weight in config.scorers]
        self._picker = PICKERS[config.picker.type](config.picker, setting)
        scorers = [scorer for scorer, _weight in self._scorers]
        self._connect = [scorer for scorer in scorers if isinstance(scorer, Connects)]
        self._hear_picks = [scorer for scorer in scorers if isinstance(scorer, HearsPicks)]
        self._hear_ends = [scorer for scorer in scorers if isinstance(scorer, HearsEnds)]

    def connect(self, backends: Sequence[Backend]) -> None:
        for backend in backends:
            backend.scrape()
        for scorer in self._connect:
            scorer.connect(backends)

    def pick(self, request: Request, backends: Sequence[Backend]) -> int:
        cycle = Cycle(request, backends, [backend.gauges for backend in backends])
        position = self._picker.pick(self.totals(cycle))
        for scorer in self._hear_picks:
            scorer.picked(cycle, backends[position])
        return position

    def totals(self, cycle: Cycle) -> list[float]:
        """Each candidate's sum of weight x score."""
        totals = [0.0] * len(cycle.backends)
        for scorer, weight in self._scorers:
            for position, score in enumerate(scorer.score(cycle)):
                if self._clamps:
                    score = min(max(score, 0.0), 1.0)
                totals[position] += score * weight
        return totals

    def ended(self, request: Request, index: int) -> None:
        for scorer in self._hear_ends:
            scorer.ended(request, index)
