"""Which of several sides that saw the same traffic is best, how sure that is, and what explains it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from servecast.sim.compare.side_by_side import Document, Side
from servecast.sim.metrics.confidence import Interval, t_interval
from servecast.sim.report.text import cell_text, table
from servecast.sim.run.results import measured
from servecast.sim.run.simulation import replicas_text

RANKED = {  # metric -> whether less of it is better
    "mean_ttft_ms": True,
    "p95_ttft_ms": True,
    "mean_tpot_ms": True,
    "mean_e2el_ms": True,
    "output_throughput": False,
}
_WHY = ("mean_ttft_ms", "output_throughput")  # explained in words
_MATTERS = 0.1  # relative difference of a cause
_EQUAL = 1e-3  # relative difference up to which two sides are equals, however sure it is
_PERCENT = ("prefix_cache_hit_rate", "mean_kv_cache_usage")
CAUSES = {  # metric -> in words; all but the first are worse where they are more
    "prefix_cache_hit_rate": "prefix hits {} of prompt tokens",
    "uncached_tokens_per_s": "{} uncached prompt tokens a second",
    "mean_kv_cache_usage": "KV cache {} full on average",
    "mean_num_waiting": "{} requests waiting on average",
    "token_imbalance": "the busiest replica computes {} times the mean",
    "num_preemptions": "{} preemptions",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A side's place. rank: 1 + how many sides are better beyond doubt and by a thousandth or more, so that
    equals share one.

    value: mean over the seeds. behind: this side less the best one, seed by seed, with its interval; None for
    the best one, and where there is one seed, which puts values that differ in their order.
    """

    label: str
    rank: int
    value: float
    behind: Interval | None

    @property
    def behind_text(self) -> str:
        """The interval, or nothing."""
        if self.behind is None:
            return ""
        low, high = (
            f"{end:+,.0f}" if abs(end) >= 100 else f"{end:+.3g}"
            for end in (self.behind.low, self.behind.high)
        )
        return f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """Places by one metric, best value first. stage: None is the whole run."""

    stage: str | None
    metric: str
    places: tuple[Place, ...]

    def of(self, label: str) -> Place | None:
        """The place of a side; None where its value is not known."""
        return next((place for place in self.places if place.label == label), None)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a side stands behind the best one: what is worse with it, in words, cause before effect."""

    stage: str | None
    metric: str
    label: str
    best: str
    causes: tuple[str, ...]

    def to_text(self) -> str:
        """A sentence."""
        what = "; ".join(self.causes) if self.causes else "none of the causes that are looked at differs"
        return f"{self.label} is behind {self.best}: {what}"


def rank(sides: Sequence[Side]) -> list[Ranking]:
    """Rank sides of which each was simulated with the same seeds, in the whole run and in each stage."""
    found = []
    for stage in _stages(sides):
        samples = _samples(sides, stage)
        for metric, less in RANKED.items():
            values = {label: of_side[metric] for label, of_side in samples.items() if metric in of_side}
            if len(values) > 1:
                found.append(Ranking(stage, metric, _places(values, less)))
    return found


def _stages(sides: Sequence[Side]) -> list[str | None]:
    named = [stage["stage"] for stage in sides[0].results[0].get("stages") or ()]
    return [None, *named] if len(named) > 1 else [None]


def _samples(sides: Sequence[Side], stage: str | None) -> dict[str, dict[str, list[float]]]:
    """By side and metric, a value a seed; without metrics that are unknown for a seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for side in sides:
        parts = [measured(_part(document, stage)) for document in side.results]
        found[side.label] = {
            metric: [float(part[metric] or 0.0) for part in parts]
            for metric in parts[0]
            if all(part.get(metric) is not None for part in parts)
        }
    return found


def _part(document: Document, stage: str | None) -> Document:
    if stage is None:
        return document
    part: Document = next(each for each in document["stages"] if each["stage"] == stage)
    return part


