"""Results, scenarios or routers compared: side by side, and routers ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from servecast.sim.compare import ranking
from servecast.sim.compare.page import PodsOverTime, write_comparison_page, write_router_page
from servecast.sim.compare.side_by_side import Document, Side, SideBySide, side_by_side
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import file_or_name
from servecast.sim.report.answer import Answer
from servecast.sim.report.progress import progress_bar
from servecast.sim.run.results import read_result, to_text
from servecast.sim.run.simulate import simulate as run_of
from servecast.sim.run.simulation import at_rate, simulate
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.spec import Workload


@dataclass(frozen=True, slots=True)
class RankedRouters:
    """Which router is best, and why. sent: the scenario of each, and the traffic that all got (None: its own
    workload)."""

    places: Sequence[ranking.Ranking]
    why: Sequence[ranking.Reason]
    sent: dict[str, tuple[Scenario, Workload | None]]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Answer):
    """What differs between the sides.

    Attributes:
        table: metrics side by side, and what differs between the runs that may explain them.
        sides: the results of each.
        routers: their ranking, None where something else was compared.
        stage: that was asked for. once: seeds were asked for that would give the same again.
    """

    table: SideBySide
    sides: tuple[Side, ...]
    routers: RankedRouters | None = None
    stage: str | None = None
    once: bool = False

    def to_json(self) -> dict[str, Any]:
        """The table's values, and of routers their places."""
        document = self.table.to_json()
        if self.routers is not None:
            document |= ranking.to_json(self.sides, self.routers.places, self.routers.why)
        return document

    def to_text(self, *, all_metrics: bool = False) -> str:
        """Of routers their places and what explains them, otherwise the main metrics.

        Args:
            all_metrics: all that the results have in common.
        """
        parts = []
        if self.routers is not None:
            parts.append(ranking.to_text(self.sides, self.routers.places, self.routers.why))
        if self.routers is None or all_metrics or self.stage is not None:
            parts.append(self.table.to_text(all_metrics=all_metrics))
        return "\n".join([*parts, *self._notes()])

    def _notes(self) -> list[str]:
        """What each side says of itself, where it does not go for all; and that nothing here is random."""
        said = [list(side.results[0].get("notes") or ()) for side in self.sides]
        lines = [
            f"note: {side.label}: {note}"
            for side, notes in zip(self.sides, said, strict=True)
            for note in notes
            if not all(note in others for others in said)
        ]
        simulated = all("servecast_version" in side.results[0] for side in self.sides)
        if self.once and simulated:
            lines.append("note: nothing in these runs is random: one seed was run")
        return lines

    def to_html(self, path: Path | str) -> Path:
        """Write the page; for the plots of routers each is simulated once more."""
        if self.routers is None:
            first = self.sides[0].results[0]
            about = " on ".join(str(first[key]) for key in ("model_id", "gpu") if first.get(key))
            return write_comparison_page(path, self.table, about=about and f"{about}.", notes=self._notes())
        pods = {
            label: PodsOverTime.of(run_of(scenario, workload=workload))
            for label, (scenario, workload) in self.routers.sent.items()
        }
        title = f"Routers on {self.sides[0].results[0]['scenario']}"
        places, why = self.routers.places, self.routers.why
        return write_router_page(path, self.sides, places, why, pods, title=title)


