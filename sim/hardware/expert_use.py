"""How tokens spread over routed experts: how many are touched, and how much the fullest rank has to do.

A skew s says that the i-th most used expert gets tokens in proportion to i^-s: 0 is even. Fit it to counts
of a router's choices, most used first, as the slope of log count over log rank. Instead, the load of each
expert can be given, in the order of the experts.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=64)
def _chosen(experts: int, per_token: int, skew: float, loads: tuple[float, ...] = ()) -> Floats:
    """Of each expert, the probability that a token is sent to it: none above 1, ``per_token`` in total; most
    used first, but in their own order where loads are given."""
    weights = np.array(loads) if loads else np.arange(1.0, experts + 1) ** -skew
    order = np.argsort(-weights, kind="stable")
    weights = weights[order]
    full = 0  # of the most used, those that every token is sent to
    while True:
        shares = weights[full:] / weights[full:].sum() * (per_token - full)
        over = int(np.count_nonzero(shares > 1.0))
        if not over:
            found = np.empty(experts)
            found[order] = np.concatenate([np.ones(full), shares])
            return found
        full += over


def touched(
    experts: int, per_token: int, tokens: int, skew: float = 0.0, loads: tuple[float, ...] = ()
) -> float:
    """Experts that ``tokens`` tokens touch, in expectation, if each chooses by itself: evenly
    E (1 - (1 - k/E)^T)."""
    if not skew and not loads:
        return experts * (1.0 - (1.0 - per_token / experts) ** tokens)
    return float(np.sum(1.0 - (1.0 - _chosen(experts, per_token, skew, loads)) ** tokens))


def largest_of(ranks: int) -> float:
    """Expectation of the largest of ``ranks`` shares of a fixed sum, in standard deviations of one over its
    mean: of so many normal numbers (Blom 1958), which are correlated by -1/(ranks - 1)."""
    if ranks == 1:
        return 0.0
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * math.sqrt(ranks / (ranks - 1))


def fullest_rank(
    experts: int,
    per_token: int,
    ranks: int,
    skew: float,
    tokens: float = float("inf"),
    *,
    loads: tuple[float, ...] = (),
    redundant: int | None = None,
) -> float:
    """Tokens of the fullest of ``ranks`` with as many experts each, over the mean, in expectation.

    The experts of a skew lie on the ranks at random, those with given loads in their order, with as many on
    each (linear placement). Beside that ``tokens`` tokens that choose by themselves fall unevenly, the more
    so the fewer they are: the number of a token's choices on one rank has a variance of
    (1/R) (1 - 1/R) sum p (1 - p) E/(E - 1), the hypergeometric one where all p are equal.

    Args:
        tokens: of all ranks together in one layer; infinite: their mean.
        redundant: EPLB has placed the experts by their loads, with so many copies more; None: no EPLB.
    """
    if ranks == 1:
        return 1.0
    chosen, mean = _chosen(experts, per_token, skew, loads), per_token / ranks
    sampled = float(np.sum(chosen * (1 - chosen))) / ranks * (1 - 1 / ranks) * experts / max(experts - 1, 1)
    placed, least = 0.0, 1.0
    if redundant is not None:
        least = rebalanced(experts, per_token, ranks, skew, loads, redundant)
    elif loads:
        least = max(float(part.sum()) for part in np.array_split(chosen, ranks)) / mean
    else:
        placed = float(chosen.std()) ** 2 * (experts / ranks) * (1 - 1 / ranks)
    spread = (placed + sampled / tokens) ** 0.5 * largest_of(ranks) / mean
    most = min(ranks, experts / per_token)  # all choices on one rank
    return float(min(max(least, 1.0 + spread), most))


@lru_cache(maxsize=64)
def rebalanced(
    experts: int, per_token: int, ranks: int, skew: float, loads: tuple[float, ...], redundant: int
) -> float:
    """Load of the fullest rank over the mean, once EPLB has placed the experts: each further copy goes to the
    expert with the highest load a copy, and the copies, highest first, to the rank with the least load that
    has room (DefaultEplbPolicy.replicate_experts, balanced_packing)."""
    load = _chosen(experts, per_token, skew, loads)
    copies = np.ones(experts)
    for _ in range(redundant):
        copies[int(np.argmax(load / copies))] += 1
    each = np.repeat(load / copies, copies.astype(int))
    totals, rooms = np.zeros(ranks), np.full(ranks, len(each) // ranks)
    rooms[: len(each) % ranks] += 1
    for share in np.sort(each)[::-1]:
        at = int(np.argmin(np.where(rooms > 0, totals, np.inf)))
        totals[at] += share
        rooms[at] -= 1
    return float(totals.max() / totals.mean())


def most_touched(experts: int, ranks: int, share: float) -> float:
    """Experts that are touched on the rank with most of them, in expectation, where each of ``experts`` is
    with probability ``share``."""
    held = experts / ranks
    spread = math.sqrt(held * share * (1.0 - share) * (1 - 1 / ranks)) * largest_of(ranks)
    return min(held, held * share + spread)
