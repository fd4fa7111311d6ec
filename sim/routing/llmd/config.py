"""llm-d's EndpointPickerConfig, read as the endpoint picker reads it: strictly, and by release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.inputs.yaml_file import parse_yaml, read_yaml
from servecast.sim.routing.llmd.parameters import Parameters
from servecast.sim.routing.llmd.plugins import ALIASES, BEFORE_1_4, GATES, KINDS, Kind
from servecast.sim.routing.llmd.release import EPP_RELEASES, EppRelease

GROUP, KIND = "inference.networking.x-k8s.io/v1alpha1", "EndpointPickerConfig"
GROUPS_TODAY = (GROUP, "llm-d.ai/v1alpha1", "llm-d.ai/v1")
APPROXIMATE, PRECISE = "approx-prefix-cache-producer", "precise-prefix-cache-producer"
IN_FLIGHT = "inflight-load-producer"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One of ``plugins``: its type (by today's name), its own name, its parameters.

    prefixes, load: names of the producers that tell it of cached prefixes and of requests in flight, empty
    where it asks for none.
    """

    type: str
    name: str
    parameters: Parameters
    prefixes: str = ""
    load: str = ""


@dataclass(frozen=True, slots=True)
class EppConfig:
    """What decides where a request goes.

    scorers: in the order of the profile, with their weights. picker: the profile's. filters: in order.
    producers: what scorers and filters ask, those that are theirs alone included. exact_tokens: prompts are
    tokenized as the servers do, not estimated from their length. notes: what has no effect here, and why.
    """

    picker: Plugin
    scorers: tuple[tuple[Plugin, float], ...] = ()
    filters: tuple[Plugin, ...] = ()
    producers: tuple[Plugin, ...] = ()
    exact_tokens: bool = False
    source: str = field(default="", compare=False)
    notes: tuple[str, ...] = ()


class NotModelled(InputError):
    """The picker takes it, the model does not."""


def read_document(path: Path) -> dict[str, Any]:
    """The configuration in a file: the file itself, or what llm-d's Helm values in it hold.

    Raises:
        InputError: it cannot be read.
    """
    data = read_yaml(path)
    for chart in (data.get("inferenceExtension"), (data.get("router") or {}).get("epp")):
        texts = chart.get("pluginsCustomConfig") if isinstance(chart, dict) else None
        if isinstance(texts, dict) and texts:
            name = chart.get("pluginsConfigFile")
            name = name if name in texts else next(iter(texts))
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
    for other in reversed(EPP_RELEASES):
        try:
            _Reader(data, other, source).config()
        except NotModelled as error:  # whatever the release, this stands in the way
            found = found if isinstance(found, NotModelled) else error
        except InputError:
            continue
        else:
            fix = f"{found.fix} epp_release {other} takes it as written."
            raise type(found)(found.what, where=found.where, fix=fix) from None
    raise found


