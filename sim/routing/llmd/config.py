"""llm-d's EndpointPickerConfig, read as the endpoint picker reads it: strictly, and by release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.inputs.yaml_file import parse_yaml, read_yaml
from servecast.sim.routing.llmd.parameter_check import UNKNOWN, ParameterCheck
from servecast.sim.routing.llmd.parameters import Parameters
from servecast.sim.routing.llmd.plugin import EppConfig, NotModelled, Plugin, Split
from servecast.sim.routing.llmd.plugins import ALIASES, GATES, Kind, came_before_1_4, kinds
from servecast.sim.routing.llmd.release import EPP_RELEASES, EppRelease
from servecast.sim.routing.llmd.roles import SELECTORS, roles_of
from servecast.sim.routing.llmd.splitting import splitting
from servecast.sim.routing.llmd.wiring import Wiring

GROUP, KIND = "inference.networking.x-k8s.io/v1alpha1", "EndpointPickerConfig"
_ALL = "all pass: the fleet is of those that are selected"
GROUPS_TODAY = (GROUP, "llm-d.ai/v1alpha1", "llm-d.ai/v1")


def read_document(path: Path) -> dict[str, Any]:
    """The configuration in a file: the file itself, or what llm-d's Helm values in it hold.

    Raises:
        InputError: it cannot be read.
    """
    data = read_yaml(path)
    router = data.get("router")
    for chart in (data.get("inferenceExtension"), router.get("epp") if isinstance(router, dict) else None):
        texts = chart.get("pluginsCustomConfig") if isinstance(chart, dict) else None
        if isinstance(chart, dict) and isinstance(texts, dict) and texts:
            name = chart.get("pluginsConfigFile")
            name = name if isinstance(name, str) and name in texts else next(iter(texts))
            return parse_yaml(str(texts[name]), source=f"{path}: {name}")
    return data


def read_epp(path: Path, release: str) -> EppConfig:
    """Read an EndpointPickerConfig.

    Args:
        release: a key of EPP_RELEASES, whose rules decide what loads.

    Raises:
        InputError: about the first thing that the endpoint picker would refuse or that is not modelled.
    """
    return parse_epp(read_document(path), release, source=str(path))


def parse_epp(data: Mapping[str, Any], release: str, *, source: str) -> EppConfig:
    """The same of what a YAML file holds; ``source`` is the file in messages."""
    try:
        return _Reader(data, release, source).config()
    except InputError as error:
        found = error
    takes: tuple[int, str] | None = None  # how much of it has no effect, and the release
    for other in reversed(EPP_RELEASES):
        try:
            notes = _Reader(data, other, source).config().notes
        except NotModelled as error:  # whatever the release, this stands in the way
            found = found if isinstance(found, NotModelled) else error
        except InputError:
            continue
        else:
            if not any(note.endswith(UNKNOWN) for note in notes):
                takes = min(takes or (len(notes), other), (len(notes), other), key=lambda each: each[0])
    if takes is not None:
        fix = f"{found.fix} epp_release {takes[1]} takes it as written."
        raise type(found)(found.what, where=found.where, fix=fix)
    raise found


class _Reader:
    def __init__(self, data: Mapping[str, Any], release: str, source: str) -> None:
        self.data, self.source = data, source
        self.release: EppRelease = EPP_RELEASES[release]
        self.release_name = release
        self.notes: list[str] = []
        self.checks = ParameterCheck(release, self.notes)

    def fail(self, what: str, at: str, fix: str) -> InputError:
        return InputError(what, where=f"{self.source}: {at}", fix=fix)

    def not_modelled(self, what: str, at: str, fix: str) -> NotModelled:
        return NotModelled(what, where=f"{self.source}: {at}", fix=fix)

    def refused(self, kind: str, why: Kind, at: str) -> NotModelled:
        return self.not_modelled(
            f"plugin {kind!r}: {why.why}", at, "Leave it out to see the rest without it."
        )

    def config(self) -> EppConfig:
        self._known_fields(self.data, self.release.fields, "")
        groups = GROUPS_TODAY if self.release.today else (GROUP,)
        for name, expected in (("apiVersion", groups), ("kind", (KIND,))):
            if self.data.get(name) not in expected:
                raise self.fail(f"{name} is {self.data.get(name)!r}", name, f"Write {expected[0]}.")
        if self.release.today and not self.release.strict and self.data["apiVersion"] != GROUP:
            self.notes.append(f"apiVersion (picker {self.release_name} itself knows {GROUP} alone)")
        self._gates()
        plugins = self._plugins()
        self._data_layer(plugins)
        handlers = [name for name, plugin in plugins.items() if kinds()[plugin.type].role == "handler"]
        if len(handlers) > 1:
            what = f"there are {len(handlers)} profile handlers: {', '.join(handlers)}"
            raise self.fail(what, "plugins", "Keep one.")
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

    def _gates(self) -> None:
        for number, gate in enumerate(self._list(self.data, "featureGates", "featureGates")):
            name, _, value = str(gate).partition("=")
            at = f"featureGates.{number}"
            if name not in GATES:
                what = f"there is no feature gate {name!r}"
                raise self.fail(what, at, did_you_mean(name, GATES) or f"Known are {', '.join(GATES)}.")
            why = GATES[name]
            if why is None and value != "false":
                what = "flow control is not modelled: it holds requests in the picker while the fleet is full"
                raise self.not_modelled(what, at, "Remove the gate to see where requests go without it.")
            self.notes.append(f"feature gate {name} ({why or 'it is off'})")

    def _plugins(self) -> dict[str, Plugin]:
        plugins: dict[str, Plugin] = {}
        for number, entry in enumerate(self._list(self.data, "plugins", "plugins")):
            at = f"plugins.{number}"
            self._known_fields(entry, ("type", "name", "parameters"), at)
            kind = entry.get("type")
            if not isinstance(kind, str):
                raise self.fail("a plugin has no type", f"{at}.type", "Name the plugin's type.")
            name = entry.get("name") or kind
            if not isinstance(name, str):
                raise self.fail(f"name is not text: {name!r}", f"{at}.name", "Correct it.")
            if name in plugins:
                raise self.fail(f"two plugins are named {name!r}", f"{at}.name", "Give each its own name.")
            parameters = Parameters(entry.get("parameters") or {}, f"{self.source}: {at}.parameters")
            plugins[name] = Plugin(self._type(kind, parameters, at), name, parameters)
        if not plugins:
            raise self.fail("there are no plugins", "plugins", "Add a list of plugins.")
        return plugins

    def _type(self, kind: str, parameters: Parameters, at: str) -> str:
        """Today's name of a plugin type."""
        found = ALIASES.get(kind, kind)
        if found not in kinds() or not (self.release.today or came_before_1_4(found)):
            near = did_you_mean(kind, (*kinds(), *ALIASES)) or "Plugins of your own are not modelled."
            late = f"Endpoint picker {self.release_name} has none of this type."
            raise self.fail(f"unknown plugin {kind!r}", f"{at}.type", near if found not in kinds() else late)
        if kind in ALIASES and self.release_name != "v0.5":
            self.notes.append(f"{kind} (today's {found})")
        if kinds()[found].role == "refused":
            if not kinds()[found].in_profile:
                raise self.refused(kind, kinds()[found], f"{at}.type")
            return found
        if found == "prefix-cache-scorer":
            mode = parameters.text("mode", "estimate")
            if mode not in ("estimate", "cache_tracking"):
                what = f"mode is {mode!r}"
                raise self.fail(what, f"{at}.parameters.mode", "Known are estimate and cache_tracking.")
            if mode == "cache_tracking":
                found = "precise-prefix-cache-scorer"
        if kinds()[found].role == "idle":
            self.notes.append(f"{kind} ({kinds()[found].why})")
        self.checks.check(found, parameters)
        return found

    def _data_layer(self, plugins: dict[str, Plugin]) -> None:
        """dataLayer, flowControl, parsers: that they name plugins, and what of them has no effect."""
        for name in ("dataLayer", "data"):
            layer = self.data.get(name)
            if layer is None:
                continue
            fields = (
                "sources", "injectDefaults", "discovery", "peerDiscovery",
                "crossReplicaSyncerPluginRef", "crossReplicaSyncInterval",
            )  # fmt: skip
            self._known_fields(layer, fields, name)
            types = set()
            for number, source in enumerate(self._list(layer, "sources", f"{name}.sources")):
                at = f"{name}.sources.{number}"
                self._known_fields(source, ("pluginRef", "extractors"), at)
                types.add(self._named(source.get("pluginRef"), plugins, f"{at}.pluginRef").type)
                for each, extractor in enumerate(self._list(source, "extractors", at)):
                    place = f"{at}.extractors.{each}"
                    self._known_fields(extractor, ("pluginRef",), place)
                    self._named(extractor.get("pluginRef"), plugins, f"{place}.pluginRef")
            if layer.get("injectDefaults") is False and "metrics-data-source" not in types:
                what = "a picker without metrics is not modelled"
                fix = "Add metrics-data-source to the sources, or remove injectDefaults."
                raise self.not_modelled(what, f"{name}.injectDefaults", fix)
            self.notes.append(f"{name} (gauges and events come as router_options say)")
        if "flowControl" in self.data or "saturationDetector" in self.data:
            self.notes.append("flowControl, saturationDetector (without the gate only requests of negative "
                              "priority are shed)")  # fmt: skip

    def _named(self, name: Any, plugins: Mapping[str, Plugin], at: str) -> Plugin:
        plugin = plugins.get(name) if isinstance(name, str) else None
        if plugin is None:
            what = f"there is no plugin named {name!r}"
            raise self.fail(what, at, did_you_mean(str(name), plugins) or f"Named are {', '.join(plugins)}.")
        return plugin

    def _profile(self, plugins: dict[str, Plugin]) -> EppConfig:
        profiles = self._list(self.data, "schedulingProfiles", "schedulingProfiles")
        if not profiles and self.release.fills_in:
            profiles = [{"name": "default", "plugins": [{"pluginRef": name} for name in plugins]}]
        parts, names = Wiring(self.release, plugins, self.source), list[str]()
        for number, profile in enumerate(profiles):
            at = f"schedulingProfiles.{number}"
            self._known_fields(profile, ("name", "plugins"), at)
            if not isinstance(profile.get("name"), str) or profile["name"] in names:
                raise self.fail("a profile has no name of its own", f"{at}.name", "Name it.")
            names.append(profile["name"])
        splits = splitting(plugins, self.release.today)
        if splits is None and len(profiles) != 1:
            what = f"there are {len(profiles)} scheduling profiles"
            raise self.fail(what, "schedulingProfiles", "single-profile-handler runs exactly one.")
        decode = "default" if splits is None else splits.decode
        if splits is not None and decode not in names:
            raise self.fail(f"there is no profile {decode!r}", "schedulingProfiles", "Add it.")
        place = 0 if splits is None else names.index(decode)
        config = self._of_profile(profiles[place], f"schedulingProfiles.{place}", plugins, parts)
        if splits is None:
            return replace(config, producers=parts.producers(), notes=tuple(dict.fromkeys(self.notes)))
        split = None
        if splits.decider is not None:
            parts.asked_by_decider()
        if splits.prefill in names and (splits.decider is not None or splits.prefill_first):
            place = names.index(splits.prefill)
            prefill = self._of_profile(profiles[place], f"schedulingProfiles.{place}", plugins, parts)
            split = Split(prefill, splits.decider, splits.prefill_first)
        for name in names:
            if name != decode and (split is None or name != splits.prefill):
                self.notes.append(f"profile {name} (the handler never runs it here)")
        notes = tuple(dict.fromkeys(self.notes))
        return replace(config, producers=parts.producers(), notes=notes, split=split)

    def _of_profile(
        self, profile: Mapping[str, Any], at: str, plugins: dict[str, Plugin], parts: Wiring
    ) -> EppConfig:
        """One profile, without its producers and notes."""
        entries = self._list(profile, "plugins", f"{at}.plugins")
        if not entries:
            raise self.fail("the profile has no plugins", f"{at}.plugins", "Refer to plugins by name.")
        filters, scorers, pickers = [], [], []
        for number, entry in enumerate(entries):
            place = f"{at}.plugins.{number}"
            self._known_fields(entry, ("pluginRef", "weight"), place)
            plugin = self._named(entry.get("pluginRef"), plugins, f"{place}.pluginRef")
            role = kinds()[plugin.type].role
            if role == "refused":
                raise self.refused(plugin.type, kinds()[plugin.type], f"{place}.pluginRef")
            if role == "filter":
                filters.append(parts.asking(plugin))
                if plugin.type in SELECTORS and roles_of(plugin) is None:
                    said = dict.fromkeys(path.split(".")[0] for path in plugin.parameters.paths())
                    self.notes += [f"{plugin.type}.{path} ({_ALL})" for path in said]
            elif role == "picker":
                pickers.append(plugin)
            elif role == "scorer":
                weight = self._weight(entry.get("weight"), plugin.name, f"{place}.weight")
                scorers.append((parts.asking(plugin), weight))
        if len(pickers) > 1:
            names = ", ".join(plugin.name for plugin in pickers)
            raise self.fail(f"there are {len(pickers)} pickers: {names}", f"{at}.plugins", "Keep one.")
        if not pickers:
            if not self.release.fills_in:
                raise self.fail("the profile has no picker", f"{at}.plugins", "Add max-score-picker.")
            declared = [plugin for plugin in plugins.values() if kinds()[plugin.type].role == "picker"]
            default = Plugin("max-score-picker", "max-score-picker", Parameters({}, self.source))
            pickers = [*declared, default][:1]
        self._sees_prompts(plugins, [*filters, *(scorer for scorer, _weight in scorers)])
        exact = any(_tokenizes(plugin) for plugin in plugins.values())
        return EppConfig(pickers[0], tuple(scorers), tuple(filters), (), exact, self.source)

    def _sees_prompts(self, plugins: Mapping[str, Plugin], asking: list[Plugin]) -> None:
        handler, types = self.data.get("requestHandler") or {}, set()
        self._known_fields(handler, ("parsers",), "requestHandler")
        for number, each in enumerate(self._list(handler, "parsers", "requestHandler.parsers")):
            self._known_fields(each, ("pluginRef",), f"requestHandler.parsers.{number}")
            name = str(each.get("pluginRef"))
            types.add(plugins[name].type if name in plugins else name)
        if types == {"passthrough-parser"} and any(each.prefixes for each in asking):
            what = "a picker that does not see the prompts, but scores them, is not modelled"
            fix = "Add openai-parser, or leave out what looks at prompts."
            raise self.not_modelled(what, "requestHandler.parsers", fix)

    def _weight(self, weight: Any, name: str, at: str) -> float:
        if weight is None:
            if self.release.fills_in:
                return 1.0
            raise self.fail(f"scorer {name!r} has no weight", at, "Add weight: 1.")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise self.fail(f"weight is not a number: {weight!r}", at, "Write for example weight: 2.")
        if not self.release.fractional_weights and not float(weight).is_integer():
            what = f"weight {weight!r} is a fraction, which endpoint picker {self.release_name} does not load"
            raise self.fail(what, at, "Multiply all weights to whole numbers.")
        return float(weight)


def _tokenizes(plugin: Plugin) -> bool:
    exact = ("modelName", "vllm", "udsTokenizerConfig")
    return plugin.type in ("token-producer", "tokenizer") and any(
        path.split(".")[0] in exact for path in plugin.parameters.paths()
    )
