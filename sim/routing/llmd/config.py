"""llm-d's EndpointPickerConfig, read as the endpoint picker reads it: strictly, and by release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.routing.llmd.release import EPP_RELEASES, EppRelease

API_VERSION, KIND = "inference.networking.x-k8s.io/v1alpha1", "EndpointPickerConfig"
FILTERS = ("decode-filter",)
HANDLERS = ("single-profile-handler",)
PICKERS = ("max-score-picker", "random-picker", "weighted-random-picker")
SCORERS = (
    "queue-scorer",
    "kv-cache-utilization-scorer",
    "running-requests-size-scorer",
    "load-aware-scorer",
    "active-request-scorer",
    "prefix-cache-scorer",
    "precise-prefix-cache-scorer",
    "session-affinity-scorer",
    "no-hit-lru-scorer",
    "lora-affinity-scorer",
)
ALIASES = {"kv-cache-scorer": "kv-cache-utilization-scorer"}
_TOP = ("apiVersion", "kind", "plugins", "schedulingProfiles")
_TOP_LATER = ("saturationDetector", "featureGates")


class Parameters:
    """A plugin's parameters; those that the plugin does not ask for are ignored, as its JSON reader does."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise InputError("parameters are not a mapping", where=where, fix="Write names and values.")
        self._values, self._where = values, where

    def block(self, name: str) -> Parameters:
        """Parameters under a name; empty where it is absent."""
        return Parameters(self._get(name, {}), f"{self._where}.{name}")

    def whole(self, name: str, default: int) -> int:
        """A whole number; the default also in place of 0 and below, as the plugins have it."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value if value > 0 else default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "text")
        return value

    def duration_s(self, name: str, default: str) -> float:
        """A duration in Go's form ("2m", "1m30s", "500ms"), in seconds."""
        text = self.text(name, default)
        units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
        parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)", text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise self._wrong(name, text, "a duration such as 2m or 1m30s")
        return sum(float(number) * units[unit] for number, unit in parts)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{name} is not {expected}: {value!r}", f"{self._where}.{name}", "Correct it.")


@dataclass(frozen=True, slots=True)
class Plugin:
    """One of ``plugins``: its type (by today's name), its own name, its parameters."""

    type: str
    name: str
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class EppConfig:
    """What decides where a request goes.

    scorers: in the order of the profile, with their weights. picker: the profile's. filters: in order.
    """

    picker: Plugin
    scorers: tuple[tuple[Plugin, float], ...] = ()
    filters: tuple[Plugin, ...] = ()
    source: str = field(default="", compare=False)


def read_epp(path: Path, release: str) -> EppConfig:
    """Read an EndpointPickerConfig.

    Args:
        release: a key of EPP_RELEASES, whose rules decide what loads.

    Raises:
        InputError: about the first thing that the endpoint picker would refuse or that is not modelled.
    """
    return parse_epp(read_yaml(path), release, source=str(path))


def parse_epp(data: Mapping[str, Any], release: str, *, source: str) -> EppConfig:
    """The same of what a YAML file holds; ``source`` is the file in messages."""
    return _Reader(data, EPP_RELEASES[release], release, source).config()