class _Reader:
    def __init__(self, data: Mapping[str, Any], release: str, source: str) -> None:
        self.data, self.source = data, source
        self.release: EppRelease = EPP_RELEASES[release]
        self.release_name = release
        self.notes: list[str] = []

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
        handlers = [name for name, plugin in plugins.items() if KINDS[plugin.type].role == "handler"]
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

    def _gates(self) -> None:
        for number, gate in enumerate(self._list(self.data, "featureGates", "featureGates")):
            name, _, value = str(gate).partition("=")
            at = f"featureGates.{number}"
            if name not in GATES:
                raise self.fail(
                    f"there is no feature gate {name!r}",
                    at,
                    did_you_mean(name, GATES) or f"Known are {', '.join(GATES)}.",
                )
            why = GATES[name]
            if why is None and value != "false":
                raise self.not_modelled(
                    "flow control is not modelled: it holds requests in the picker while the fleet is full",
                    at,
                    "Remove the gate to see where requests go without it.",
                )
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
        if found not in KINDS or not (self.release.today or found in BEFORE_1_4):
            near = did_you_mean(kind, (*KINDS, *ALIASES)) or "Plugins of your own are not modelled."
            late = f"Endpoint picker {self.release_name} has none of this type."
            raise self.fail(f"unknown plugin {kind!r}", f"{at}.type", near if found not in KINDS else late)
        if kind in ALIASES and self.release_name != "v0.5":
            self.notes.append(f"{kind} (today's {found})")
        if KINDS[found].role == "refused":
            if not KINDS[found].in_profile:
                raise self.refused(kind, KINDS[found], f"{at}.type")
            return found
        if found == "prefix-cache-scorer":
            mode = parameters.text("mode", "estimate")
            if mode not in ("estimate", "cache_tracking"):
                raise self.fail(
                    f"mode is {mode!r}", f"{at}.parameters.mode", "Known are estimate and cache_tracking."
                )
            if mode == "cache_tracking":
                found = "precise-prefix-cache-scorer"
        if KINDS[found].role == "idle":
            self.notes.append(f"{kind} ({KINDS[found].why})")
        self._parameters(found, KINDS[found], parameters)
        return found

    def _parameters(self, plugin: str, kind: Kind, parameters: Parameters) -> None:
        """Each is read, or told, or refused."""
        release = self.release
        for path in parameters.paths():
            if _beneath(path, kind.reads):
                if plugin == "prefix-cache-scorer" and release.producers and path not in _SCORER_OWN:
                    raise parameters.error(
                        f"{path} is a parameter of {APPROXIMATE}, not of {plugin}, since router-v0.9",
                        path,
                        f"Move it to a plugin of type {APPROXIMATE}.",
                    )
                if path == "maxPrefixBlocksToMatch" and release.prefix_tokens:
                    if parameters.amount("maxPrefixTokensToMatch", release.prefix_tokens) > 0:
                        self.notes.append(
                            f"{plugin}.{path} (maxPrefixTokensToMatch, 131072 by default, counts)"
                        )
                if path in _BLOCK_SIZES and plugin in ("prefix-cache-scorer", APPROXIMATE):
                    self._block_size(path, parameters)
            elif why := _beneath(path, kind.refused):
                raise NotModelled(f"{path}: {why}", parameters.where(path), "Leave it out.")
            elif kind.takes_all:
                if kind.role != "idle":
                    self.notes.append(f"{plugin}.{path} (it reads no parameters)")
            elif name := _beneath(path, tuple(kind.idle)):
                self.notes.append(f"{plugin}.{name} ({kind.idle[name]})")
            elif release.strict:
                known = tuple(dict.fromkeys(name.split(".")[0] for name in (*kind.reads, *kind.idle)))
                raise parameters.error(
                    f"{plugin} has no parameter {path!r}",
                    path,
                    did_you_mean(path, known)
                    or (f"Known are {', '.join(known)}." if known else "Remove it."),
                )
            else:
                self.notes.append(f"{plugin}.{path} (picker {self.release_name} knows no such parameter)")
            if path.startswith("indexerConfig.tokenProcessorConfig.blockSize") and release.processor_beside:
                self.notes.append(
                    f"{plugin}.{path} is taken as if it stood beside indexerConfig, where picker "
                    f"{self.release_name} looks for it"
                )

    def _block_size(self, name: str, parameters: Parameters) -> None:
        """The block size of the approximate index has had three names."""
        wanted = self.release.block_parameter
        if name == wanted:
            return
        if self.release.strict and name == "hashBlockSize":
            raise parameters.error(
                f"{APPROXIMATE} has no parameter {name!r}", name, f"Use {wanted}, in tokens."
            )
        if wanted == "blockSizeTokens" and name == "blockSize":
            unit = "tokens" if self.release.strict else "characters, although this release refuses it alone"
            self.notes.append(f"blockSize is deprecated; it counts as {unit}")
            return
        self.notes.append(f"{name} (picker {self.release_name} reads {wanted})")

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
                    self._named(extractor.get("pluginRef"), plugins, f"{at}.extractors.{each}.pluginRef")
            if layer.get("injectDefaults") is False and "metrics-data-source" not in types:
                raise self.not_modelled(
                    "a picker without metrics is not modelled",
                    f"{name}.injectDefaults",
                    "Add metrics-data-source to the sources, or remove injectDefaults.",
                )
            self.notes.append(f"{name} (gauges and events come as router_options say)")
        if "flowControl" in self.data or "saturationDetector" in self.data:
            self.notes.append("flowControl, saturationDetector (without the gate only requests of negative "
                              "priority are shed)")  # fmt: skip

    def _named(self, name: Any, plugins: Mapping[str, Plugin], at: str) -> Plugin:
        plugin = plugins.get(name)
        if plugin is None:
            raise self.fail(
                f"there is no plugin named {name!r}",
                at,
                did_you_mean(str(name), plugins) or f"Named are {', '.join(plugins)}.",
            )
        return plugin

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
        parts = _Parts(self, plugins)
        filters, scorers, pickers = [], [], []
        for number, entry in enumerate(entries):
            place = f"{at}.plugins.{number}"
            self._known_fields(entry, ("pluginRef", "weight"), place)
            plugin = self._named(entry.get("pluginRef"), plugins, f"{place}.pluginRef")
            role = KINDS[plugin.type].role
            if role == "refused":
                raise self.refused(plugin.type, KINDS[plugin.type], f"{place}.pluginRef")
            if role == "filter":
                filters.append(parts.asking(plugin))
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
            declared = [plugin for plugin in plugins.values() if KINDS[plugin.type].role == "picker"]
            default = Plugin("max-score-picker", "max-score-picker", Parameters({}, self.source))
            pickers = [*declared, default][:1]
        self._sees_prompts(plugins, [*filters, *(scorer for scorer, _weight in scorers)])
        return EppConfig(
            pickers[0],
            tuple(scorers),
            tuple(filters),
            parts.producers(),
            any(_tokenizes(plugin) for plugin in plugins.values()),
            self.source,
            tuple(dict.fromkeys(self.notes)),
        )

    def _sees_prompts(self, plugins: Mapping[str, Plugin], asking: list[Plugin]) -> None:
        handler = self.data.get("requestHandler") or {}
        parsers = {each.get("pluginRef") for each in self._list(handler, "parsers", "requestHandler.parsers")}
        types = {plugins[name].type if name in plugins else name for name in parsers}
        if types == {"passthrough-parser"} and any(each.prefixes for each in asking):
            raise self.not_modelled(
                "a picker that does not see the prompts, but scores them, is not modelled",
                "requestHandler.parsers",
                "Add openai-parser, or leave out what looks at prompts.",
            )

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
                "Multiply all weights to whole numbers.",
            )
        return float(weight)


