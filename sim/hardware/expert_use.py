"""How tokens spread over routed experts: how many are touched, and how much the fullest rank has to do.

A skew s says that the i-th most used expert gets tokens in proportion to i^-s: 0 is even. Fit it to counts
of a router's choices, most used first, as the slope of log count over log rank.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=64)
def _chosen(experts: int, per_token: int, skew: float) -> npt.NDArray[np.float64]:
    """Of each expert, the probability that a token is sent to it: none above 1, ``per_token`` in total."""
    weights = np.arange(1.0, experts + 1) ** -skew
    full = 0  # of the most used, those that every token is sent to
    while True:
        shares = weights[full:] / weights[full:].sum() * (per_token - full)
        over = int(np.count_nonzero(shares > 1.0))
        if not over:
            return np.concatenate([np.ones(full), shares])
        full += over


def touched(experts: int, per_token: int, tokens: int, skew: float = 0.0) -> float:
    """Experts that ``tokens`` tokens touch, in expectation, if each chooses by itself: evenly
    E (1 - (1 - k/E)^T)."""
    if not skew:
        return experts * (1.0 - (1.0 - per_token / experts) ** tokens)
    return float(np.sum(1.0 - (1.0 - _chosen(experts, per_token, skew)) ** tokens))


def fullest_rank(experts: int, per_token: int, ranks: int, skew: float) -> float:
    """Tokens of the fullest of ``ranks`` with as many experts each, over the mean, in expectation, where the
    experts lie on them at random: the largest of so many normal sums."""
    if ranks == 1 or not skew:
        return 1.0
    each = experts / ranks
    spread = _chosen(experts, per_token, skew).std() * (each * (1 - 1 / ranks)) ** 0.5
    largest = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return float(1.0 + largest * spread / (per_token / ranks))
