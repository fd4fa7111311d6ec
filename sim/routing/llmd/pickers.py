"""llm-d's pickers: which of the scored endpoints takes the request.

maxNumOfEndpoints asks for several; the request goes to the first of them, so it changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from servecast.sim.routing.llmd.cycle import Setting
from servecast.sim.routing.llmd.plugin import Plugin
from servecast.sim.routing.llmd.scorers import Scores


class Picker(Protocol):
    """Picks one endpoint."""

    def pick(self, scores: Scores) -> int:
        """Position of the endpoint in ``scores``, which is not empty."""
        ...


class MaxScorePicker:
    """The highest score; of exact equals, any with equal chances."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._rng = setting.rng

    def pick(self, scores: Scores) -> int:
        best = (scores == scores[scores.argmax()]).nonzero()[0]
        return int(best[0] if len(best) == 1 else best[self._rng.integers(len(best))])


class RandomPicker:
    """Any, with equal chances."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._rng = setting.rng

    def pick(self, scores: Scores) -> int:
        return int(self._rng.integers(len(scores)))


class WeightedRandomPicker:
    """Chances in proportion to the scores: the largest of U^(1 / score), U uniform (Efraimidis and Spirakis
    2006). A score of 0 is never picked, unless all are 0, which is any."""

    def __init__(self, plugin: Plugin, setting: Setting) -> None:
        self._rng = setting.rng

    def pick(self, scores: Scores) -> int:
        weights = scores
        draws = self._rng.random(len(weights))
        if not (weights > 0).any():
            return int(draws.argmax())
        keys = np.full(len(weights), -np.inf)
        np.divide(np.log(draws), weights, out=keys, where=weights > 0)
        return int(keys.argmax())


PICKERS: dict[str, Callable[[Plugin, Setting], Picker]] = {
    "max-score-picker": MaxScorePicker,
    "random-picker": RandomPicker,
    "weighted-random-picker": WeightedRandomPicker,
}
