"""The proof that the comparison with vLLM sees every rule: each rule is broken by one line, and caught.

``mutations.yaml`` lists the rules with the line of the simulator that carries each, and a wrong one. A
mutation runs in a freshly loaded copy of the engine's modules; the real ones stay as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from servecast.validate.parity.parity import MakeScheduler, Mismatch, Recorded, compare

# in the order of import
ENGINE = ("rules", "kv_cache", "sequence", "waiting", "cruise", "cadence", "step", "scheduler")


@dataclass(frozen=True, slots=True)
class Mutation:
    """A rule of vLLM's, and one changed line of ``servecast.sim.engine.<file>`` that breaks it.

    ``old`` occurs once in that file; ``new`` differs from it in one line. ``version`` is the vLLM whose
    recorded decisions must show the difference.
    """

    rule: str
    file: str
    old: str
    new: str
    version: str = "0.32"

    def source(self) -> str:
        """The broken source.

        Raises:
            LookupError: the line is not there any more, or not once: the table has to follow the engine.
        """
        source = Path(str(importlib.import_module(f"servecast.sim.engine.{self.file}").__file__)).read_text()
        if source.count(self.old) != 1:
            raise LookupError(
                f"mutations.yaml, {self.rule!r}: {source.count(self.old)} times in "
                f"sim/engine/{self.file}.py, must be once:\n{self.old}"
            )
        return source.replace(self.old, self.new)

    def changed_line(self) -> tuple[str, str]:
        """The line before and after. Raises: ValueError: not exactly one line differs."""
        before, after = self.old.splitlines(), self.new.splitlines()
        changed = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
        if len(changed) != 1:
            raise ValueError(f"mutations.yaml, {self.rule!r}: {len(changed)} lines differ, must be one")
        return changed[0]

    def scheduler(self) -> MakeScheduler:
        """The simulator's scheduler with this one line broken."""
        names = [f"servecast.sim.engine.{name}" for name in ENGINE]
        package = importlib.import_module("servecast.sim.engine")
        kept = {name: importlib.import_module(name) for name in names}
        try:
            for name, module in kept.items():
                file = Path(str(module.__file__))
                copy = ModuleType(name)
                copy.__file__ = str(file)
                sys.modules[name] = copy
                source = self.source() if file.stem == self.file else file.read_text()
                exec(compile(source, str(file), "exec"), copy.__dict__)
            mutated: Any = sys.modules["servecast.sim.engine.scheduler"]
        finally:
            sys.modules.update(kept)
            for name, module in kept.items():
                setattr(package, name.rpartition(".")[2], module)
        make: MakeScheduler = mutated.Scheduler
        return make


def load_mutations() -> list[Mutation]:
    """The table of mutations.yaml."""
    rows = yaml.safe_load(Path(__file__).with_name("mutations.yaml").read_text())
    return [
        Mutation(**row | {"old": row["old"].rstrip("\n"), "new": row["new"].rstrip("\n")}) for row in rows
    ]


def catch(mutation: Mutation, recorded: Sequence[Recorded]) -> Mismatch | None:
    """The first recorded scenario in which the broken engine decides otherwise than vLLM; None if none."""
    make_scheduler = mutation.scheduler()
    for record in recorded:
        mismatch = compare(record, mutation.version, make_scheduler)
        if mismatch is not None:
            return mismatch
    return None