def _places(values: Mapping[str, list[float]], less: bool) -> tuple[Place, ...]:
    means = {label: math.fsum(of_side) / len(of_side) for label, of_side in values.items()}
    order = sorted(means, key=lambda label: means[label] if less else -means[label])
    places = []
    for label in order:
        better = 0
        for other in order:
            gap = _difference(values[label], values[other])
            worse_by = gap if less else _difference(values[other], values[label])
            equal = abs(gap.estimate) <= _EQUAL * max(abs(means[label]), abs(means[other]))
            better += not equal and (worse_by.low > 0 if gap.samples > 1 else worse_by.estimate > 0)
        behind = _difference(values[label], values[order[0]])
        shown = behind if label != order[0] and behind.samples > 1 else None
        places.append(Place(label, 1 + better, means[label], shown))
    return tuple(places)


def _difference(ours: Sequence[float], base: Sequence[float]) -> Interval:
    return t_interval([a - b for a, b in zip(ours, base, strict=True)])


def reasons(sides: Sequence[Side], rankings: Sequence[Ranking]) -> list[Reason]:
    """What explains each side that is behind the best one. A cause counts where it is worse by a tenth or
    more, and with several seeds beyond doubt."""
    found = []
    for ranking in rankings:
        if ranking.metric not in _WHY:
            continue
        samples, best = _samples(sides, ranking.stage), ranking.places[0].label
        for place in ranking.places[1:]:
            if place.rank > 1:
                causes = _causes(samples[place.label], samples[best])
                found.append(Reason(ranking.stage, ranking.metric, place.label, best, causes))
    return found


def _causes(ours: Mapping[str, Sequence[float]], best: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    found = []
    for metric, words in CAUSES.items():
        if metric not in ours or metric not in best:
            continue
        sides = (ours[metric], best[metric])
        gap = _difference(*(sides[::-1] if metric == "prefix_cache_hit_rate" else sides))
        mine, base = (math.fsum(of_side) / len(of_side) for of_side in sides)
        relative = gap.estimate / max(abs(mine), abs(base)) if gap.estimate else 0.0
        if relative >= _MATTERS and (gap.samples == 1 or gap.low > 0):
            found.append(f"{words.format(_show(metric, mine))}, not {_show(metric, base)}")
    return tuple(found)


def _show(metric: str, value: float) -> str:
    if metric in _PERCENT:
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def to_text(sides: Sequence[Side], rankings: Sequence[Ranking], why: Sequence[Reason]) -> str:
    """Places by metric, a row a stage; what explains them; and the replicas of the first seed."""
    labels = [side.label for side in sides]
    parts = []
    for metric in dict.fromkeys(ranking.metric for ranking in rankings):
        rows = [
            [ranking.stage or "all", *(_place_text(ranking.of(label)) for label in labels)]
            for ranking in rankings
            if ranking.metric == metric
        ]
        parts.append(table(["place, value", *labels], rows, title=f"\n{metric}"))
    if any(ranking.places[-1].behind is not None for ranking in rankings):
        parts.append("\nPlaces are shared where no difference, seed by seed, is beyond doubt (95%) and 0.1%.")
    for reason in why:
        where = "" if reason.stage is None else f"{reason.stage}, "
        parts.append(f"{where}{reason.metric}: {reason.to_text()}.")
    for side in sides:
        replicas = side.results[0]["fleet_load"]["replicas"]
        parts.append(replicas_text(replicas, title=f"\nReplicas behind {side.label}"))
    return "\n".join(parts)


def _place_text(place: Place | None) -> str:
    if place is None:
        return "-"
    text = f"{place.rank}. {cell_text(place.value)}"
    return f"{text} ({place.behind_text})" if place.behind_text else text


def to_json(sides: Sequence[Side], rankings: Sequence[Ranking], why: Sequence[Reason]) -> dict[str, Any]:
    """Plain values; the replicas are those of the first seed."""
    return {
        "ranking": [asdict(ranking) for ranking in rankings],
        "why": [asdict(reason) for reason in why],
        "replicas": {
            side.label: side.results[0]["fleet_load"]["replicas"]
            for side in sides
            if "fleet_load" in side.results[0]
        },
    }
