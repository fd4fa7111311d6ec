"""The proof that the comparison with vLLM sees every rule: each rule is broken by one line, and caught.

``mutations.yaml`` lists the rules with the line of the simulator that carries each, and a wrong one. A
mutation runs in a freshly loaded, interpreted copy of the engine's modules; the real ones stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cores import FOLDER, copies

from servecast.validate.parity.parity import MakeScheduler, Mismatch, Recorded, compare


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
        source = (FOLDER / f"{self.file}.py").read_text("utf-8")
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
        """The simulator's scheduler, interpreted, with this one line broken."""
        make: MakeScheduler = copies({self.file: self.source()})["scheduler"].Scheduler
        return make


def load_mutations(file: str = "mutations.yaml") -> list[Mutation]:
    """The table of ``file``, here ``mutations.yaml``."""
    rows = yaml.safe_load(Path(__file__).with_name(file).read_text())
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
