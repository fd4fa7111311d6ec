"""Results that are kept in files named after what they depend on, so that long work can be taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from servecast.sim.scenario.scenario import Scenario

Document = dict[str, Any]


def fingerprint(what: Document, scenario: Scenario | None) -> str:
    """A hash of what a result depends on: version, scenario with its files' content, what was done with it.

    scenario: None if there is none, since its changes cannot be applied.
    """
    content: Document = {"servecast_version": version("servecast"), **what}
    if scenario is not None:
        files = {scenario.config_file(), scenario.profile_file(), *_paths(scenario.model_dump())} - {None}
        files |= {scenario.of_replica(spec).profile_file() for spec in scenario.fleet.specs} - {None}
        hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file is not None)
        content |= {"scenario": scenario.model_dump(mode="json"), "files": hashes}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)


def kept(path: Path) -> Document | None:
    """A result, if it is there, whole, and no failure."""
    if not path.is_file():
        return None
    try:
        document: Document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut off: it is computed again
        return None
    return None if "error" in document else document
