"""A day: load, latency and what is good by the hour, what replicas it takes when, and what an autoscaler
makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from servecast.sim.engine.request import Requests, Stage, Stream
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import good_requests, percentiles, samples
from servecast.sim.metrics.periods import by_period, split
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.plan.judge import ATTAINMENT, Objectives, observed
from servecast.sim.plan.search import fewest
from servecast.sim.report.answer import Answer
from servecast.sim.report.drawing import SERIES, drawn, picture
from servecast.sim.report.page import Plot, write_plain_page
from servecast.sim.report.text import plain, table
from servecast.sim.run.results import context
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOUR_S = 3600.0
WARMUP_SHARE = 0.2  # of a sample's requests
MOST_REPLICAS = 512  # that a size is looked for among
_COLUMNS = {  # of a table by the hour: header, key
    "from": "from",
    "req/s": "request_rate",
    "out tok/s": "output_tokens_per_s",
    "TTFT p50 ms": "median_ttft_ms",
    "p95 ms": "p95_ttft_ms",
    "TPOT p95": "p95_tpot_ms",
    "good": "good",
    "running": "running",
    "waiting": "waiting",
    "KV": "kv_usage",
    "replicas": "replicas",
}


@dataclass(frozen=True, slots=True)
class FleetDay:
    """What one fleet made of the day.

    hours: see ``by_period``, and hour, met (whether the period keeps the objectives). totals: requests, good,
    failed, p95_ttft_ms, periods_met, mean and peak replicas, gpu_hours, cost. changes: (s, replicas asked
    for).
    """

    name: str
    hours: pd.DataFrame
    totals: Mapping[str, Any]
    changes: tuple[tuple[float, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = self.hours.to_dict("records")
        return {
            "fleet": self.name,
            "totals": dict(self.totals),
            "periods": rows,
            "replicas_asked": list(self.changes),
        }


@dataclass(frozen=True, slots=True, repr=False)
class Day(Answer):
    """A day of traffic on one fleet or several.

    sizes: of each period the fewest replicas that keep the objectives, None where that was not asked.
    """

    fleets: tuple[FleetDay, ...]
    objectives: str
    sizes: tuple[int | None, ...] | None
    period_s: float
    document: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fleets, and what produced them."""
        rest = {"objectives": self.objectives, "period_s": self.period_s, "replicas_needed": self.sizes}
        return {**self.document, **rest, "fleets": [fleet.to_json() for fleet in self.fleets]}

    def to_text(self) -> str:
        """Each fleet by the hour, and where there are several, side by side."""
        parts = []
        for fleet in self.fleets:
            hours = fleet.hours
            if self.sizes is not None:
                hours = hours.assign(needed=pd.Series(self.sizes, dtype=object))
            columns = _COLUMNS | ({"needed": "needed"} if self.sizes is not None else {})
            told = [row | {"from": _clock(row["start_s"])} for row in hours.to_dict("records")]
            rows = [[plain(row[key]) for key in columns.values()] for row in told]
            parts.append(table(list(columns), rows, title=fleet.name) + "\n")
        names = list(self.fleets[0].totals)
        rows = [[fleet.name, *(plain(fleet.totals[name]) for name in names)] for fleet in self.fleets]
        parts.append(table(["fleet", *(name.replace("_", " ") for name in names)], rows))
        parts.append(f"good: {self.objectives}")
        return "\n".join([*parts, *(f"note: {note}" for note in self.document["notes"])])

    def plot(self) -> Figure:
        """Load, replicas, TTFT and what is good, over the day."""
        return drawn(4, self._draw)

    def to_html(self, path: Path | str) -> Path:
        """Write the plots and the tables as a page."""
        svg = picture("day", "Load, replicas, TTFT and good requests over the day", 4, self._draw)
        plot = Plot("Over the day", svg, wide=True)
        title = f"A day of {self.document['model_id']} on {self.document['gpu']}"
        subtitle = f"{self.fleets[0].totals['requests']:,} requests; good: {self.objectives}"
        return write_plain_page(path, title=title, subtitle=subtitle, plots=[plot], text=self.to_text())

    def _draw(self, axes: Sequence[Axes]) -> None:
        load, replicas, ttft, good = axes
        for fleet, color in zip(self.fleets, SERIES * 9, strict=False):
            at = fleet.hours["hour"].to_numpy()
            for ax, name, scale in ((ttft, "p95_ttft_ms", 1e-3), (good, "good", 100.0)):
                ax.plot(
                    at, fleet.hours[name].to_numpy(dtype=float) * scale, color=color, drawstyle="steps-post"
                )
            when, asked = np.array(
                [*fleet.changes, (at[-1] * HOUR_S + self.period_s, fleet.changes[-1][1])]
            ).T
            replicas.plot(when / HOUR_S, asked, color=color, label=fleet.name, drawstyle="steps-post")
        first = self.fleets[0].hours
        load.plot(first["hour"], first["request_rate"], color=SERIES[0], drawstyle="steps-post")
        replicas.legend(loc="upper left")
        titles = {
            "Load": "requests/s",
            "Replicas asked for": "replicas",
            "TTFT, p95": "s",
            "Good requests": "%",
        }
        for ax, (title, unit) in zip(axes, titles.items(), strict=True):
            ax.set(title=title, ylabel=unit, xlabel="hour", xlim=(0, None), ylim=(0, None))


