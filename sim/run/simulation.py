"""A scenario run once, as an answer: vLLM's own figures, where they come from, and the tables behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from servecast.sim.hardware.error_band import Bands
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import steady_s, vllm_bench_text
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import lasts, saturation
from servecast.sim.metrics.warmup import Warmup, select
from servecast.sim.report.answer import Answer
from servecast.sim.report.drawing import drawn
from servecast.sim.report.text import facts_text, keyed_table, table
from servecast.sim.run.figures import draw_engine
from servecast.sim.run.results import engine_lines, offload_text, result
from servecast.sim.run.simulate import simulate as run_of
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.arrivals import ClosedLoop
from servecast.sim.traffic.draw import with_request_rate
from servecast.sim.traffic.spec import Workload
from servecast.sim.traffic.trace_notes import trace_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (  # of a table of stages: header, key
    ("stage", "stage"),
    ("done", "completed"),
    ("req/s", "request_throughput"),
    ("tok/s", "output_throughput"),
    ("TTFT p50", "median_ttft_ms"),
    ("p95 ms", "p95_ttft_ms"),
    ("TPOT p50", "median_tpot_ms"),
    ("p95 ms", "p95_tpot_ms"),
    ("ITL p95 ms", "p95_itl_ms"),
    ("E2EL p50", "median_e2el_ms"),
    ("p95 ms", "p95_e2el_ms"),
    ("KV peak", "kv_cache_usage_peak"),
    ("running", "max_num_running"),
    ("waiting", "max_num_waiting"),
)


@dataclass(frozen=True, slots=True, repr=False)
class Simulation(Answer):
    """What a run of a scenario came to.

    Attributes:
        run: what happened: a row a request, a row an engine step, and the times between tokens.
        result: vllm bench serve's keys, with what produced them; ``to_json`` returns it.
    """

    run: Run
    result: dict[str, Any]

    @property
    def requests(self) -> pd.DataFrame:
        """A row a request; times in seconds. Where there are several stages, ``stage_name`` says which."""
        requests, names = self.run.requests, self.run.stages
        return (
            requests.assign(stage_name=requests["stage"].map(dict(enumerate(names))))
            if names[1:]
            else requests
        )

    @property
    def steps(self) -> pd.DataFrame:
        """A row an engine step; times in seconds."""
        return self.run.steps

    @property
    def error_band(self) -> float | None:
        """Relative error band of token times, None where it is not known; see ``bands``."""
        band: float | None = self.result["error_band"]
        return band

    @property
    def bands(self) -> Bands:
        """Relative error bands by metric."""
        return Bands(**self.result["error_bands"])

    @property
    def provenance(self) -> dict[str, Any]:
        """What the prediction rests on."""
        provenance: dict[str, Any] = self.result["provenance"]
        return provenance

    def to_json(self) -> dict[str, Any]:
        """The result."""
        return self.result

    def to_text(self) -> str:
        """What vllm bench serve prints (a row a stage where there are several), the run context of the
        benchmark that the scenario describes, and what the prediction rests on."""
        result = self.result
        parts = [_stages_text(result["stages"]) if result["stages"] else vllm_bench_text(result)]
        if "sessions" in result:
            parts.append(sessions_text(result["sessions"]))
        if "link_busy" in result.get("kv_offload", {}):
            parts.append(offload_text(result["kv_offload"]))
        if "mm_cache_queries" in result:
            parts.append(facts_text("\nImages", _of_images(result)))
        if "fleet_load" in result:
            parts.append(replicas_text(result["fleet_load"]["replicas"]))
            parts += [pools_text(result["fleet_load"]["pools"])] if "pools" in result["fleet_load"] else []
        if "ranks" in result:
            parts.append(replicas_text(result["ranks"], title="\nRanks"))
        if result["run_context"]:
            said = {name: value for name, value in result["run_context"].items() if value is not None}
            parts.append(facts_text("\nRun context of the benchmark", said))
        if result["what_if"]:
            parts.append(facts_text("\nWhat-if", result["what_if"]))
        parts.append(facts_text("\nWhat the prediction rests on", _rests_on(result)))
        parts += engine_lines(result)
        parts += [f"note: {note}" for note in result["notes"]]
        return "\n".join(parts)

    def plot(self) -> Figure:
        """Requests in the engine and KV cache in use, over time."""
        return drawn(2, lambda axes: draw_engine(self.run, axes))


def simulate(
    scenario: Scenario,
    *,
    request_rate: float | None = None,
    num_requests: int = 1000,
    seed: int | None = None,
    percentiles: Sequence[float] = (95, 99),
    warmup: str | None = None,
    detailed: bool = False,
) -> Simulation:
    """Run a scenario once, in simulated time.

    Args:
        request_rate: requests/s of the traffic that ``plan`` probes, instead of the scenario's own workload.
        num_requests: how many at that rate.
        seed: of the traffic and of the noise, instead of the scenario's.
        percentiles: which to give.
        warmup: what to leave out at the start of each stage: "30s", "100" (requests), "20%" or "auto".
        detailed: add each request's lengths and TTFT to the result.

    Raises:
        InputError: the scenario cannot be made concrete, a request could never run, or the warm-up leaves
            nothing of a stage.
    """
    cut = None if warmup is None else Warmup.parse(warmup)
    deployment = Deployment.of(scenario)
    workload = scenario.stages() if request_rate is None else at_rate(scenario, request_rate, num_requests)
    run = run_of(deployment, seed=seed, workload=workload)
    found = result(deployment, run, ranks=percentiles, warmup=cut, detailed=detailed)
    found["notes"] += [*trace_notes(workload), *_steady_notes(run), *_saturated_notes(run, workload)]
    return Simulation(run, found)


def _saturated_notes(run: Run, workload: Workload) -> list[str]:
    """Open loops that send more than is served: their latencies grow with the length of the run."""
    notes = []
    for index, stage in enumerate(workload.stages):
        arrivals = run.requests["arrival"][run.requests["stage"] == index]
        if any(isinstance(stream.arrivals, ClosedLoop) or stream.max_concurrency for stream in stage.streams):
            continue
        if not arrivals.min() < arrivals.max():
            continue
        part = select(run, stage=index)
        load = saturation(part, start_s=float(arrivals.min()))
        if load.saturated and lasts(part):
            of = f" of stage {run.stages[index]}" if len(run.stages) > 1 else ""
            notes.append(
                f"the load{of} is more than is served: {load.reason}; its latencies grow with its length"
            )
    return notes


def _steady_notes(run: Run) -> list[str]:
    """Over what the rates of closed loops that have a duration are taken."""
    notes = []
    for stage, loop in enumerate(run.meta.get("closed_loops", ())):
        if loop is None:
            continue
        of = f" of stage {run.stages[stage]}" if len(run.stages) > 1 else ""
        window = steady_s(select(run, stage=stage))
        if window is None:
            notes.append(f"the closed loop{of} has no steady middle: its rates hold its start and end")
        else:
            notes.append(
                f"rates{of} are those of the steady middle, from {window[0]:.4g} to {window[1]:.4g} s"
            )
    return notes


def at_rate(scenario: Scenario, request_rate: float, num_requests: int) -> Workload:
    """The traffic that ``plan`` probes, at a rate.

    Raises:
        InputError: the rate or the number is none.
    """
    if not 0 < request_rate < float("inf"):
        what = f"{request_rate:g} is not a rate"
        raise InputError(what, where="--request-rate", fix="Give requests a second, above 0.")
    if num_requests < 1:
        raise InputError(f"{num_requests} requests", where="--num-requests", fix="Give at least 1.")
    return with_request_rate(scenario.open_loop(), request_rate, num_requests=num_requests)


def replicas_text(replicas: Sequence[Mapping[str, Any]], *, title: str = "\nReplicas") -> str:
    """A row a replica, of a result's ``fleet_load``."""
    columns = {
        "replica": "replica",
        **({"rank": "rank"} if replicas and "rank" in replicas[0] else {}),
        "requests": "requests",
        "failed": "failed",
        "prefix hits": "prefix_cache_hit_rate",
        "uncached tok/s": "uncached_tokens_per_s",
        "running (mean)": "mean_num_running",
        "waiting (mean)": "mean_num_waiting",
        "waiting (peak)": "max_num_waiting",
        "KV (mean)": "mean_kv_cache_usage",
        "KV (peak)": "kv_cache_usage_peak",
        "preemptions": "num_preemptions",
    }
    return keyed_table(columns, replicas, title=title)


