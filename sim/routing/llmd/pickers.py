"""llm-d's pickers: which of the scored endpoints takes the request, as its position among them.

maxNumOfEndpoints asks for several; the request goes to the first of them, so it changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servecast.sim.routing.llmd.scorers import Scores


def max_score(scores: Scores, rng: np.random.Generator) -> int:
    """The highest score; of exact equals, any with equal chances."""
    best = (scores == scores[scores.argmax()]).nonzero()[0]
    return int(best[0] if len(best) == 1 else best[rng.integers(len(best))])


def random(scores: Scores, rng: np.random.Generator) -> int:
    """Any, with equal chances."""
    return int(rng.integers(len(scores)))


def weighted_random(scores: Scores, rng: np.random.Generator) -> int:
    """Chances in proportion to the scores: the largest of U^(1 / score), U uniform (Efraimidis and Spirakis
    2006). A score of 0 is never picked, unless all are 0, which is any."""
    draws = rng.random(len(scores))
    if not (scores > 0).any():
        return int(draws.argmax())
    keys = np.full(len(scores), -np.inf)
    np.divide(np.log(draws), scores, out=keys, where=scores > 0)
    return int(keys.argmax())


PICKERS: dict[str, Callable[[Scores, np.random.Generator], int]] = {
    "max-score-picker": max_score,
    "random-picker": random,
    "weighted-random-picker": weighted_random,
}
