"""llm-d's endpoint picker (EPP) as a router: filters, scorers, picker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from servecast.sim.engine.request import Request
from servecast.sim.routing.backends import Backend, Columns
from servecast.sim.routing.llmd.cycle import Cycle, Setting
from servecast.sim.routing.llmd.filters import FILTERS
from servecast.sim.routing.llmd.pickers import PICKERS
from servecast.sim.routing.llmd.plugin import IN_FLIGHT, EppConfig, Plugin
from servecast.sim.routing.llmd.producers import PREFIXES, InFlightLoad
from servecast.sim.routing.llmd.release import EPP_RELEASES
from servecast.sim.routing.llmd.scorers import SCORERS, Scorer, Scores
from servecast.sim.routing.options import RouterOptions


class EndpointPicker:
    """The total of an endpoint is the sum of weight x score, not divided by anything; the picker sees totals.

    Nothing corrects the gauges for requests sent since the last scrape.

    Args:
        config: what ``read_epp`` gave.
        rng: for the picker. clock: simulated seconds.
        beside: the picker of another profile, whose plugins are the same where they have one name.
    """

    def __init__(
        self,
        config: EppConfig,
        options: RouterOptions,
        rng: np.random.Generator,
        clock: Callable[[], float],
        *,
        beside: EndpointPicker | None = None,
    ) -> None:
        release = EPP_RELEASES[options.epp_release]
        setting = Setting(release, options.bytes_per_token, rng, clock, config.exact_tokens)
        if beside is not None:
            setting = beside.setting
        self.setting: Setting = setting
        self._made: dict[str, Any] = {} if beside is None else dict(beside._made)
        for plugin in config.producers:
            if plugin.type == IN_FLIGHT:
                setting.loads[plugin.name] = InFlightLoad(plugin, setting)
            else:
                setting.prefixes[plugin.name] = PREFIXES[plugin.type](plugin, setting)
        filters, scorers = config.filters, config.scorers
        self._filters = [self._one(plugin, FILTERS) for plugin in filters]
        self._scorers = [(self._one(plugin, SCORERS), weight) for plugin, weight in scorers]
        self._known: Columns | None = None
        self._base: Scores = np.empty(0)  # for ``_known``: the sum of the first scores, which are by gauges
        self._rest: list[tuple[Scorer, float, Scores | None]] = []  # the others, of which some are kept
        self._picker = PICKERS[config.picker.type]
        producers = [
            *setting.loads.values(),
            *setting.prefixes.values(),
        ]  # a load asks before prefixes change
        plugins = [*producers, *self._filters, *(scorer for scorer, _weight in self._scorers)]
        if beside is not None:  # which tells those that are its own, too
            own = [*beside.setting.loads.values(), *beside.setting.prefixes.values(), *beside._made.values()]
            plugins = [plugin for plugin in plugins if all(plugin is not each for each in own)]
        self._connect, self._picked, self._answered, self._ended = (
            [getattr(plugin, name) for plugin in plugins if hasattr(plugin, name)]
            for name in ("connect", "picked", "answered", "ended")
        )

    def _one(self, plugin: Plugin, kinds: Mapping[str, Callable[[Plugin, Setting], Any]]) -> Any:
        """The plugin of that name."""
        if plugin.name not in self._made:
            self._made[plugin.name] = kinds[plugin.type](plugin, self.setting)
        return self._made[plugin.name]

    def connect(self, backends: Sequence[Backend]) -> None:
        for backend in backends:
            backend.scrape()
        for connect in self._connect:
            connect(backends)

    def pick(self, request: Request, backends: Sequence[Backend]) -> int | None:
        cycle = Cycle.among(request, backends)
        position = self.choose(cycle)
        if position is not None:
            self.tell(cycle, backends[position])
        return position

    def choose(self, everyone: Cycle) -> int | None:
        """The position of the best; None where filters let none pass."""
        cycle = everyone
        positions: Sequence[int] = range(len(cycle.backends))
        for each in self._filters:
            kept = each.keep(cycle)
            if not len(kept):
                return None
            if len(kept) < len(positions):
                positions = [positions[position] for position in kept]
                cycle = everyone.of(positions)
        return positions[self._picker(self.totals(cycle), self.setting.rng)]

    def tell(self, cycle: Cycle, backend: Backend) -> None:
        """A request goes to a server."""
        for picked in self._picked:
            picked(cycle, backend)

    def totals(self, cycle: Cycle) -> Scores:
        """Each candidate's sum of weight x score. Scores by gauges are kept while these stay as they are."""
        if cycle.known is not self._known:
            self._known, self._base, self._rest = cycle.known, np.zeros(len(cycle.known)), []
            for scorer, weight in self._scorers:
                kept = scorer.score(cycle) * weight if scorer.by_gauges else None
                if kept is None or self._rest:
                    self._rest.append((scorer, weight, kept))
                else:
                    self._base = self._base + kept
        totals = self._base
        for scorer, weight, kept in self._rest:
            totals = totals + (scorer.score(cycle) * weight if kept is None else kept)
        return totals

    def answered(self, request: Request, index: int) -> None:
        for answered in self._answered:
            answered(request, index)

    def ended(self, request: Request, index: int) -> None:
        for ended in self._ended:
            ended(request, index)
