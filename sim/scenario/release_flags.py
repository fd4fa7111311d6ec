"""The flags of ``vllm serve`` by release, and how its parser reads one word of a command.

vllm_flags.json has them as tools/flag_table.py reads them off each release's own parser.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.scenario.pasted_command import WHERE

_BOTH_WAYS_SINCE = "0.33"  # --disable-... beside --enable-...


@dataclass(frozen=True, slots=True)
class _Known:
    """What each flag takes ("switch", "value", "values", "optional"), the releases that have it (positions of
    the first and the last), and the long form of short ones."""

    releases: tuple[str, ...]
    takes: dict[str, str]
    span: dict[str, tuple[int, int]]
    short: dict[str, str]

    def of(self, release: str | None) -> dict[str, str]:
        """What each flag of a release takes; all flags where the release is not one of the table's."""
        if release not in self.releases:
            return self.takes
        position = self.releases.index(release)
        return {
            flag: kind
            for flag, kind in self.takes.items()
            if self.span[flag][0] <= position <= self.span[flag][1]
        }


@functools.cache
def _known() -> _Known:
    text = resources.files("servecast.sim.scenario").joinpath("vllm_flags.json").read_text(encoding="utf-8")
    data = json.loads(text)
    releases = tuple(data["releases"])
    takes, span = {}, {}
    for kind in ("switch", "value", "values", "optional"):
        for entry in data[kind]:
            flag, _, having = entry.replace("-", "_", entry.partition(" ")[0].count("-")).partition(" ")
            first, _, last = having.partition("-")
            takes[flag] = kind
            span[flag] = (releases.index(first or releases[0]), releases.index(last or releases[-1]))
    short = {short: flag.replace("-", "_") for short, flag in data["short"].items()}
    return _Known(releases, takes, span, short)


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag's name, what it takes, the value that the word itself holds ("no" for --no-...), and the keys
    after a dot."""

    name: str
    takes: str
    value: str | None
    key: str = ""


def read_flag(word: str, version: str | None) -> Flag:
    """The flag that a word of a command is in a version of vLLM; in any where it is not in the table.

    Raises:
        InputError: the release has no such flag, or it can mean several.
    """
    known = _known()
    release = ".".join((version or "").removeprefix("v").split(".")[:2])
    takes = known.of(release)
    head, equals, held = word.partition("=")
    value = held if equals else None
    head, _, key = head.partition(".")
    if not head.startswith("--"):
        if head.startswith("-O"):
            kind = "value" if word == "-O" or key else "switch"
            return Flag("optimization_level", kind, value or head[2:], key)
        name = known.short.get(head[1:], "")
    else:
        name = head[2:].replace("-", "_")
    if name == "device_memory_utilization":
        name = "gpu_memory_utilization"
    if name not in takes and name not in known.takes:
        name = _completed(name, takes, head)
    newest = known.releases[known.releases.index(_BOTH_WAYS_SINCE) :]
    both_ways = release not in known.releases or release in newest
    name, positive = _positive(name, takes, both_ways=both_ways)
    if name in takes:
        if takes[name] == "switch" and equals and not key:
            raise InputError(f"{head} takes no value", where=WHERE, fix=f"Write {head} or --no-{head[2:]}.")
        return Flag(name, "value" if key else takes[name], value if positive else "no", key)
    if name in known.takes:
        first, last = (known.releases[position] for position in known.span[name])
        fix = f"Remove it, or use version {first}{'' if first == last else f' to {last}'}."
        raise InputError(f"vLLM {version} has no {head}", where=WHERE, fix=fix)
    flags = [f"--{flag.replace('_', '-')}" for flag in takes]
    fix = did_you_mean(head.replace("_", "-"), flags) or "Remove it."
    raise InputError(f"vllm serve has no flag {head}", where=WHERE, fix=fix)


def _positive(name: str, takes: dict[str, str], *, both_ways: bool) -> tuple[str, bool]:
    """The switch that a name turns on, or off: --no-..., and ``both_ways`` --disable-... for --enable-..."""
    if name in takes:
        return name, True
    opposites = {"no": ""} | ({"disable": "enable_", "enable": "disable_"} if both_ways else {})
    start, _, rest = name.partition("_")
    switch = opposites.get(start, start) + rest
    return (switch, False) if takes.get(switch) == "switch" else (name, True)


def _completed(name: str, takes: dict[str, str], head: str) -> str:
    """The one flag that begins so, as argparse completes it; the name itself where there is none."""
    switches = [flag for flag, kind in takes.items() if kind == "switch"]
    names = [
        flag for flag in [*takes, *(f"no_{flag}" for flag in switches)] if name and flag.startswith(name)
    ]
    if len(names) > 1:
        shown = ", ".join(f"--{flag.replace('_', '-')}" for flag in names[:4])
        raise InputError(f"{head} can mean {shown}", where=WHERE, fix="Write the flag out.")
    return names[0] if names else name
