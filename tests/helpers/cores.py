"""The engine's core interpreted, where it runs compiled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from servecast.sim.engine import core

SOURCE = Path(str(core.__file__)).with_name("core.py")


def interpreted() -> ModuleType:
    """A copy of the module that no compiler has seen."""
    name = "core_interpreted"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SOURCE)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
