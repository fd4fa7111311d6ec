"""Requests that differ in how many of their drafts are accepted: kinds of them, from a spread that a scenario
gives, or from what single requests came to.

A law of one kind is two tuples: the probability that the first 1, 2, .. k drafts are all accepted, and those
that 0, 1, .. k are proposed, () for always k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv

from servecast.sim.engine.speculation import Kind, Kinds

MOST_KINDS = 32  # of one class of lengths: means of as many equal parts stand for the whole distribution
CLASSES, IN_A_CLASS = 4, 25  # of output lengths, at most; requests that one takes at least


def extra(kind: Kind) -> float:
    """Accepted drafts of a step, on average."""
    rates, proposed = kind
    totals = tuple(accumulate(rates, initial=0.0))
    return sum(map(float.__mul__, proposed, totals)) if proposed else totals[-1]


def scaled(kind: Kind, factor: float) -> Kind:
    """A law that accepts ``factor`` times as many drafts: found more often, where they are looked up, and
    beyond that, or where they always come, each rate to one power, which keeps them falling."""
    rates, proposed = kind
    target = min(extra(kind) * factor, extra(((1.0,) * len(rates), proposed)))
    if proposed and (found := 1.0 - proposed[0]) > 0.0:
        more = min(factor, 1.0 / found)
        proposed = (1.0 - more * found, *(share * more for share in proposed[1:]))
        if more == factor:
            return rates, proposed
        target = extra(kind) * factor
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2.0
        raised = tuple(rate**middle if rate else 0.0 for rate in rates)
        low, high = (middle, high) if extra((raised, proposed)) > target else (low, middle)
    return tuple(rate**high if rate else 0.0 for rate in rates), proposed


def always_proposed(kinds: Kinds | None, mean: Kind) -> Kinds | None:
    """The same differences between requests whose drafts always come. mean: the law of all together."""
    if kinds is None or not mean[1]:
        return kinds
    laws = tuple(scaled((mean[0], ()), extra(each) / extra(mean)) for each in kinds.laws)
    return replace(kinds, laws=laws)


def together(laws: Sequence[Kind]) -> tuple[float, ...]:
    """The rates of all steps, where each kind has as many tokens: what accepts little takes more steps."""
    shares = np.array([1.0 / (1.0 + extra(law)) for law in laws])
    return tuple(map(float, shares @ np.array([rates for rates, _ in laws]) / shares.sum()))


def of_beta(mean: float, spread: float) -> list[float]:
    """Rates of requests that are beta distributed: the means of ``MOST_KINDS`` equal parts of the
    distribution. spread: its standard deviation, below sqrt(mean (1 - mean))."""
    total = mean * (1.0 - mean) / spread**2 - 1.0
    a, b = mean * total, (1.0 - mean) * total
    ends = betaincinv(a, b, np.linspace(0.0, 1.0, MOST_KINDS + 1))
    parts = MOST_KINDS * mean * np.diff(betainc(a + 1.0, b, ends))
    return [float(min(1.0, max(0.0, part))) for part in parts]


def of_records(law: Kind, output_tokens: Sequence[int], steps: Sequence[int]) -> Kinds | None:
    """Kinds of requests as they were served, by their output lengths: some texts repeat themselves more than
    others, and a long output has more to look up in.

    Steps a token differ between requests by chance, too. Of the variance that is there, what steps drawn by
    ``law`` would have is taken off: all requests of a class come closer to its mean.

    Args:
        law: of all together. output_tokens, steps: (n,) of each request, the first token not being a step.

    Returns:
        None where they differ no more than by chance, or are too few.
    """
    tokens, taken = np.asarray(output_tokens, float), np.asarray(steps, float)
    gained = (tokens - 1.0).sum() / taken.sum() - 1.0 if len(tokens) else 0.0
    if len(tokens) < IN_A_CLASS or gained <= 0.0:
        return None
    edges = [0, *_edges(tokens)]
    parts = [
        _without_chance(law, tokens[chosen] - 1.0, taken[chosen])
        for first, beyond in pairwise([*edges, np.inf])
        if (chosen := (tokens >= first) & (tokens < beyond)).any()
    ]
    count = min(MOST_KINDS, *(len(part) for part in parts))
    paces = np.concatenate([np.repeat(np.sort(part), count).reshape(count, -1).mean(1) for part in parts])
    if np.ptp(paces) < 1e-6:
        return None
    return Kinds(tuple(scaled(law, max(0.0, 1.0 / pace - 1.0) / gained) for pace in paces), tuple(edges))


def _edges(tokens: NDArray[np.float64]) -> list[int]:
    """The first output lengths of all classes but the shortest."""
    classes = min(CLASSES, len(tokens) // IN_A_CLASS)
    cuts = np.quantile(tokens, np.arange(1, classes) / classes, method="higher")
    return sorted({int(cut) for cut in cuts if cut > tokens.min()})


def _variance(law: Kind) -> float:
    """Of the accepted drafts of one step."""
    rates, proposed = law
    shares = proposed or (0.0,) * len(rates) + (1.0,)
    squares = accumulate(((2 * at - 1) * rate for at, rate in enumerate(rates, 1)), initial=0.0)
    return sum(map(float.__mul__, shares, squares)) - extra(law) ** 2


def _without_chance(
    law: Kind, tokens: NDArray[np.float64], steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) steps a token that requests tend to, behind those that they drew: the variance of how many steps
    come to n tokens is n variance / mean**3 of a step's tokens (a renewal process)."""
    pace, mean = steps / tokens, float(steps.sum() / tokens.sum())
    seen = float(np.average((pace - mean) ** 2, weights=tokens))
    variance = _variance(law) * (1.0 / mean - 1.0) / extra(law)
    chance = len(tokens) * variance * mean**3 / float(tokens.sum())
    kept = max(0.0, 1.0 - chance / seen) ** 0.5 if seen else 0.0
    found: NDArray[np.float64] = mean + (pace - mean) * kept
    return found