def day(
    scenario: Scenario,
    fleets: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    slo: Sequence[str] = (),
    period_s: float = HOUR_S,
    sample_s: float | None = None,
    size: bool = False,
    seed: int | None = None,
) -> Day:
    """Run a scenario's traffic from its beginning to its end, and tell it by the hour.

    Args:
        fleets: changes of the scenario (dotted fields) by name, which see the same traffic; without, its own
            fleet.
        slo: objectives as ``ttft:p95:500``, in place of the scenario's. A request is good that keeps all
            their limits (or the scenario's goodput).
        period_s: of a row.
        sample_s: simulate only so much of the beginning of each period, each from empty servers (the first
            fifth of its requests is not counted); not with an autoscaler, which has a memory.
        size: look in each period, in such a sample (600 s unless given), for the fewest replicas that keep
            the objectives.

    Raises:
        InputError: there is no objective, the workload has several stages or waits for answers where a sample
            is wanted, or a fleet cannot be made.
    """
    if not (period_s > 0 and (sample_s is None or 0 < sample_s <= period_s)):
        what = f"periods of {period_s:g} s and samples of {sample_s} s"
        raise InputError(what, where="--period", fix="Give a period above 0, and a sample that is no longer.")
    objectives = Objectives(tuple(SLO.parse(text) for text in slo)) if slo else Objectives.of(scenario)
    limits = _limits(objectives)
    if objectives is not None and any(each.metric == "itl" for each in objectives.slos):
        what = "an objective of single times between tokens, which a day does not keep"
        raise InputError(what, where="--slo", fix="Give one of tpot.")
    workload = scenario.stages()
    if len(workload.stages) != 1:
        fix = "Give one stage: a trace, or arrivals of kind profile."
        raise InputError("a day of several stages", where=f"{scenario.source}: workload.stages", fix=fix)
    seed = scenario.seed if seed is None else seed
    stages = draw(workload, seed)
    found, document, notes = [], None, []
    for name, changes in (fleets or {"the scenario's fleet": {}}).items():
        own = scenario.changed(changes) if changes else scenario
        deployment = Deployment.of(own)
        if document is None:
            document = context(deployment, seed=seed)
        if sample_s is not None and own.fleet.autoscaler is not None:
            what = f"an autoscaler ({name}) in samples of a day, each of which starts anew"
            raise InputError(what, where="--sample", fix="Leave it out, or give a fixed number of replicas.")
        if sample_s is None:
            run = simulate(deployment, seed=seed, workload=workload, condensed_s=min(60.0, period_s))
            found.append(_of_run(name, own, run, objectives, limits, period_s))
        else:
            found.append(_of_samples(name, own, deployment, stages, objectives, limits, (period_s, sample_s)))
    assert document is not None
    sizes = None
    if size:
        if objectives is None:
            raise InputError("no objective to size for", where="--slo", fix="Give one, as ttft:p95:500.")
        looked_s = min(sample_s or 600.0, period_s)
        sizes = tuple(_sizes(scenario, stages, objectives, (period_s, looked_s)))
        notes.append(
            f"needed: the fewest replicas that keep the objectives in the first {looked_s:g} s of each "
            "period, from empty servers, by one seed"
        )
    if sample_s is not None:
        notes.append(f"sampled: the first {sample_s:g} s of each period, each from empty servers")
    document["notes"] = [*document["notes"], *notes]
    told = "all that finish" if limits is None else str(limits)
    return Day(tuple(found), told, sizes, period_s, document)


