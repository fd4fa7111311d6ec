"""How llm-d's handlers of prefill and decode are set: in three forms, by age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from servecast.sim.routing.llmd.plugin import Plugin
from servecast.sim.routing.llmd.plugins import kinds

_ORDERS = {"": False, "decodefirst": False, "decode": False, "prefillfirst": True, "prefill": True}
_NESTED = ("profiles", "deciders")


@dataclass(frozen=True, slots=True)
class Splitting:
    """Names of the two profiles. decider: None where prompts never go to a server of their own, or, with
    ``prefill_first``, all do."""

    decode: str
    prefill: str
    decider: Plugin | None
    prefill_first: bool = False


def splitting(plugins: Mapping[str, Plugin], today: bool) -> Splitting | None:
    """What a handler of two profiles is set to; None without one.

    Args:
        plugins: by name. today: a release in which deciders are plugins, and the handler has no threshold.

    Raises:
        InputError: the picker would refuse it.
    """
    handler = next((each for each in plugins.values() if kinds()[each.type].role == "handler"), None)
    if handler is None or handler.type not in ("pd-profile-handler", "disagg-profile-handler"):
        return None
    given = handler.parameters
    nested = [name for name in _NESTED if any(path.split(".")[0] == name for path in given.paths())]
    flat = [path for path in given.paths() if path.split(".")[0] not in (*_NESTED, "stageOrder")]
    if nested and flat:
        what = f"{nested[0]} and the older {flat[0]} in one handler"
        raise given.error(what, flat[0], "Write all of it the newer way.")
    profiles, deciders = given.block("profiles"), given.block("deciders")
    decode = profiles.text("decode", "") or given.text("decodeProfile", "decode")
    prefill = profiles.text("prefill", "") or given.text("prefillProfile", "prefill")
    if handler.type == "pd-profile-handler":
        if not today:
            return Splitting(decode, prefill, handler)
        name, at = given.text("deciderPluginName", "prefix-based-pd-decider"), "deciderPluginName"
    else:
        names = {
            "deciders.prefill": deciders.text("prefill", ""),
            "prefillDeciderPluginName": given.text("prefillDeciderPluginName", ""),
            "deciderPluginName": given.text("deciderPluginName", ""),
        }
        at = next((path for path, value in names.items() if value), "deciders.prefill")
        name = names[at]
    asked = given.text("stageOrder", "").lower().replace("-", "").replace("_", "")
    if asked not in _ORDERS:
        what = f"stageOrder is {given.text('stageOrder', '')!r}"
        raise given.error(what, "stageOrder", "Known are decode-first and prefill-first.")
    if not name:
        return Splitting(decode, prefill, None, _ORDERS[asked])
    if _ORDERS[asked]:
        raise given.error("prefill-first takes no prefill decider", at, "Leave one of them out.")
    decider = plugins.get(name)
    if decider is None or kinds()[decider.type].role != "decider":
        raise given.error(f"there is no decider named {name!r}", at, "Add prefix-based-pd-decider.")
    return Splitting(decode, prefill, decider)
