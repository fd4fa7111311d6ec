"""What becomes of each parameter that a configuration writes: read, told as without effect, or refused."""

from __future__ import annotations

from collections.abc import Mapping

from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.routing.llmd.parameters import Parameters
from servecast.sim.routing.llmd.plugin import APPROXIMATE, NotModelled
from servecast.sim.routing.llmd.plugins import kinds
from servecast.sim.routing.llmd.release import EPP_RELEASES

UNKNOWN = "knows no such parameter)"  # the end of a note
_SCORER_OWN = ("prefixMatchInfoProducerName", "matchLengthWeight", "matchLengthScaleTokens")
_BLOCK_SIZES = ("hashBlockSize", "blockSize", "blockSizeTokens")


def _beneath(path: str, names: Mapping[str, str] | tuple[str, ...]) -> str:
    """The name that a dotted path is or lies under (of a mapping, its reason); empty where there is none."""
    for name in names:
        if path == name or path.startswith(f"{name}."):
            return names[name] if isinstance(names, Mapping) else name
    return ""


class ParameterCheck:
    """Checks plugins of a release.

    Args:
        notes: gets what has no effect, and why.
    """

    def __init__(self, release: str, notes: list[str]) -> None:
        self._name, self._release, self._notes = release, EPP_RELEASES[release], notes

    def check(self, plugin: str, parameters: Parameters) -> None:
        """Each is read, or told, or refused."""
        kind, release = kinds()[plugin], self._release
        for path in parameters.paths():
            if _beneath(path, kind.reads):
                if plugin == "prefix-cache-scorer" and release.producers and path not in _SCORER_OWN:
                    what = f"{path} is a parameter of {APPROXIMATE}, not of {plugin}, since v1.5"
                    raise parameters.error(what, path, f"Move it to a plugin of type {APPROXIMATE}.")
                if plugin == "prefix-cache-scorer" and self._name == "v1.5" and path not in _SCORER_OWN:
                    said = f"{plugin}.{path} (taken, although picker v1.5 reads it of {APPROXIMATE} alone)"
                    self._notes.append(said)
                if plugin in ("prefix-cache-scorer", APPROXIMATE):
                    self._index(plugin, path, parameters)
            elif why := _beneath(path, kind.refused):
                raise NotModelled(f"{path}: {why}", parameters.where(path), "Leave it out.")
            elif kind.takes_all:
                if kind.role != "idle":
                    self._notes.append(f"{plugin}.{path} (it reads no parameters)")
            elif name := _beneath(path, tuple(kind.idle)):
                self._notes.append(f"{plugin}.{name} ({kind.idle[name]})")
            elif release.strict:
                known = tuple(dict.fromkeys(name.split(".")[0] for name in (*kind.reads, *kind.idle)))
                raise parameters.error(
                    f"{plugin} has no parameter {path!r}",
                    path,
                    did_you_mean(path, known)
                    or (f"Known are {', '.join(known)}." if known else "Remove it."),
                )
            else:
                self._notes.append(f"{plugin}.{path} (picker {self._name} {UNKNOWN}")
            if path.startswith("indexerConfig.tokenProcessorConfig.blockSize") and release.processor_beside:
                self._notes.append(
                    f"{plugin}.{path} is taken as if it stood beside indexerConfig, where picker "
                    f"{self._name} looks for it"
                )

    def _index(self, plugin: str, name: str, parameters: Parameters) -> None:
        """Sizes of the approximate index that others override; its block size has had three names."""
        release, wanted = self._release, self._release.block_parameter
        tuned = release.auto_tune and parameters.flag("autoTune", True)
        looked_at = parameters.amount("maxPrefixTokensToMatch", release.prefix_tokens)
        if name in _BLOCK_SIZES and release.strict and name == "hashBlockSize":
            what = f"{APPROXIMATE} has no parameter {name!r}"
            raise parameters.error(what, name, f"Use {wanted}, in tokens.")
        why = ""
        if name in (*_BLOCK_SIZES, "lruCapacityPerServer") and tuned:
            why = "autoTune takes the servers' sizes"
        elif name == "maxPrefixBlocksToMatch" and looked_at > 0:
            why = f"maxPrefixTokensToMatch, {looked_at:,}, counts"
        elif name == "blockSize" and wanted == "blockSizeTokens":
            unit = "tokens" if release.strict else f"characters, although picker {self._name} refuses it"
            self._notes.append(f"{plugin}.{name} is deprecated and counts {unit}")
        elif name in _BLOCK_SIZES and name != wanted:
            why = f"picker {self._name} reads {wanted}"
        if why:
            self._notes.append(f"{plugin}.{name} ({why})")