def pools_text(pools: Sequence[Mapping[str, Any]]) -> str:
    """A row a pool, of a result's ``fleet_load``, and its transfers."""
    columns = {
        "pool": "pool",
        "servers": "servers",
        "busy": "busy",
        "prefill tokens": "prefill_tokens",
        "decoded tokens": "decoded_tokens",
        "KV (mean)": "mean_kv_cache_usage",
        "KV (peak)": "kv_cache_usage_peak",
        "running (peak)": "max_num_running",
        "waiting (peak)": "max_num_waiting",
    }
    facts = {"transfers": "kv_transfers", "MB each (mean)": "mean_kv_transfer_mb"}
    facts |= {"ms (mean)": "mean_kv_transfer_ms", "ms (p95)": "p95_kv_transfer_ms"}
    moved = facts_text("\nKV transfers", {name: pools[-1][key] for name, key in facts.items()})
    return keyed_table(columns, pools, title="\nPools") + "\n" + moved


def sessions_text(sessions: Mapping[str, Any]) -> str:
    """A result's ``sessions``: what they took, and the first eight turns, the 16th, 32nd, ... and the
    last."""
    tails = [key for key in sessions if key.endswith("_session_s") and key.startswith("p")]
    facts = {
        "sessions": sessions["sessions"],
        "whole ones": sessions["whole_sessions"],
        "turns of each (mean)": sessions["mean_turns"],
        "requests of each (mean)": sessions["mean_requests"],
        "seconds (median)": sessions["median_session_s"],
        **{f"seconds ({key.split('_')[0]})": sessions[key] for key in tails},
        "waiting for the server": None
        if sessions["served_share"] is None
        else f"{sessions['served_share']:.0%} of the time",
    }
    tail = tails[0].split("_")[0] if tails else "mean"
    columns = {
        "turn": "turn",
        "turns": "turns",
        "requests": "requests",
        "prompt (mean)": "mean_prompt_tokens",
        "prefix hits": "prefix_cache_hit_rate",
        "TTFT p50 ms": "median_ttft_ms",
        f"{tail} ms": f"{tail}_ttft_ms",
        "turn p50 s": "median_turn_s",
        f"{tail} s": f"{tail}_turn_s",
    }
    rows = [(int(row["turn"]), row) for row in sessions["turns"]]
    shown = [row for turn, row in rows if turn <= 8 or turn & (turn - 1) == 0 or row is rows[-1][1]]
    return facts_text("\nSessions", facts) + "\n" + keyed_table(columns, shown, title="\nTurns")