def _limits(objectives: Objectives | None) -> Goodput | None:
    """What a good request keeps: the limits of the objectives on single requests."""
    if objectives is None:
        return None
    if objectives.goodput is not None:
        return objectives.goodput
    each = {slo.metric: slo.limit_ms for slo in objectives.slos if slo.metric in ("ttft", "tpot", "e2el")}
    return Goodput.parse(" ".join(f"{name}:{limit:g}" for name, limit in each.items())) if each else None


def _met(part: Run, objectives: Objectives | None) -> bool | None:
    """Whether the requests keep the objectives, as they stand."""
    if objectives is None or not len(part.requests):
        return None
    seen = observed(part, objectives)
    kept = all(value <= slo.limit_ms for value, slo in zip(seen.values_ms, objectives.slos, strict=True))
    return kept and (objectives.goodput is None or seen.good >= ATTAINMENT * seen.requests)


def _lives(run: Run, end_s: float) -> list[tuple[float, float]]:
    """From when each replica is paid for, and until when: a drained one has its last requests to finish."""
    last = run.requests.groupby("replica")["finish"].max()
    found = []
    for life in run.meta["lives"]:
        end = end_s
        if life.drain_s is not None:
            end = max(life.drain_s, float(last.get(life.replica, 0.0) or 0.0))
        found.append((life.ordered_s, min(end, max(end_s, life.ordered_s))))
    return found


