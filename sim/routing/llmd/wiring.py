"""Which of llm-d's plugins asks which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from servecast.sim.routing.llmd.parameters import Parameters
from servecast.sim.routing.llmd.plugin import APPROXIMATE, IN_FLIGHT, PRECISE, Plugin
from servecast.sim.routing.llmd.plugins import kinds
from servecast.sim.routing.llmd.release import EppRelease


class Wiring:
    """Which producers scorers and filters ask; those that nobody listed are made with their defaults.

    Up to v1.5 a prefix scorer has an index of its own, with its own parameters.
    """

    def __init__(self, release: EppRelease, plugins: Mapping[str, Plugin], source: str) -> None:
        self._apart, self._plugins, self._source = release.producers, plugins, source
        self._made: dict[str, Plugin] = {}

    def asking(self, plugin: Plugin) -> Plugin:
        """The plugin with the names of its producers."""
        kind, apart = plugin.type, self._apart
        named = plugin.parameters.text("prefixMatchInfoProducerName", "")
        if named:
            return self._with_load(replace(plugin, prefixes=self._producer(named, "", plugin)))
        if kind == "precise-prefix-cache-scorer":
            self._made[plugin.name] = replace(plugin, type=PRECISE)
            return self._with_load(replace(plugin, prefixes=plugin.name))
        if kind == "prefix-cache-scorer" and not (apart or self._listed(APPROXIMATE)):
            self._made[plugin.name] = replace(plugin, type=APPROXIMATE)
            return replace(plugin, prefixes=plugin.name)
        asks = kind in ("prefix-cache-scorer", "prefix-cache-affinity-filter") or (
            kind == "no-hit-lru-scorer" and apart
        )
        if asks:
            plugin = replace(plugin, prefixes=self._producer(APPROXIMATE, APPROXIMATE, plugin))
        return self._with_load(plugin)

    def asked_by_decider(self) -> None:
        """A prefix-based decider asks the approximate index, whoever keeps it."""
        if self._apart or self._listed(APPROXIMATE):
            self._producer(APPROXIMATE, APPROXIMATE, Plugin("", "", Parameters({}, self._source)))

    def _with_load(self, plugin: Plugin) -> Plugin:
        kinds = ("token-load-scorer", "prefix-cache-affinity-filter", "utilization-filter")
        if plugin.type in kinds or (plugin.type == "active-request-scorer" and self._apart):
            named = plugin.parameters.text("inFlightLoadProducerName", IN_FLIGHT)
            return replace(plugin, load=self._producer(named, IN_FLIGHT, plugin))
        return plugin

    def _producer(self, name: str, default: str, plugin: Plugin) -> str:
        listed = self._plugins.get(name)
        if listed is not None and listed.type == "precise-prefix-cache-scorer":
            self._made[name] = replace(listed, type=PRECISE)
        elif listed is not None and kinds()[listed.type].role == "producer":
            self._made[name] = listed
        elif name == default:
            self._made[name] = Plugin(name, name, Parameters({}, self._source))
        elif name not in self._made:
            raise plugin.parameters.error(
                f"there is no producer named {name!r}",
                "prefixMatchInfoProducerName",
                "Name a plugin of type " + (default or f"{APPROXIMATE} or {PRECISE}") + ".",
            )
        return name

    def _listed(self, kind: str) -> bool:
        return any(plugin.type == kind for plugin in self._plugins.values())

    def producers(self) -> tuple[Plugin, ...]:
        """All that are asked, those that a count of requests in flight asks included."""
        for name, plugin in list(self._made.items()):
            if plugin.type == IN_FLIGHT:
                asked = plugin.parameters.text("prefixMatchInfoProducerName", "")
                if asked or APPROXIMATE in self._plugins or APPROXIMATE in self._made:
                    asked = self._producer(asked or APPROXIMATE, APPROXIMATE, plugin)
                self._made[name] = replace(plugin, prefixes=asked)
        return tuple(self._made.values())
