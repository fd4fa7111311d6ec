"""Whole tables of simulations, to the last bit, are those of an engine that was written otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import KEPT, WORKLOADS, digests, scenario

from servecast.sim.run.simulate import simulate


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_tables_are_those_that_were_kept(name: str, tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text("utf-8"))[name]
    assert digests(simulate(scenario(tmp_path, name))) == kept
