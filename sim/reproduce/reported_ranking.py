"""Several routers in one reported table: in which order the report and the prediction put them, and how far
each carries the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from servecast.sim.metrics.knee import open_loop_knee
from servecast.sim.metrics.saturation import Saturation, pooled
from servecast.sim.reproduce.cell import Cell
from servecast.sim.scenario.reported import Reported, matches


@dataclass(frozen=True, slots=True)
class Pair:
    """Two routers in one row and column, the better one by the report first, and whether the prediction puts
    it first, too."""

    row: str
    column: str
    better: str
    worse: str
    agrees: bool


@dataclass(frozen=True, slots=True)
class RouterRanking:
    """All pairs that the report orders. ties: pairs that it does not."""

    pairs: tuple[Pair, ...]
    ties: int

    @property
    def wrong(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if not pair.agrees)

    def to_text(self) -> str:
        """One line, and one for each pair in the wrong order."""
        right = len(self.pairs) - len(self.wrong)
        lines = [f"ranking: {right} of {len(self.pairs)} pairs as reported ({self.ties} ties)"]
        lines += [
            f"  wrong: {pair.row} {pair.column}: {pair.better} is better than {pair.worse}"
            for pair in self.wrong
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pairs": len(self.pairs),
            "as_reported": len(self.pairs) - len(self.wrong),
            "ties": self.ties,
            "wrong": [asdict(pair) for pair in self.wrong],
        }


@dataclass(frozen=True, slots=True)
class Sustained:
    """The largest request rate (requests/s) that is carried without a growing queue, and the smallest that is
    not; None if there is none."""

    holds: float | None
    saturates: float | None

    def to_text(self) -> str:
        """In words."""
        if self.saturates is None:
            return f"no queue grows up to {self.holds:g} requests/s"
        below = "" if self.holds is None else f", not yet at {self.holds:g}"
        return f"its queues grow from {self.saturates:g} requests/s on{below}"


def rank(reported: Reported, cells: Sequence[Cell]) -> RouterRanking | None:
    """Compare the order of each pair of routers (see ``Ranking``); None if that was not asked for."""
    asked = reported.ranking
    if asked is None:
        return None
    together: dict[tuple[str, str], list[Cell]] = {}  # (row without its router, column) -> a cell a router
    for cell in cells:
        left_out = cell.used == "summary" or any(matches(cell.keys, row) for row in asked.without)
        if cell.metric in asked.columns and not left_out:
            row = " ".join(f"{key}={value}" for key, value in reported.stage_keys(cell.keys).items())
            together.setdefault((row, cell.metric), []).append(cell)
    pairs, ties = [], 0
    for (row, column), group in together.items():
        sign = 1 if reported.columns[column].statistic is not None else -1  # low latencies, high throughputs
        for a, b in combinations(sorted(group, key=lambda cell: sign * cell.reported), 2):
            if abs(a.reported - b.reported) <= asked.tie * max(a.reported, b.reported):
                ties += 1
                continue
            agrees = sign * a.predicted < sign * b.predicted
            better, worse = (str(cell.keys[reported.keys[0]]) for cell in (a, b))
            pairs.append(Pair(row, column, better, worse, agrees))
    return RouterRanking(tuple(pairs), ties)


def sustained(held: Mapping[float, Sequence[Saturation]]) -> Sustained:
    """How far a router carries the load. held: by request rate, one for each replication.

    A stage may be shorter than its requests, so that few of them are completed while others arrive: it is
    only asked whether the waiting queue grows."""
    grows = {rate: pooled(replications).queue_grows for rate, replications in held.items()}
    saturates = min((rate for rate, full in grows.items() if full), default=None)
    if saturates is None:
        return Sustained(max(grows, default=None), None)
    return Sustained(open_loop_knee(list(grows), list(grows.values())), saturates)
