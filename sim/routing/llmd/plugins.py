"""The types of llm-d's plugins and what becomes of their parameters, as plugins.yaml lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Literal

from servecast.sim.inputs.yaml_file import parse_yaml

Role = Literal["handler", "decider", "filter", "scorer", "picker", "producer", "idle", "refused"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of plugin.

    Attributes:
        role: what it is in the model; ``idle`` changes nothing in where requests go, ``refused`` is not
            modelled.
        why: of an idle or refused one.
        reads, idle, refused: parameters, the latter two with why they have no effect or are not modelled.
        takes_all: it reads none of its parameters, whatever they are.
        in_profile: it matters only where a profile names it.
    """

    role: Role
    why: str = ""
    reads: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    takes_all: bool = False
    in_profile: bool = False


_SCHEDULES = re.compile(r"-(filter|scorer)$|^context-length-aware$")


@cache
def kinds() -> Mapping[str, Kind]:
    """By name."""
    file = resources.files("servecast.sim.routing.llmd") / "plugins.yaml"
    data = parse_yaml(file.read_text("utf-8"), source="plugins.yaml")
    found = {
        name: Kind(**each | {"reads": tuple(each.get("reads", ()))}) for name, each in data["kinds"].items()
    }
    for why, names in data["idle"].items():
        found |= {name: Kind("idle", why, takes_all=True) for name in names}
    for why, names in data["refused"].items():
        found |= {
            name: Kind("refused", why, in_profile=_SCHEDULES.search(name) is not None) for name in names
        }
    return found


_WITH_1_4 = ("token-load-scorer", "disagg-profile-handler")
_BEFORE_1_4 = (
    *("by-label", "by-label-selector", "decode-filter", "prefill-filter", "prefill-header-handler"),
    *("metrics-data-source", "model-server-protocol-metrics"),
)


def came_before_1_4(name: str) -> bool:
    """Whether a type of plugin is older than release v1.4."""
    old = kinds()[name].role in ("handler", "picker", "scorer", "refused")
    return name in _BEFORE_1_4 or (old and name not in _WITH_1_4)


ALIASES = {"kv-cache-scorer": "kv-cache-utilization-scorer"}
GATES = {  # feature gate -> why it has no effect, None where it is not modelled
    "dataLayer": "gauges are scraped as router_options say",
    "prepareDataPlugins": "prompts are hashed at no cost in time",
    "enableLegacyMetrics": "metrics are not exported",
    "haPopulateNonLeaderDatastore": "there is one picker",
    "flowControl": None,
}