def _of_run(
    name: str, own: Scenario, run: Run, objectives: Objectives | None, limits: Goodput | None, period_s: float
) -> FleetDay:
    """A fleet's day, from the run of all of it."""
    end_s = (int(run.requests["arrival"].max() // period_s) + 1) * period_s
    lives = _lives(run, end_s)
    parts = split(run, period_s, end_s)
    hours, met = by_period(run, parts, limits, lives, period_s), [_met(each, objectives) for each in parts]
    changes: dict[float, int] = {}
    for life in run.meta["lives"]:
        changes[life.ordered_s] = changes.get(life.ordered_s, 0) + 1
        if life.drain_s is not None:
            changes[life.drain_s] = changes.get(life.drain_s, 0) - 1
    asked = np.cumsum([changes[at] for at in sorted(changes)]).tolist()
    return _told(
        name, own, hours, met, run, limits, tuple(zip(sorted(changes), asked, strict=True)), period_s
    )


def _told(
    name: str,
    own: Scenario,
    hours: pd.DataFrame,
    met: Sequence[bool | None],
    run: Run,
    limits: Goodput | None,
    changes: tuple[tuple[float, int], ...],
    period_s: float,
) -> FleetDay:
    hours = hours.assign(hour=hours["start_s"] / HOUR_S, met=pd.Series(met, dtype=object))
    requests = run.requests
    gpus = own.engine.gpus
    gpu_hours = float(hours["replicas"].sum()) * period_s / HOUR_S * gpus
    known = [each for each in met if each is not None]
    totals = {
        "requests": len(requests),
        "good": None if limits is None else good_requests(run, limits) / max(len(requests), 1),
        "periods_met": f"{sum(known)} of {len(known)}" if known else None,
        "p95_ttft_ms": percentiles(samples(run, "ttft")[0], (95,))[0] * 1000,
        "failed": int(requests["status"].isin(("failed", "aborted")).sum()),
        "replicas": float(hours["replicas"].mean()),
        "most": max(asked for _, asked in changes),
        "GPU_hours": gpu_hours,
        "cost": None if own.gpu_price is None else gpu_hours * own.gpu_price,
    }
    return FleetDay(name, hours, totals, changes)


def _samples(stages: Sequence[Stage], period_s: float, sample_s: float) -> list[list[Stage] | None]:
    """Of each period the requests of its first seconds, from 0 on; None where there are none."""
    rows = [Requests.of(stream.requests) for stream in stages[0].streams]
    if any(type(stream) is not Stream or stream.until_s is not None for stream in stages[0].streams):
        fix = "Leave --sample and --size out: sessions and closed loops are simulated whole."
        raise InputError("samples of traffic that waits for answers", where="--sample", fix=fix)
    last = max((float(each.arrival_s.max(initial=0.0)) for each in rows), default=0.0)
    found: list[list[Stage] | None] = []
    for number in range(int(last // period_s) + 1):
        begin = number * period_s
        streams = []
        for stream, requests in zip(stages[0].streams, rows, strict=True):
            inside = (requests.arrival_s >= begin) & (requests.arrival_s < begin + sample_s)
            taken = requests.take(np.flatnonzero(inside))
            taken.arrival_s = taken.arrival_s - begin
            streams.append(Stream(stream.name, taken, stream.max_concurrency, stream.background))
        found.append([Stage("all", streams)] if any(len(each.requests) for each in streams) else None)
    return found


def _counted(run: Run) -> Run:
    """Without the first fifth of the requests, which find empty servers."""
    rows = run.requests.sort_values("arrival", kind="stable")
    return Run(rows.iloc[int(WARMUP_SHARE * len(rows)) :], run.steps, run.itl, run.stages, run.meta)


def _of_samples(
    name: str,
    own: Scenario,
    deployment: Deployment,
    stages: Sequence[Stage],
    objectives: Objectives | None,
    limits: Goodput | None,
    spans: tuple[float, float],
) -> FleetDay:
    """A fleet's day, from the beginning of each period."""
    period_s, sample_s = spans
    hours, parts = list[pd.DataFrame](), list[pd.DataFrame]()
    met: list[bool | None] = []
    for number, sample in enumerate(_samples(stages, period_s, sample_s)):
        if sample is None:
            hours.append(pd.DataFrame([{"start_s": number * period_s, "requests": 0, "request_rate": 0.0}]))
            met.append(None)
            continue
        part = _counted(simulate(deployment, stages=sample))
        met.append(_met(part, objectives))
        lives = [(0.0, sample_s)] * own.fleet.size
        row = by_period(part, split(part, sample_s), limits, lives, sample_s).iloc[:1]
        rate = sum(len(stream.requests) for stream in sample[0].streams) / sample_s
        hours.append(row.assign(start_s=number * period_s, request_rate=rate))
        parts.append(part.requests)
    whole = Run(pd.concat(parts), part.steps, part.itl, ["all"], {})
    table = pd.concat(hours, ignore_index=True).assign(replicas=float(own.fleet.size))
    return _told(name, own, table, met, whole, limits, ((0.0, own.fleet.size),), period_s)


def _sizes(
    scenario: Scenario, stages: Sequence[Stage], objectives: Objectives, spans: tuple[float, float]
) -> list[int | None]:
    """Of each period the fewest replicas that keep the objectives: from those of the period before, up or
    down by doubling steps, then by halves. None where none of `MOST_REPLICAS` do."""
    deployments: dict[int, Deployment] = {}

    def misses(sample: list[Stage], replicas: int) -> bool:
        if replicas not in deployments:
            changes = {"fleet.replicas": replicas, "fleet.autoscaler": None}
            deployments[replicas] = Deployment.of(scenario.changed(changes))
        return not _met(_counted(simulate(deployments[replicas], stages=sample)), objectives)

    found: list[int | None] = []
    guess = 1
    for sample in _samples(stages, *spans):
        size = 0 if sample is None else fewest(partial(misses, sample), guess, MOST_REPLICAS)
        found.append(size)
        guess = size or guess
    return found


def _clock(seconds: float) -> str:
    """Hours and minutes, and seconds where it is not whole minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}" + (f":{rest:02d}" if rest else "")