def _stages_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """A row a stage. Latencies are milliseconds."""
    columns = [
        (header, key) for header, key in _COLUMNS if any(stage.get(key) is not None for stage in stages)
    ]
    return table([header for header, _ in columns], [[stage[key] for _, key in columns] for stage in stages])


def _rests_on(result: Mapping[str, Any]) -> dict[str, object]:
    provenance, engine = result["provenance"], result["engine"]
    server = f"{'vLLM ' if engine['policy'] == 'vllm' else ''}{result['engine_version']}"
    return {
        "basis": provenance["basis"],
        "profile": f"{result['profile'] or 'none'} ({provenance['profile']})",
        "error bands": Bands(**result["error_bands"]).to_text(),
        "engine": f"{server}, rules of {engine['rules']}",
        "seed": result["seed"],
        "servecast": result["servecast_version"],
    }


def _of_images(result: Mapping[str, Any]) -> dict[str, object]:
    """vLLM's counters of the API server's cache of images, and what the vision tower did."""
    queries = result["mm_cache_queries"]
    share = result["mm_cache_hits"] / queries if queries else 0.0
    return {
        "processed before": f"{result['mm_cache_hits']} of {queries} ({share:.1%}; vllm:mm_cache_hits)",
        "encoded": f"{result['encoder_items']} items in {result['encoder_time']:.4g} s of the vision tower",
    }
