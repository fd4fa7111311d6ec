"""The largest request rate that meets the objectives, the knee, and what binds there."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Binding, Limits, binding_limit
from servecast.sim.metrics.knee import open_loop_knee
from servecast.sim.metrics.metrics import duration
from servecast.sim.plan.boundaries import Boundaries, Found, PlanState, Progress
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.prober import WARMUP_SHARE, WINDOW_IN_E2E, Probe, ProbedRate, Prober
from servecast.sim.report.text import plain


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search found. Rates are requests/s for the whole simulated deployment.

    state: "found" (what passes and what fails are within the tolerance); "inconclusive" (they are not, as
    rates between them are undecided, or nothing was confirmed); "infeasible" (even a lone request misses);
    "unbounded" (holds up to the largest rate tried). max_request_rate: the largest rate that passes.
    interval: it, and the smallest rate that fails (None: none did). knee: the largest rate that is sustained,
    whatever its latency, None if not reached or not looked for. probes: rising by rate. simulated: requests,
    over all runs. notes: what to keep in mind.
    """

    state: PlanState
    max_request_rate: float | None
    interval: tuple[float | None, float | None]
    knee: float | None
    binding: Binding
    probes: tuple[ProbedRate, ...]
    objectives: Objectives
    confidence: float
    tolerance: float
    seed: int
    simulated: int = 0
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> ProbedRate | None:
        """The probe at max_request_rate."""
        return next((probe for probe in self.probes if probe.rate == self.max_request_rate), None)

    @property
    def exit_code(self) -> int:
        """0: answered; 1: no rate meets the objectives; 3: inconclusive."""
        return {"found": 0, "unbounded": 0, "infeasible": 1, "inconclusive": 3}[self.state]

    def to_json(self) -> dict[str, Any]:
        """Plain values, missing ones as None."""
        result = asdict(replace(self, probes=()))
        result["probes"] = [each.to_json() for each in self.probes]
        binding = result.pop("binding")
        objectives = result.pop("objectives")
        result["objectives"] = {
            "slos": [str(slo) for slo in self.objectives.slos],
            "goodput": None if self.objectives.goodput is None else str(self.objectives.goodput),
            "attainment": objectives["attainment"],
        }
        result["binding_limit"], result["binding_evidence"] = binding["limit"], list(binding["reasons"])
        found: dict[str, Any] = plain(result)
        return found


BURST = 400  # requests sent at once, to see roughly what can be served
_BURST_RATE = 1e5


def first_guess(probe: Probe, seed: int) -> float:
    """Half the rate at which a burst is served, in requests/s: a ``start_rate`` that mostly passes."""
    run = probe(_BURST_RATE, seed, BURST)
    rate = len(run.requests) / duration(run) / 2
    return float(f"{rate:.2g}") if rate > 0 else 1.0  # not where every request was aborted


def plan(
    probe: Probe,
    objectives: Objectives,
    *,
    effort: Effort = Effort(),  # noqa: B008 (frozen)
    limits: Limits | None = None,
    start_rate: float = 1.0,
    max_rate: float = 1e5,
    seed: int = 0,
    knee: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Searches the largest request rate at which every objective holds.

    From start_rate the rate is doubled (halved) until one passes and a larger one does not, then the
    bracket is bisected on the logarithm of the rate to 1 + tolerance; in the same way the smallest rate
    that fails and the knee are bracketed, and both sides of undecided rates once more where these alone keep
    what passes and what fails apart. Every rate sees the same seeds (common random numbers). A rate
    that cannot be decided with the first number of replications gets the next, up to the last; each look
    uses the confidence 1 - 2 (1 - confidence) / looks, so that the chance of passing a rate whose
    statistic truly exceeds its limit (or failing one that does not) is at most 1 - confidence over all
    looks together (Bonferroni).

    Args:
        probe: runs one replication; how many requests it gets: `judge.requests_needed`.
        objectives: what must hold. effort: how surely and closely, and over how many processes.
        limits: what could bind; None leaves the binding limit "unknown".
        start_rate: first guess, requests/s. max_rate: where doubling ends.
        knee: whether to look for it.
        progress: called with (rate, "running" or the rate's state, share of the work done).

    Raises:
        InputError: an argument out of its range, or what the probe raises.
    """
    for name, value in (("start_rate", start_rate), ("max_rate", max_rate)):
        if not 0 < value < math.inf:
            what = f"{value:g} is not positive and finite"
            raise InputError(what, where=name, fix="Give a positive number.")
    prober = Prober(probe, objectives, limits, seed, effort)
    Boundaries(prober, max_rate, progress).find(start_rate, knee=knee)
    probes, found = prober.probes, Found.of(prober.probes)
    best, miss, fail = found.best, found.miss, found.fail
    rate = best.rate if best is not None else None
    return Plan(
        state=found.state(effort.tolerance),
        max_request_rate=rate,
        interval=(rate, fail.rate if fail else None),
        knee=open_loop_knee([probe.rate for probe in probes], [probe.saturated for probe in probes]),
        binding=_binding(fail or miss),
        probes=probes,
        objectives=objectives,
        confidence=effort.confidence,
        tolerance=effort.tolerance,
        seed=seed,
        simulated=prober.simulated,
        notes=_notes(found, effort.tolerance),
    )


def _binding(miss: ProbedRate | None) -> Binding:
    """Read at the smallest rate that fails, next to the answer."""
    if miss is None:
        return Binding("none", ("every rate that was tried passes",))
    if miss.evidence is None:
        return Binding("unknown", ("the limits of the engine were not given, or its steps not recorded",))
    missed = [verdict.objective for verdict in miss.verdicts if verdict.state != "pass"]
    token_times = not miss.saturated and all(name.startswith(("tpot", "itl")) for name in missed)
    return binding_limit(miss.evidence, only_token_times=token_times)


def _notes(found: Found, tolerance: float) -> tuple[str, ...]:
    notes, best, fail = [], found.best, found.fail
    if best is not None and found.state(tolerance) == "inconclusive":
        end = f"{fail.rate:g}" if fail is not None else "the largest tried"
        notes.append(
            f"rates between {best.rate:g} and {end} requests/s are undecided, too close to a limit for their "
            "spread: more requests a replication narrow it, a larger tolerance accepts it"
        )
    if best is not None:
        window = best.num_requests * (1 - WARMUP_SHARE) / best.rate / best.e2e_s
        if window < WINDOW_IN_E2E / 2:
            notes.append(f"a replication at the answer counts only {window:.1f} end-to-end latencies")
    return tuple(notes)
