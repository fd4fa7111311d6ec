"""Why is the first token slow? A run's slowest first tokens taken apart, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import sampled, step_shares
from servecast.sim.metrics.metrics import statistic
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import lasts, saturation
from servecast.sim.metrics.slow_ttft import SlowTtft, largest, slow_ttft
from servecast.sim.metrics.warmup import select
from servecast.sim.report.answer import Answer
from servecast.sim.report.text import table
from servecast.sim.run.results import cautions
from servecast.sim.run.simulate import simulate
from servecast.sim.run.simulation import at_rate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.trace_notes import trace_notes

_SHARED = 0.5  # own share of the tokens of a prefill's steps, under which others are most of them
_SHOWN = 0.005  # of TTFT, from which a part has a row
_WORDS = {
    "front_end": "client, network and API server, on the way to the engine and back",
    "max_num_seqs": "in the queue while all sequence slots are taken (max_num_seqs)",
    "token_budget": "in the queue while a step's tokens are used up (max_num_batched_tokens)",
    "kv_blocks": "in the queue for KV blocks",
    "kv_loads": "in the queue while KV cache is loaded",
    "passed_over": "in the queue for an adapter's slot (max_loras) or a grammar",
    "cold_start": "until the engine's first step (cold start)",
    "running_step": "behind the step that ran when the request came",
    "prefill": "its own prefill, with what shares its steps",
}


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Answer):
    """Where the time to a slow first token goes.

    Attributes:
        label: the scenario, and of several stages which.
        statistic: of TTFT, as "p95".
        slow: the requests that take as long, and what their time is made of.
        cause: the largest part, or "client_concurrency" where the client held them back for longer.
        reasons: the evidence, a sentence each. advice: what to change.
        notes: what to keep in mind.
    """

    label: str
    statistic: str
    slow: SlowTtft
    cause: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; times in ms."""
        slow = self.slow
        return {
            "label": self.label,
            "statistic": self.statistic,
            "ttft_ms": 1e3 * slow.threshold_s if self.statistic != "mean" else 1e3 * slow.ttft_s,
            "requests": slow.requests,
            "mean_ttft_ms": 1e3 * slow.ttft_s,
            "parts_ms": {name: 1e3 * seconds for name, seconds in slow.parts.items()},
            "client_queue_ms": 1e3 * slow.client_queue_s,
            "cause": self.cause,
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """The parts by their size, the cause, and what to change."""
        slow = self.slow
        which = "all" if self.statistic == "mean" else f"those of {1e3 * slow.threshold_s:.4g} ms or more"
        title = f"TTFT {self.statistic} of {self.label}: {slow.requests} requests, {which}"
        rows = [
            [_WORDS[name], 1e3 * seconds, f"{seconds / slow.ttft_s:.0%}" if slow.ttft_s else ""]
            for name, seconds in sorted(slow.parts.items(), key=lambda item: -item[1])
            if seconds >= _SHOWN * slow.ttft_s
        ]
        return "\n".join(
            [
                table(["where the time goes", "ms (mean)", "share"], rows, title=title),
                f"Cause: {self.sentence}",
                *(f"  {reason}" for reason in self.reasons),
                *(f"To change it: {each}" for each in self.advice),
                *(f"note: {note}" for note in self.notes),
            ]
        )

    @property
    def sentence(self) -> str:
        """The cause in a line."""
        if self.cause == "client_concurrency":
            return (
                f"the client: requests wait {1e3 * self.slow.client_queue_s:.4g} ms for their turn "
                "before they are sent, which TTFT does not count"
            )
        seconds = self.slow.parts[self.cause]
        return f"{_WORDS[self.cause]}: {1e3 * seconds:.4g} of {1e3 * self.slow.ttft_s:.4g} ms"


def explain(
    scenario: Scenario,
    *,
    statistic: str = "p95",
    request_rate: float | None = None,
    num_requests: int = 1000,
    stage: str | None = None,
    seed: int | None = None,
) -> Explanation:
    """Why is the first token slow? Runs the scenario once and takes its slowest first tokens apart.

    Args:
        statistic: of TTFT: "p95" and the like take the requests that wait as long or longer, "mean" all.
        request_rate: requests/s of the traffic that ``plan`` probes, instead of the scenario's own workload.
        num_requests: how many at that rate.
        stage: which, by its name. Without it, that whose TTFT is longest.
        seed: of the traffic and of the noise, instead of the scenario's.

    Raises:
        InputError: the scenario cannot be made concrete, or no request finished.
    """
    if statistic == "std":
        what = "std is a spread, not a time to explain"
        raise InputError(what, where="statistic", fix="Give p95, max or mean.")
    if scenario.fleet.prefill:
        what = "a first token of prefill and decode servers is not taken apart"
        fix = "Use servecast simulate: its records have the times of both legs and of the transfer."
        raise InputError(what, where=f"{scenario.source}: fleet.prefill", fix=fix)
    deployment = Deployment.of(scenario)
    workload = scenario.stages() if request_rate is None else at_rate(scenario, request_rate, num_requests)
    run = simulate(deployment, seed=seed, workload=workload)
    found = explain_run(run, deployment, statistic, stage=stage)
    if found is None:
        where, fix = scenario.source, "Lengthen the run, or look at its failures with servecast simulate."
        raise InputError("no request finished, so there is no first token to explain", where, fix)
    groups = ", ".join(deployment.memory.facts().get("groups", ()))
    notes = (
        *([f"KV cache groups: {groups}"] if groups else ()),
        *deployment.notes,
        *cautions(deployment, run),
        *trace_notes(workload),
    )
    return replace(found, notes=notes)


def explain_run(
    run: Run, deployment: Deployment, statistic_name: str, *, stage: str | None = None
) -> Explanation | None:
    """The same of a run that was simulated; None where nothing in it finished."""
    label = deployment.scenario.name
    part = run
    if len(run.stages) > 1:
        name = stage if stage is not None else _slowest(run, statistic_name)
        part, label = select(run, stage=name), f"{label}, stage {name}"
    cold_s = deployment.scenario.fleet.cold_start_s
    slow = slow_ttft(part, deployment.limits, statistic_name, cold_start_s=cold_s)
    if slow is None:
        return None
    held = slow.client_queue_s if _open_loop(part) else 0.0
    cause = "client_concurrency" if held > slow.ttft_s else largest(slow.parts)
    reasons, advice = _why(cause, slow, part, deployment)
    if deployment.speculating is not None:
        reasons.append(_drafts(part, deployment))
    return Explanation(label, statistic_name, slow, cause, tuple(reasons), tuple(advice))


def _drafts(run: Run, deployment: Deployment) -> str:
    """What speculation takes of the steps, and what it brings."""
    assert deployment.speculating is not None
    _, parts = step_shares(sampled(run.steps), deployment.limits)
    drafting = parts.get("drafting", 0.0)
    computed = run.steps[["prefill_tokens", "decodes", "drafts"]].sum()
    decoding = computed["decodes"] + computed["drafts"]
    counts = run.meta.get("spec_decode")
    brings = f"{1 + counts.accepted / counts.drafts:.2f} tokens" if counts and counts.drafts else "no tokens"
    return (
        f"drafting ({deployment.speculating.config.method}) takes {drafting:.0%} of the steps' time; of what "
        f"the rest computes, {decoding / computed.sum():.0%} verifies drafts, and brings {brings} a step"
    )


def _admitted(deployment: Deployment) -> list[str]:
    """What lets requests in that are passed over."""
    found = []
    if slots := deployment.shard.lora_slots:
        found.append(f"--max-loras, now {slots}, at the price of memory, or fewer adapters a server")
    if deployment.compiles_grammars:
        found.append("fewer grammars, or more cores to compile them (engine.host_cores)")
    return found


def _slowest(run: Run, name: str) -> str:
    def late(stage: str) -> float:
        value = statistic(select(run, stage=stage), "ttft", name)
        return value if value == value else 0.0  # NaN of no request

    return max(run.stages, key=late)


def _open_loop(run: Run) -> bool:
    """Whether requests arrive by themselves, so that a wait in the client is one."""
    arrival = run.requests["arrival"]
    return bool(arrival.max() > arrival.min())


def _why(cause: str, slow: SlowTtft, run: Run, deployment: Deployment) -> tuple[list[str], list[str]]:
    """The evidence, and what to change: by flags of vLLM, of the client, or of the scenario."""
    config, steps, requests = deployment.config, run.steps, run.requests
    bound = run.meta.get("max_concurrency")
    prompt = float(requests["prompt_tokens"].mean())
    kv = float(steps["kv_usage"].max())
    running, waiting = int(steps["running"].max()), int(steps["waiting"].max())
    reasons = [f"at most {running} requests run and {waiting} wait in an engine, KV peak {kv:.0%}"]
    clients = f"the client keeps up to {bound} in flight" if bound and not _open_loop(run) else ""
    if clients:
        reasons.append(clients)
    more = "more replicas (fleet.replicas)"
    advice: dict[str, list[str]] = {
        "client_concurrency": [f"--max-concurrency of the client, now {bound}"],
        "max_num_seqs": [
            f"--max-num-seqs, now {config.max_num_seqs}"
            + (", and the KV cache has room" if kv < 0.9 else f", though the KV cache is {kv:.0%} full")
        ],
        "kv_blocks": [
            f"more KV blocks, now {config.num_gpu_blocks}: --gpu-memory-utilization, --kv-cache-dtype fp8, "
            "--tensor-parallel-size",
        ],
        "kv_loads": [
            "a faster link (kv_offload), or no offloading: servecast simulate prints what a load takes, and "
            "what computing it again does"
        ],
        "passed_over": _admitted(deployment),
        "token_budget": [
            f"--max-num-batched-tokens, now {config.max_num_batched_tokens}, at the price of ITL"
        ],
        "prefill": [
            f"shorter prompts (mean {prompt:.0f}), shared prefixes, --tensor-parallel-size, another GPU"
        ],
        "front_end": ["--api-server-count, fewer requests/s a server, a faster CPU"],
        "cold_start": [
            "requests before the measurement: fleet.cold_start_s is "
            f"{deployment.scenario.fleet.cold_start_s:g}"
        ],
        "running_step": [
            f"a smaller --max-num-batched-tokens, now {config.max_num_batched_tokens}: steps get shorter"
        ],
    }
    found = advice[cause]
    if cause == "prefill":
        reasons.append(
            f"a prefill takes {slow.steps:.1f} steps, of whose prompt tokens {slow.own_share:.0%} are its own"
        )
        if slow.own_share < _SHARED:
            found = [f"fewer prompts at once: {more}, or arrivals that are spread", *found]
        elif slow.steps > 1.5:
            found = [f"--max-num-batched-tokens, now {config.max_num_batched_tokens}", *found]
    if cause in ("max_num_seqs", "kv_blocks", "token_budget"):
        found = [*found, more]
        if clients:
            found.append(f"--max-concurrency of the client, now {bound}")
    if not bound and _open_loop(run) and (load := saturation(run)).saturated and lasts(run):
        reasons.append(f"the load is more than is served: {load.reason}")
    if slow.at_start > slow.requests / 2 and slow.requests > 1:
        reasons.append(
            f"{slow.at_start} of the {slow.requests} were sent before the first token of the run: the burst "
            "with which the client begins"
        )
        found = ["leave the beginning out (--warmup of the benchmark, or ramp it up)", *found]
    return reasons, found