class _Parts:
    """Which producers scorers and filters ask; those that nobody listed are made with their defaults."""

    def __init__(self, reader: _Reader, plugins: Mapping[str, Plugin]) -> None:
        self._reader, self._plugins = reader, plugins
        self._made: dict[str, Plugin] = {}

    def asking(self, plugin: Plugin) -> Plugin:
        """The plugin with the names of its producers."""
        kind, apart = plugin.type, self._reader.release.producers
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

    def _with_load(self, plugin: Plugin) -> Plugin:
        kinds = ("token-load-scorer", "prefix-cache-affinity-filter", "utilization-filter")
        if plugin.type in kinds or (
            plugin.type == "active-request-scorer" and self._reader.release.producers
        ):
            named = plugin.parameters.text("inFlightLoadProducerName", IN_FLIGHT)
            return replace(plugin, load=self._producer(named, IN_FLIGHT, plugin))
        return plugin

    def _producer(self, name: str, default: str, plugin: Plugin) -> str:
        listed = self._plugins.get(name)
        if listed is not None and listed.type == "precise-prefix-cache-scorer":
            self._made[name] = replace(listed, type=PRECISE)
        elif listed is not None and KINDS[listed.type].role == "producer":
            self._made[name] = listed
        elif name == default:
            self._made[name] = Plugin(name, name, Parameters({}, self._reader.source))
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


_SCORER_OWN = ("prefixMatchInfoProducerName", "matchLengthWeight", "matchLengthScaleTokens")
_BLOCK_SIZES = ("hashBlockSize", "blockSize", "blockSizeTokens")


def _beneath(path: str, names: Mapping[str, str] | tuple[str, ...]) -> str:
    """The name that a dotted path is or lies under (its reason, of a mapping); nothing where there is none."""
    for name in names:
        if path == name or path.startswith(f"{name}."):
            return names[name] if isinstance(names, Mapping) else name
    return ""


def _tokenizes(plugin: Plugin) -> bool:
    exact = ("modelName", "vllm", "udsTokenizerConfig")
    return plugin.type in ("token-producer", "tokenizer") and any(
        path.split(".")[0] in exact for path in plugin.parameters.paths()
    )
