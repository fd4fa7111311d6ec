"""The planner: the largest request rate that meets the SLOs, and what is asked next.

How sure is it, what binds there, do the prefixes fit, how many replicas serve a given rate, what does a
token cost, and what would another value of an assumption change?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from servecast.sim.hardware.error_band import Bands
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Binding
from servecast.sim.metrics.records import Run
from servecast.sim.plan import capacity, closed_loop, fleet_size
from servecast.sim.plan import sensitivity as assumed
from servecast.sim.plan.boundaries import PlanState
from servecast.sim.plan.break_even import BreakEven, break_even
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.figures import draw_latency
from servecast.sim.plan.judge import ATTAINMENT, Objectives
from servecast.sim.plan.page import PageContext, write_plan_page
from servecast.sim.plan.prefix_slots import PrefixSlots, prefix_slots
from servecast.sim.plan.size import Size, Unit, check_target
from servecast.sim.plan.traffic import Traffic
from servecast.sim.report.answer import Answer
from servecast.sim.report.drawing import drawn
from servecast.sim.report.progress import progress_bar
from servecast.sim.report.text import cell_text, counted, table
from servecast.sim.run.loading import loading_text
from servecast.sim.run.results import cautions, context, engine_lines
from servecast.sim.run.simulate import RateProbe
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import with_request_rate
from servecast.sim.traffic.trace_notes import trace_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SEEN = (  # at a rate, besides the objectives
    *("output_throughput", "completion_ratio", "saturated", "kv_peak", "max_running", "max_waiting"),
    "preemptions",
)


@dataclass(frozen=True, slots=True, repr=False)
class PlanAnswer(Answer):
    """The largest request rate, and what it rests on.

    Attributes:
        found: what the search found, with all probed rates as objects.
        context: what produced the answer: engine, GPU, profile, what-ifs, assumptions, provenance, ...
        run: one replication at the answer.
        levels: the scenario's own closed-loop sweep; empty where it has none.
        prefix_slots: whether the shared prefixes fit, None without any.
        fleet_size: how many replicas serve the target rate, None unless asked.
        sensitivity: what the assumptions are worth, None unless asked.
        traffic: that was planned for. speculation: when it pays; None without any.
        unit: the replicas, GPUs and price of what was planned.
        target_rate: to serve, requests/s; None unless asked.
        margin: kept in hand for the error band of the largest rate, a share of the target rate.
        served_name: what the model is called.
    """

    found: capacity.Plan
    context: dict[str, Any]
    run: Run
    levels: tuple[closed_loop.SweepPoint, ...] = ()
    prefix_slots: PrefixSlots | None = None
    fleet_size: fleet_size.FleetSize | None = None
    sensitivity: tuple[assumed.Sensitivity, ...] | None = None
    traffic: Traffic | None = None
    unit: Unit | None = None
    target_rate: float | None = None
    margin: float | None = None
    served_name: str = ""
    speculation: BreakEven | None = None

    @property
    def max_request_rate(self) -> float | None:
        """The largest rate that passes, in requests/s; None if none does."""
        return self.found.max_request_rate

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """It, and the smallest rate that fails (None: none did)."""
        return self.found.interval

    @property
    def state(self) -> PlanState:
        """ "found", "inconclusive", "infeasible" (no rate passes) or "unbounded" (every one does)."""
        return self.found.state

    @property
    def binding(self) -> Binding:
        """What keeps it from more, with the evidence."""
        return self.found.binding

    @property
    def knee(self) -> dict[str, float | int | None]:
        """The largest sustained "request_rate", and the "concurrency" of the scenario's closed-loop sweep."""
        return {"request_rate": self.found.knee, "concurrency": closed_loop.knee(self.levels)}

    @property
    def error_band(self) -> float | None:
        """Relative error band of token times, None where it is not known; see ``bands``."""
        band: float | None = self.context["error_band"]
        return band

    @property
    def bands(self) -> Bands:
        """Relative error bands by metric, that of the largest rate among them."""
        return Bands(**self.context["error_bands"])

    @property
    def provenance(self) -> dict[str, Any]:
        """What the prediction rests on: its basis, profile, parameters, memory."""
        provenance: dict[str, Any] = self.context["provenance"]
        return provenance

    @property
    def probes(self) -> pd.DataFrame:
        """A row a probed rate: its state, each objective's value, and what was seen there."""
        return pd.DataFrame(
            {
                "request_rate": probe.rate,
                "state": probe.state,
                **{verdict.objective: verdict.value.estimate for verdict in probe.verdicts},
                **{name: getattr(probe, name) for name in _SEEN},
                "reasons": "; ".join(probe.reasons),
            }
            for probe in self.found.probes
        )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What serves the target rate: at face value, and with the margin. Without a target rate the one
        unit that serves the largest rate; empty where no rate passes."""
        rate, target, margin = self.max_request_rate, self.target_rate, self.margin
        if rate is None or self.traffic is None or self.unit is None:
            return ()
        margins = (0.0,) if target is None or not margin else (0.0, margin)
        return tuple(Size(target or rate, each, rate, self.unit, self.traffic) for each in margins)

    @property
    def exit_code(self) -> int:
        """0: answered; 1: no rate meets the objectives; 3: inconclusive."""
        return self.found.exit_code

    def to_json(self) -> dict[str, Any]:
        """The context, and the answer with its evidence."""
        document = self.context | self.found.to_json()
        document["slo"] = document["objectives"]["slos"]
        document["knee"] = self.knee
        document["notes"] = self.context["notes"]
        changes, slots, size = self.sensitivity, self.prefix_slots, self.fleet_size
        document["sensitivity"] = None if changes is None else [each.to_json() for each in changes]
        document["prefix_slots"] = None if slots is None else slots.to_json()
        document["fleet_size"] = None if size is None else size.to_json()
        document |= {} if self.speculation is None else {"speculation": self.speculation.to_json()}
        document["target_rate"] = self.target_rate
        document["sizes"] = [each.to_json() for each in self.sizes]
        return document

    def to_text(self) -> str:
        """The probed rates, the answer, and what it rests on."""
        found = self.found
        lines = [_probes_text(found), "", *_answer_lines(found)]
        knee = self.knee
        level = "" if knee["concurrency"] is None else f"; closed loop: concurrency {knee['concurrency']}"
        lines.append(f"Knee: {cell_text(knee['request_rate'])} requests/s{level}")
        lines += self._size_lines()
        if self.fleet_size is not None:
            lines.append(self.fleet_size.to_text())
        if self.prefix_slots is not None:
            lines.append(f"Prefix slots at {(found.best or found.probes[0]).rate:g} requests/s:")
            lines += [f"  {line}" for line in self.prefix_slots.to_text().splitlines()]
        if self.speculation is not None:
            lines.append(self.speculation.to_text())
        if self.sensitivity:
            lines += [_sensitivity_text(self.sensitivity), ""]
        basis, profile = self.provenance["basis"], self.provenance["profile"]
        lines.append(f"Rests on: {basis}; profile {profile}; seed {found.seed}")
        lines.append(f"Error bands: {self.bands.to_text()}")
        lines += engine_lines(self.context)
        if "kv_offload" in self.context:
            lines.append(loading_text(self.context["kv_offload"]["break_even"]))
        return "\n".join([*lines, *(f"note: {note}" for note in self.context["notes"])])

    def _size_lines(self) -> list[str]:
        """What serves the target rate, and what it costs."""
        if not self.sizes:
            return []
        lines, (first, *more) = list[str](), self.sizes
        if self.target_rate is not None:
            lines.append(f"For {self.target_rate:g} requests/s: {first.to_text()}")
        for size in more:
            guess = "?" if "max_rate" in self.bands.guessed and size.margin == self.bands.max_rate else ""
            lines.append(f"  with {size.margin:.0%}{guess} in hand for the error band: {size.to_text()}")
        tokens = self.sizes[-1].tokens_text()
        return lines if tokens is None else [*lines, tokens]

    def to_html(self, path: Path | str, *, date: str | None = None) -> Path:
        """Write the page of the plan, with its plots; see `Answer.to_html`. date: to put on it."""
        return write_plan_page(
            path,
            self.found,
            context=self._page_context(date),
            run=self.run,
            sweep=self.levels,
            loading=self.context.get("kv_offload", {}).get("break_even"),
            speculation=self.speculation,
        )

    def plot(self) -> Figure:
        """Each objective against the request rate, with its limit, the answer and the knee."""
        return drawn(len(self.found.probes[0].verdicts), lambda axes: draw_latency(self.found, axes))

    def _page_context(self, date: str | None) -> PageContext:
        made, objectives, unit, traffic = self.context, self.found.objectives, self.unit, self.traffic
        name = self.served_name or made["model_id"]
        on = made["gpu"] if unit is None else f"{unit.gpus} {made['gpu']}"
        facts = {
            f"For {size.target_rate:g} requests/s{f', with {size.margin:.0%} in hand' * bool(size.margin)}": (
                f"{counted(size.replicas, 'replica')}, {counted(size.gpus, 'GPU')}"
                + ("" if size.month_cost is None else f", {size.month_cost:,.0f} a month")
            )
            for size in (self.sizes if self.target_rate is not None else ())
        }
        if self.sizes and traffic is not None:
            cost = self.sizes[-1].million(traffic.prompt_tokens + traffic.output_tokens)
            facts |= {} if cost is None else {"A million tokens, in and out": f"{cost:.3g}"}
        return PageContext(
            title=f"{name} on {on}",
            question=f"How many requests a second can it serve at {objectives}?",
            subtitle=[
                *([] if traffic is None else [f"Traffic: {traffic.to_text()}."]),
                *(engine_lines(made) if "pools" in made else engine_lines(made)[-1:]),
                f"Scenario {made['scenario']}{'' if date is None else f', {date}'}.",
            ],
            facts=facts,
            band=f"Error bands: {self.bands.to_text()}.",
            run_context={
                **(made["run_context"] or {}),
                **{f"what-if: {field}": value for field, value in made["what_if"].items()},
            },
            provenance={
                "basis": self.provenance["basis"],
                "profile": self.provenance["profile"],
                "vLLM rules": made["engine"]["rules"],
                **dict(line.split(": ", 1) for line in engine_lines(made)),
                "seed": made["seed"],
                "servecast": made["servecast_version"],
                **{f"note {number}": note for number, note in enumerate(made["notes"], 1)},
            },
            assumptions=[self._assumption(each) for each in made["assumptions"]],
        )

    def _assumption(self, assumption: dict[str, Any]) -> dict[str, object]:
        """A row, with what 20 % of it changes, as far as that was asked for."""
        row = {"assumed": assumption["name"], "value": assumption["value"], "origin": assumption["origin"]}
        if self.sensitivity is not None:
            row["changes the answer by"] = "; ".join(
                f"{each.scaled:g}: {each.effect}"
                for each in self.sensitivity
                if each.name == assumption["name"]
            )
        return row


def plan(
    scenario: Scenario,
    slo: str | Sequence[str] | None = None,
    *,
    goodput: str | None = None,
    attainment: float = ATTAINMENT,
    target_rate: float | None = None,
    margin: float | None = None,
    size_fleet: bool = False,
    sensitivity: bool = False,
    progress: bool = False,
    **effort: Any,
) -> PlanAnswer:
    """Find the largest request rate that meets the SLOs, what binds there, and the knee.

    Args:
        slo: latency:statistic:milliseconds, as "ttft:p95:500", or several of them. Without this and
            ``goodput`` the scenario's own.
        goodput: what a good request meets, as "ttft:500 tpot:50".
        attainment: share of requests that must be good.
        target_rate: requests/s to serve, for the replicas, GPUs and money that this takes.
        margin: share of the target rate to keep in hand, without it the error band of the largest rate.
        size_fleet: find the fewest replicas behind the scenario's router that serve the target rate. Takes
            longer.
        sensitivity: look at the answer with each assumed constant 20 % lower and higher. Takes longer.
        progress: show how far it is.
        effort: how surely and how closely, as in `Effort`: confidence, tolerance, replications, max_requests,
            and jobs, here one for each core.

    Raises:
        InputError: there is no objective, the scenario cannot be made concrete, or a value is out of range.
    """
    if size_fleet and target_rate is None:
        raise InputError("no rate to size the fleet for", where="--size-fleet", fix="Add --target-rate.")
    if margin is not None and target_rate is None:
        raise InputError("no rate to keep a margin of", where="--margin", fix="Add --target-rate.")
    if target_rate is not None:
        check_target(target_rate, margin or 0.0)
    objectives = Objectives.asked(scenario, slo, goodput, attainment)
    spend = Effort(**{"jobs": -1} | effort)
    probe = RateProbe(scenario)
    seed, deployment = scenario.seed, probe.deployment
    traffic, unit = Traffic.of(scenario), Unit.of(scenario, scenario.gpu_price)
    with progress_bar("plan", shown=progress) as advance:
        advance(0.0, "first look")
        found = capacity.plan(
            probe,
            objectives,
            effort=spend,
            limits=deployment.limits,
            start_rate=capacity.first_guess(probe, seed),
            seed=seed,
            progress=lambda rate, state, share: advance(share, f"{rate:g} requests/s {state}"),
        )
        at = found.best or found.probes[0]
        run = probe(at.rate, seed, at.num_requests)
        made = context(deployment, seed=seed)
        probed = with_request_rate(scenario.open_loop(), at.rate, num_requests=at.num_requests)
        made["notes"] += [*found.notes, *cautions(deployment, run), *trace_notes(probed)]
        if target_rate is not None and found.best is not None:
            made["notes"].append("replicas assume that traffic is split evenly between them")
        slots = (
            None
            if scenario.fleet.prefill
            else prefix_slots(
                scenario.open_loop().stages[0].streams[0],
                run,
                kv_tokens=deployment.config.num_gpu_blocks * deployment.config.block_size,
                replicas=scenario.fleet.size,
            )
        )
        points = closed_loop.sweep_points(scenario)
        answer = PlanAnswer(found, made, run, points, slots, traffic=traffic, unit=unit)
        if traffic is not None and deployment.speculating is not None:
            middle = round(traffic.prompt_tokens + traffic.output_tokens / 2)
            answer = replace(answer, speculation=break_even(deployment, middle))
        band = answer.bands.max_rate if margin is None else margin
        answer = replace(answer, target_rate=target_rate, margin=band, served_name=deployment.served_name)
        if size_fleet and target_rate is not None:
            sized = fleet_size.size_fleet(
                scenario,
                objectives,
                target_rate,
                divided=answer.sizes[0].units if answer.sizes else None,
                effort=spend,
                progress=lambda count: advance(1.0, f"{count} replicas at {target_rate:g} requests/s"),
            )
            answer = replace(answer, fleet_size=sized)
        if sensitivity:
            advance(1.0, "sensitivity to the assumptions")
            best = found.best
            changes = () if best is None else assumed.sensitivity(scenario, best, objectives, spend)
            answer = replace(answer, sensitivity=tuple(changes))
    return answer


def _probes_text(found: capacity.Plan) -> str:
    objectives = [verdict.objective for verdict in found.probes[0].verdicts]
    rows = [
        [
            probe.rate,
            probe.state,
            *(verdict.value.estimate for verdict in probe.verdicts),
            probe.output_throughput,
            "; ".join(probe.reasons),
        ]
        for probe in found.probes
    ]
    return table(["requests/s", "verdict", *objectives, "tok/s", "why not"], rows)


def _answer_lines(found: capacity.Plan) -> list[str]:
    """The largest rate, and what binds there."""
    rate, (low, high) = found.max_request_rate, found.interval
    if rate is None:
        lines = [f"Largest request rate: none ({found.state})"]
    else:
        end = "no rate that was tried fails" if high is None else f"{high:g} fails"
        lines = [
            f"Largest request rate: {rate:g} requests/s",
            f"  {found.state}: {low:g} passes, {end}, with {found.confidence:.0%} confidence",
        ]
    return [*lines, f"What binds: {found.binding.limit}", *(f"  {why}" for why in found.binding.reasons)]


def _sensitivity_text(changes: Sequence[assumed.Sensitivity]) -> str:
    objectives = list(next((each.values for each in changes if each.values), {}))
    rows = [
        [
            each.name,
            each.assumed,
            each.scaled,
            each.effect,
            *(f"{each.values[name]:+.1%}" if name in each.values else None for name in objectives),
        ]
        for each in changes
    ]
    title = "\nWhat the assumptions are worth (change of the answer, and of the objectives at it)"
    return table(["assumed", "value", "instead", "max rate", *objectives], rows, title=title)
