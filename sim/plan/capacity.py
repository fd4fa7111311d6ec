"""The largest request rate that meets the objectives, the knee, and what binds there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from joblib import Parallel

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Binding, Limits, binding_limit
from servecast.sim.metrics.knee import ends, open_loop_knee
from servecast.sim.metrics.metrics import duration
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.prober import WARMUP_SHARE, WINDOW_IN_E2E, Probe, ProbedRate, Prober
from servecast.sim.plan.search import readable, search

Progress = Callable[[float, str, float], None]
PlanState = Literal["found", "inconclusive", "infeasible", "unbounded"]
CLOSER = 3  # at most so many halvings of a bracket beyond the tolerance
ALONE = 0.05  # mean requests in flight below which a request has the server to itself


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search found. Rates are requests/s for the whole simulated deployment.

    state: "found" (what passes and what fails are within the tolerance); "inconclusive" (they are not, as
    rates between them are undecided, or nothing was confirmed); "infeasible" (even a lone request misses);
    "unbounded" (holds up to the largest rate tried). max_request_rate: the largest rate that passes.
    interval: it, and the smallest rate that fails (None: none did). knee: the largest rate that is sustained,
    whatever its latency, None if not reached. probes: rising by rate. replicas: deployments like this one for
    target_rate, with traffic split evenly. headroom: what so many carry, over target_rate: 1.02 leaves 2 %.
    cost_per_million_output_tokens: at max_request_rate, in the currency of hour_cost. notes: what to keep in
    mind.
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
    target_rate: float | None = None
    headroom: float | None = None
    replicas: int | None = None
    cost_per_million_output_tokens: float | None = None
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
        result = asdict(self)
        binding = result.pop("binding")
        objectives = result.pop("objectives")
        result["objectives"] = {
            "slos": [str(slo) for slo in self.objectives.slos],
            "goodput": None if self.objectives.goodput is None else str(self.objectives.goodput),
            "attainment": objectives["attainment"],
        }
        result["binding_limit"], result["binding_evidence"] = binding["limit"], list(binding["reasons"])
        plain: dict[str, Any] = _plain(result)
        return plain


_BURST = 400  # requests sent at once, to see roughly what can be served
_BURST_RATE = 1e5


def first_guess(probe: Probe, seed: int) -> float:
    """Half the rate at which a burst is served, in requests/s: a ``start_rate`` that mostly passes."""
    run = probe(_BURST_RATE, seed, _BURST)
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
    target_rate: float | None = None,
    hour_cost: float | None = None,
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
        target_rate: for headroom and replicas. hour_cost: of all GPUs of the deployment, for the cost of
            tokens.
        progress: called with (rate, "running" or the rate's state, share of the work done).

    Raises:
        InputError: an argument out of its range, or what the probe raises.
    """
    for name, value in (("start_rate", start_rate), ("max_rate", max_rate), ("target_rate", target_rate)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(
                f"{value:g} is not positive and finite", where=name, fix="Give a positive number."
            )
    if hour_cost is not None and not 0 <= hour_cost < math.inf:
        raise InputError(f"{hour_cost:g} is no cost", where="hour_cost", fix="Give 0 or more.")
    with Parallel(n_jobs=effort.jobs) as pool:
        prober = Prober(probe, objectives, limits, seed, effort, pool)
        _Boundaries(prober, max_rate, progress).find(start_rate)
    probes, found = prober.probes, _Answer.of(prober.probes)
    best, miss, fail = found.best, found.miss, found.fail
    rate = best.rate if best is not None else None
    replicas = math.ceil(target_rate / rate) if rate is not None and target_rate is not None else None
    return Plan(
        state=found.state(effort.tolerance),
        max_request_rate=rate,
        interval=(rate, fail.rate if fail else None),
        knee=open_loop_knee([probe.rate for probe in probes], [probe.saturated for probe in probes]),
        binding=_binding(fail or miss, limits),
        probes=probes,
        objectives=objectives,
        confidence=effort.confidence,
        tolerance=effort.tolerance,
        seed=seed,
        target_rate=target_rate,
        headroom=None if rate is None or not replicas or not target_rate else replicas * rate / target_rate,
        replicas=replicas,
        cost_per_million_output_tokens=(
            hour_cost / 3600 / best.output_throughput * 1e6
            if best is not None and hour_cost is not None and best.output_throughput > 0
            else None
        ),
        notes=_notes(found, target_rate, effort.tolerance),
    )


def _passes(probe: ProbedRate) -> bool:
    return probe.state == "pass"


def _does_not_fail(probe: ProbedRate) -> bool:
    return probe.state != "fail"


@dataclass(frozen=True, slots=True)
class _Answer:
    """best: the largest rate that passes, with none below it that does not. miss: the smallest that does not
    pass. fail: the smallest that fails."""

    best: ProbedRate | None
    miss: ProbedRate | None
    fail: ProbedRate | None

    @classmethod
    def of(cls, probes: Sequence[ProbedRate]) -> _Answer:
        """Read off probes that rise by rate."""
        miss = next((probe for probe in probes if probe.state != "pass"), None)
        fail = next((probe for probe in probes if probe.state == "fail"), None)
        best = next((probe for probe in reversed(probes) if miss is None or probe.rate < miss.rate), None)
        return cls(best, miss, fail)

    def state(self, tolerance: float) -> PlanState:
        if self.miss is None:
            return "unbounded"
        if self.best is None:
            return "infeasible" if self.miss.state == "fail" else "inconclusive"
        if self.fail is None:
            return "inconclusive"
        low, high = self.best.rate, self.fail.rate
        between = low < readable(math.sqrt(low * high)) < high
        return "inconclusive" if between and high > low * (1 + tolerance) else "found"


@dataclass(slots=True)
class _Boundaries:
    """Finds where rates stop to pass, begin to fail, and saturate: each from what is known of the others."""

    prober: Prober
    max_rate: float
    progress: Progress | None
    _done: float = 0.0

    def find(self, start_rate: float) -> None:
        """All three, from a first guess."""
        halvings = self._halvings(1.0, 2.0)
        self._find(_passes, later=2 * halvings, first=min(start_rate, self.max_rate))
        if self.prober.probes[0].state == "pass":
            self._find(_does_not_fail, later=halvings)
            self._close_in(later=halvings)
        self._find(lambda probe: not probe.saturated, knee=True)

    def _close_in(self, *, later: int) -> None:
        """Look closer at both sides of undecided rates that are themselves within the tolerance."""
        tolerance = self.prober.effort.tolerance
        for holds in (_passes, _does_not_fail) * CLOSER:
            found = _Answer.of(self.prober.probes)
            if found.best is None or found.fail is None or found.state(tolerance) == "found":
                return
            low, high = found.best.rate, found.fail.rate
            undecided = [rate for rate in self.prober.found if low < rate < high]
            near = math.sqrt((1 + tolerance) * min(undecided) / max(undecided))
            if near < (1 + tolerance) ** 0.5**CLOSER:
                return
            self._find(holds, near=near, later=later)

    def _find(
        self,
        holds: Callable[[ProbedRate], bool],
        *,
        first: float | None = None,
        near: float | None = None,
        later: int = 0,
        knee: bool = False,
    ) -> None:
        """Bracket the smallest rate that does not hold.

        Args:
            first: guess of the first boundary, which is looked for downwards, too, until a request has the
                server to itself; the others lie above. near: see `search`; 1 + the tolerance without it.
            later: probes that are expected after this boundary. knee: see `Prober.at`.
        """
        tried = {probe.rate: holds(probe) for probe in self.prober.probes}

        def report(rate: float, state: str) -> None:
            if self.progress is not None:
                known = len(self.prober.found)
                left = self._halvings(*ends(tried)) + later
                self._done = max(self._done, known / (known + left) if known else 0.0)
                self.progress(rate, state, self._done)

        def at(rate: float) -> bool | None:
            if tried and rate < min(tried):
                lowest = self.prober.found[min(tried)]
                if first is None or lowest.rate * lowest.e2e_s <= ALONE:
                    return None
            report(rate, "running")
            probe = self.prober.at(rate, knee=knee)
            tried[rate] = holds(probe)
            report(rate, probe.state)
            return tried[rate]

        search(
            at,
            () if first is None else (readable(first),),
            tried,
            near=near or 1 + self.prober.effort.tolerance,
            most=self.max_rate,
            rounded=readable,
        )

    def _halvings(self, low: float, high: float) -> int:
        """Probes until a bracket is narrow; of one that has an open end, as if it were a doubling."""
        ratio = high / low if low and math.isfinite(high) else 2.0
        return max(0, math.ceil(math.log2(math.log(ratio) / math.log1p(self.prober.effort.tolerance))))


def _binding(miss: ProbedRate | None, limits: Limits | None) -> Binding:
    """Read at the smallest rate that fails, next to the answer."""
    if miss is None:
        return Binding("none", ("every rate that was tried passes",))
    if limits is None or miss.evidence is None:
        return Binding("unknown", ("the limits of the engine were not given, or its steps not recorded",))
    missed = [verdict.objective for verdict in miss.verdicts if verdict.state != "pass"]
    token_times = not miss.saturated and all(name.startswith(("tpot", "itl")) for name in missed)
    return binding_limit(miss.evidence, limits, only_token_times=token_times)


def _notes(found: _Answer, target_rate: float | None, tolerance: float) -> tuple[str, ...]:
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
        if target_rate is not None:
            notes.append("replicas assume that traffic is split evenly between them")
    return tuple(notes)


def _plain(value: Any) -> Any:
    """Containers to lists and dicts, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
