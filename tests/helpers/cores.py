"""The engine's modules interpreted, where they run compiled."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import servecast.sim.engine

FOLDER = Path(str(servecast.sim.engine.__file__)).parent
# what a scheduler is made of, in the order of import
MODULES = (
    "rules",
    "draft_rules",
    "cadence",
    "sequence",
    "drafts",
    "waiting",
    "step",
    "block_pool",
    "kv_cache",
    "group_cache",
    "connector",
    "remote_rules",
    "remote_kv",
    "pipeline_rules",
    "encoder_rules",
    "encoder_cache",
    "scheduler",
)


def copies(changed: Mapping[str, str]) -> dict[str, ModuleType]:
    """Copies of ``MODULES`` that no compiler has seen; the engine's own stay as they are.

    Args:
        changed: module -> source to run in place of its file.
    """
    package = servecast.sim.engine
    kept = {name: importlib.import_module(f"{package.__name__}.{name}") for name in MODULES}
    made: dict[str, ModuleType] = {}
    try:
        for name in MODULES:
            file = FOLDER / f"{name}.py"
            made[name] = sys.modules[f"{package.__name__}.{name}"] = ModuleType(f"{package.__name__}.{name}")
            setattr(package, name, made[name])
            source = changed.get(name) or file.read_text("utf-8")
            exec(compile(source, str(file), "exec"), made[name].__dict__)
    finally:
        for name, module in kept.items():
            sys.modules[f"{package.__name__}.{name}"] = module
            setattr(package, name, module)
    return made


@lru_cache(1)
def interpreted() -> dict[str, ModuleType]:
    """Copies of the sources as they are."""
    return copies({})
