"""Inputs that are nearly right: values replaced, removed, renamed, in any place."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**30, "", "x", "10ms", [], [None], {},
    {"a": 1}, {1: 2},
)  # fmt: skip


def mutations(data: Any, count: int) -> Iterator[Any]:
    """``count`` copies of YAML data, each with one or two things wrong; the same ones every time."""
    rng = random.Random(0)
    for _ in range(count):
        other = copy.deepcopy(data)
        for _ in range(rng.choice((1, 1, 2))):
            path = rng.choice(list(_paths(other)))
            node = other
            for part in path[:-1]:
                node = node[part]
            how = rng.random()
            if how < 0.7:
                node[path[-1]] = copy.deepcopy(rng.choice(ODD))
            elif how < 0.85 or isinstance(node, list):
                del node[path[-1]]
            else:
                node[rng.choice(("x", 5, "type"))] = node.pop(path[-1])
        yield other


def _paths(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from _paths(value, (*before, key))
