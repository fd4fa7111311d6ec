"""Each rule of the tables beside ``mutations.yaml`` is broken by one line that the engine has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(HERE := Path(__file__).parent))

from mutations import Mutation, load_mutations

TABLES = sorted(path.name for path in HERE.glob("mutations_*.yaml"))
MUTATIONS = [mutation for table in TABLES for mutation in load_mutations(table)]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_mutation_is_one_line_of_the_engine(mutation: Mutation) -> None:
    before, after = mutation.changed_line()
    assert before != after
    assert mutation.new in mutation.source()
