"""llm-d's filters: which endpoints are candidates at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from servecast.sim.routing.backends import Backends
from servecast.sim.routing.llmd.cycle import Cycle, Setting
from servecast.sim.routing.llmd.plugin import NotModelled, Plugin
from servecast.sim.routing.llmd.roles import roles_of
from servecast.sim.routing.llmd.sessions import Sessions


class Filter(Protocol):
    """Leaves some of the candidates."""

    def keep(self, cycle: Cycle) -> Sequence[int]:
        """Positions of those that stay, rising."""
        ...


class RoleFilter:
    """Those whose role is among some. Replicas without pools have none, and all pass: the fleet is of those
    that a selector leaves."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._roles = roles_of(plugin)

    def keep(self, cycle: Cycle) -> Sequence[int]:
        roles, everyone = self._roles, cycle.backends
        if roles is None or not (everyone and everyone[0].role):
            return range(len(everyone))
        return [position for position, each in enumerate(everyone) if each.role in roles]


class PrefixCacheAffinityFilter:
    """Those that have affinityThreshold of the prompt or more.

    All, where none does, or where the least loaded of them has so many more tokens in flight than the least
    loaded of the others that the wait for them, at peakPrefillThroughput tokens a second, is more than
    maxTTFTPenaltyMs longer, or that they are more than maxTokensInFlightPenalty. 0 is no limit.
    """

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        parameters = plugin.parameters
        self._plugin, self._setting = plugin, setting
        self._threshold = parameters.number("affinityThreshold", 0.8, high=1.0)
        self._explores = parameters.number("explorationProbability", 0.0, high=1.0)
        if parameters.text("ttftSource", "prefillThroughput") != "prefillThroughput":
            what = (
                "ttftSource latencyPredictor asks a predictor that is trained while it serves: not modelled"
            )
            raise NotModelled(what, where=parameters.where("ttftSource"), fix="Use prefillThroughput.")
        penalty_ms = parameters.number("maxTTFTPenaltyMs", 18_000.0)
        rate = parameters.number("peakPrefillThroughput", 15_928.0)
        tokens = parameters.number("maxTokensInFlightPenalty", 0.0)
        limits = [penalty_ms / 1e3 * rate, tokens]
        self._most_tokens = min((limit for limit in limits if limit > 0), default=None)

    def keep(self, cycle: Cycle) -> Sequence[int]:
        everyone = range(len(cycle.backends))
        if len(everyone) <= 1 or self._threshold <= 0:
            return everyone
        if self._explores and self._setting.rng.random() < self._explores:
            return everyone
        match, numbers = self._setting.prefixes[self._plugin.prefixes].match(cycle), cycle.known.numbers
        sticks = match.shares(numbers) >= self._threshold
        if not sticks.any() or sticks.all():
            return everyone
        if self._most_tokens is not None:
            tokens = self._setting.loads[self._plugin.load].tokens(numbers)
            if tokens[sticks].min() - tokens[~sticks].min() > self._most_tokens:
                return everyone
        return np.flatnonzero(sticks).tolist()


class UtilizationFilter:
    """Those whose every named value is at most its maxValue; with fallbackOnEmpty all, where none is."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        load, parameters = setting.loads[plugin.load], plugin.parameters
        values: dict[str, Callable[[Cycle], NDArray[Any]]] = {
            "active-requests": lambda cycle: load.requests(cycle.known.numbers),
            "running-requests": lambda cycle: cycle.known.running,
            "waiting-queue": lambda cycle: cycle.known.waiting,
            "kv-cache-utilization": lambda cycle: cycle.known.kv_usage,
        }
        self._fallback = parameters.flag("fallbackOnEmpty", False)
        self._limits: list[tuple[Callable[[Cycle], NDArray[Any]], float]] = []
        for condition in parameters.blocks("conditions"):
            metric = condition.text("metric", "")
            if metric not in values:
                raise condition.error(f"metric is {metric!r}", "metric", f"Known are {', '.join(values)}.")
            if "maxValue" not in condition.paths():
                raise condition.error("maxValue is missing", "maxValue", "Add it.")
            self._limits.append((values[metric], condition.number("maxValue", 0.0)))
        if not self._limits:
            raise parameters.error("there are no conditions", "conditions", "Add at least one.")

    def keep(self, cycle: Cycle) -> Sequence[int]:
        fits = np.ones(len(cycle.known), np.bool_)
        for value, most in self._limits:
            fits &= value(cycle) <= most
        kept: list[int] = np.flatnonzero(fits).tolist()
        return kept if kept or not self._fallback else range(len(fits))


class SessionAffinityFilter(Sessions):
    """The one that has the session; all, where there is none."""

    def keep(self, cycle: Cycle) -> Sequence[int]:
        home = self.home(cycle.request)
        position = None if home is None else Backends.of(cycle.backends).position(home)
        return range(len(cycle.backends)) if position is None else [position]


FILTERS: dict[str, Callable[[Plugin, Setting], Filter]] = {
    "decode-filter": RoleFilter,
    "prefill-filter": RoleFilter,
    "by-label": RoleFilter,
    "by-label-selector": RoleFilter,
    "label-selector-filter": RoleFilter,
    "prefix-cache-affinity-filter": PrefixCacheAffinityFilter,
    "utilization-filter": UtilizationFilter,
    "session-affinity-filter": SessionAffinityFilter,
}