class _Reader:
    def __init__(self, data: Mapping[str, Any], release: EppRelease, name: str, source: str) -> None:
        self.data, self.release, self.release_name, self.source = data, release, name, source

    def fail(self, what: str, at: str, fix: str) -> InputError:
        return InputError(what, where=f"{self.source}: {at}", fix=fix)

    def config(self) -> EppConfig:
        known = (*_TOP, *(_TOP_LATER if self.release.saturation_block else ()))
        self._known_fields(self.data, known, "")
        for name, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
            if self.data.get(name) != expected:
                raise self.fail(f"{name} is {self.data.get(name)!r}", name, f"Write {expected}.")
        if self.data.get("featureGates"):
            raise self.fail("feature gates are not modelled", "featureGates", "Remove them.")
        plugins = self._plugins()
        handlers = [name for name, plugin in plugins.items() if plugin.type in HANDLERS]
        if len(handlers) > 1:
            raise self.fail(
                f"there are {len(handlers)} profile handlers: {', '.join(handlers)}", "plugins", "Keep one."
            )
        if not handlers and not self.release.fills_in:
            raise self.fail("there is no profile handler", "plugins", "Add - type: single-profile-handler.")
        return self._profile(plugins)

    def _known_fields(self, data: Any, known: tuple[str, ...], at: str) -> None:
        if not isinstance(data, Mapping):
            raise self.fail("this is not a mapping of fields", at, "Correct it.")
        for key in data:
            if key not in known:
                raise self.fail(
                    f"unknown field {key!r}",
                    f"{at}.{key}" if at else str(key),
                    did_you_mean(str(key), known) or f"Known are {', '.join(known)}.",
                )

    def _list(self, data: Mapping[str, Any], name: str, at: str) -> list[Any]:
        value = data.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(f"{name} is not a list", at, "Correct it.")
        return value

    def _plugins(self) -> dict[str, Plugin]:
        plugins: dict[str, Plugin] = {}
        for number, entry in enumerate(self._list(self.data, "plugins", "plugins")):
            at = f"plugins.{number}"
            self._known_fields(entry, ("type", "name", "parameters"), at)
            kind = entry.get("type")
            if not isinstance(kind, str):
                raise self.fail("a plugin has no type", f"{at}.type", "Name the plugin's type.")
            name = entry.get("name") or kind
            if name in plugins:
                raise self.fail(f"two plugins are named {name!r}", f"{at}.name", "Give each its own name.")
            parameters = Parameters(entry.get("parameters") or {}, f"{self.source}: {at}.parameters")
            plugins[name] = Plugin(self._type(kind, parameters, at), str(name), parameters)
        if not plugins:
            raise self.fail("there are no plugins", "plugins", "Add a list of plugins.")
        return plugins

    def _type(self, kind: str, parameters: Parameters, at: str) -> str:
        """Today's name of a plugin type."""
        found = ALIASES.get(kind, kind)
        known = (*SCORERS, *PICKERS, *HANDLERS, *FILTERS)
        if found not in known:
            raise self.fail(
                f"unknown plugin {kind!r}",
                f"{at}.type",
                did_you_mean(kind, (*known, *ALIASES)) or f"Known are {', '.join(known)}.",
            )
        if found == "prefix-cache-scorer":
            mode = parameters.text("mode", "estimate")
            if mode not in ("estimate", "cache_tracking"):
                raise self.fail(
                    f"mode is {mode!r}", f"{at}.parameters.mode", "Known are estimate and cache_tracking."
                )
            return "precise-prefix-cache-scorer" if mode == "cache_tracking" else found
        return found

    def _profile(self, plugins: dict[str, Plugin]) -> EppConfig:
        profiles = self._list(self.data, "schedulingProfiles", "schedulingProfiles")
        if not profiles and self.release.fills_in:
            profiles = [{"name": "default", "plugins": [{"pluginRef": name} for name in plugins]}]
        if len(profiles) != 1:
            raise self.fail(
                f"there are {len(profiles)} scheduling profiles",
                "schedulingProfiles",
                "single-profile-handler runs exactly one.",
            )
        at = "schedulingProfiles.0"
        self._known_fields(profiles[0], ("name", "plugins"), at)
        if not isinstance(profiles[0].get("name"), str):
            raise self.fail("a profile has no name", f"{at}.name", "Name it default.")
        entries = self._list(profiles[0], "plugins", f"{at}.plugins")
        if not entries:
            raise self.fail("the profile has no plugins", f"{at}.plugins", "Refer to plugins by name.")
        filters, scorers, pickers = [], [], []
        for number, entry in enumerate(entries):
            place = f"{at}.plugins.{number}"
            self._known_fields(entry, ("pluginRef", "weight"), place)
            plugin = plugins.get(entry.get("pluginRef"))
            if plugin is None:
                raise self.fail(
                    f"there is no plugin named {entry.get('pluginRef')!r}",
                    f"{place}.pluginRef",
                    did_you_mean(str(entry.get("pluginRef")), plugins) or f"Named are {', '.join(plugins)}.",
                )
            if plugin.type in FILTERS:
                filters.append(plugin)
            elif plugin.type in PICKERS:
                pickers.append(plugin)
            elif plugin.type in SCORERS:
                scorers.append((plugin, self._weight(entry.get("weight"), plugin.name, f"{place}.weight")))
        if len(pickers) > 1:
            names = ", ".join(plugin.name for plugin in pickers)
            raise self.fail(f"there are {len(pickers)} pickers: {names}", f"{at}.plugins", "Keep one.")
        if not pickers:
            if not self.release.fills_in:
                raise self.fail("the profile has no picker", f"{at}.plugins", "Add max-score-picker.")
            pickers = [Plugin("max-score-picker", "max-score-picker", Parameters({}, self.source))]
        return EppConfig(pickers[0], tuple(scorers), tuple(filters), self.source)

    def _weight(self, weight: Any, name: str, at: str) -> float:
        if weight is None:
            if self.release.fills_in:
                return 1.0
            raise self.fail(f"scorer {name!r} has no weight", at, "Add weight: 1.")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise self.fail(f"weight is not a number: {weight!r}", at, "Write for example weight: 2.")
        if not self.release.fractional_weights and not float(weight).is_integer():
            raise self.fail(
                f"weight {weight!r} is a fraction, which endpoint picker {self.release_name} does not load",
                at,
                "Multiply all weights to whole numbers, or set epp_release to v1.4.",
            )
        return float(weight)