def compare(
    *sides: Scenario | Path | str,
    routers: Sequence[str] = (),
    labels: Sequence[str] = (),
    seeds: int = 5,
    stage: str | None = None,
    request_rate: float | None = None,
    num_requests: int = 1000,
    jobs: int = -1,
    progress: bool = False,
) -> Comparison:
    """Put results, scenarios or routers side by side. What is simulated is compared seed by seed.

    Args:
        sides: scenarios, which are simulated, and result files (of ``servecast simulate`` or ``vllm bench
            serve``); or one scenario, with routers.
        routers: routing policies, and files of EndpointPickerConfigs: the same traffic goes through each.
        labels: of the sides.
        seeds: how many to simulate, from the scenario's on.
        stage: compare this stage alone, as "concurrency=32".
        request_rate: requests/s of the traffic that ``plan`` probes, instead of the scenarios' own workload.
        num_requests: how many at that rate.
        jobs: processes; -1 is one for each core. The answer does not depend on it.
        progress: show how far it is.

    Raises:
        InputError: there is nothing to compare, or a scenario or a result is wrong.
    """
    if seeds < 1:
        raise InputError(f"{seeds} seeds", where="--seeds", fix="Give at least 1.")
    if routers:
        sides, labels = _behind(sides, routers)
    elif len(sides) < 2:
        fix = "Give a second result or scenario, --routers, or a what-if."
        raise InputError("there is nothing to compare with", where="B", fix=fix)
    specs = [(each, each.workload) for each in sides if isinstance(each, Scenario)]
    asking = [of for of, spec in specs if isinstance(spec, InferencePerfWorkload) and spec.asks_server()]
    if asking and len(sides) > 1 and request_rate is None:
        what = "the stages of a sweep depend on the server, so that two sides do not get the same"
        fix = "Give workload.saturation_rate."
        raise InputError(what, where=f"{asking[0].source}: workload.inference_perf", fix=fix)
    found: list[Side] = []
    sent: dict[str, tuple[Scenario, Workload | None]] = {}
    with progress_bar("compare", shown=progress) as advance, Parallel(n_jobs=jobs) as pool:
        for label, side in zip(labels or [_label(side) for side in sides], sides, strict=True):
            advance(len(found) / len(sides), label)
            if isinstance(side, Scenario):
                rate = request_rate
                sent[label] = side, None if rate is None else at_rate(side, rate, num_requests)
                found.append(Side(label, _of_seeds(side, seeds, rate, num_requests, pool)))
            else:
                found.append(Side(label, (read_result(Path(side)),)))
    once = seeds > 1 and all(_same(side.results) for side in found)
    if once:
        found = [Side(side.label, side.results[:1]) for side in found]
    table = side_by_side(found, stage=stage)
    ranked = None
    if routers:
        places = ranking.rank(found)
        ranked = RankedRouters(places, ranking.reasons(found, places), sent)
    return Comparison(table, tuple(found), ranked, stage, once)


def _of_seeds(
    scenario: Scenario, seeds: int, request_rate: float | None, num_requests: int, pool: Parallel
) -> tuple[Document, ...]:
    """The result of each seed; where the first two are the same, nothing in it is random, and all are."""

    def of(numbers: range) -> list[Document]:
        load = {"request_rate": request_rate, "num_requests": num_requests}
        return list(pool(delayed(_result)(scenario, seed=seed, **load) for seed in numbers))

    first = scenario.seed
    found = of(range(first, first + min(seeds, 2)))
    if len(found) > 1 and _same(found):
        return tuple({**found[0], "seed": seed} for seed in range(first, first + seeds))
    return (*found, *of(range(first + 2, first + seeds)))


def _same(results: Sequence[Document]) -> bool:
    """Whether results do not depend on their seed."""
    return len({to_text({**result, "seed": None}) for result in results}) == 1


def _result(scenario: Scenario, **load: Any) -> Document:
    return simulate(scenario, **load).result


def _label(side: Scenario | Path | str) -> str:
    """A file's name; a scenario's, or what was changed in it."""
    if not isinstance(side, Scenario):
        return str(side)
    return ", ".join(f"{field}={value}" for field, value in side.changes.items()) or side.name


def _behind(
    sides: Sequence[Scenario | Path | str], routers: Sequence[str]
) -> tuple[tuple[Scenario, ...], list[str]]:
    """The scenario behind each router, and what the routers are called."""
    if len(sides) != 1 or not isinstance(sides[0], Scenario) or len(routers) < 2:
        where, fix = "--routers", "Write for example SCENARIO --routers round_robin least_outstanding."
        raise InputError("routers are compared on one scenario, at least two of them", where, fix)
    if len(set(routers)) < len(routers):
        raise InputError("a router is named twice", where="--routers", fix="Name each once.")
    found = tuple(sides[0].changed({"fleet.router": file_or_name(name)}) for name in routers)
    for scenario in found:
        scenario.fleet.check()
    if found[0].fleet.size < 2:
        raise InputError("one replica leaves a router no choice", where="--routers", fix="Add --replicas 4.")
    short = [Path(name).stem for name in routers]
    return found, short if len(set(short)) == len(short) else list(routers)
