"""What to run on a live server: each plan is a dict entry, and gives loads that are traces in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from servecast.sim.content import SharedPrefix
from servecast.sim.deployment import Deployment
from servecast.sim.errors import InputError
from servecast.sim.lengths import Empirical
from servecast.sim.request import Request
from servecast.sim.scenario import Scenario
from servecast.sim.simulate import simulate
from servecast.sim.trace_writers import from_requests, write_timed_trace
from servecast.sim.traces import TraceSpec
from servecast.sim.workload import build, with_request_rate
from servecast.sim.workload_spec import StageSpec, StreamSpec, Workload

BLOCK_TOKENS = 16  # of a hash id in the traces: prompts are shared to that grain


@dataclass(frozen=True, slots=True)
class Load:
    """One run of the load generator.

    Attributes:
        name: of its folder. plan: that it belongs to. trace: timed_trace JSONL of its requests.
        request_rate: mean rate in requests/s, None for a closed loop. max_concurrency: of the client.
        engine: fields of the scenario's engine that the server needs for it, by name; each different set
            is a server of its own.
    """

    name: str
    plan: str
    trace: Path
    request_rate: float | None
    max_concurrency: int | None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a result says of it."""
        named = ("name", "plan", "request_rate", "max_concurrency")
        return {name: getattr(self, name) for name in named} | {"engine": dict(self.engine)}

    def workload(self) -> Workload:
        """The same load, as the simulator takes it."""
        spec = TraceSpec(format="timed_trace", path=self.trace, block_tokens=BLOCK_TOKENS)
        stream = StreamSpec(trace=spec, max_concurrency=self.max_concurrency)
        return Workload(stages=(StageSpec(streams=(stream,)),))


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes the loads of a scenario.

    Attributes:
        out: folder for the traces. max_rate: the predicted largest rate at the SLOs, requests/s.
        duration_s: how long an open-loop load sends. seed: of its traffic.
        concurrency, rates: levels, and shares of max_rate, instead of the plans' own.
    """

    scenario: Scenario
    deployment: Deployment
    out: Path
    max_rate: float
    duration_s: float = 60.0
    seed: int = 0
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()

    def at_rate(
        self, request_rate: float, plan: str, *, stream: StreamSpec | None = None, **engine: Any
    ) -> Load:
        """Open-loop traffic at a rate, of the scenario's kind or of a stream of its kind."""
        workload = self.scenario.open_loop()
        if stream is not None:
            workload = Workload(stages=(StageSpec(streams=(stream,)),))
        count = max(20, round(request_rate * self.duration_s))
        requests = self._requests(with_request_rate(workload, request_rate, num_requests=count))
        return self._load(f"{plan}-{request_rate:.4g}", plan, requests, request_rate, None, engine)

    def closed(self, concurrency: int, plan: str) -> Load:
        """A closed loop of the scenario's requests: at least four a slot, and at least 20."""
        count = max(20, 4 * concurrency)
        requests = self._requests(with_request_rate(self.scenario.open_loop(), 1.0, num_requests=count))
        for request in requests:
            request.arrival_s = 0.0
        return self._load(f"{plan}-{concurrency}", plan, requests, None, concurrency, {})

    def stream(self) -> StreamSpec:
        """The scenario's (first foreground) open-loop stream."""
        return next(s for s in self.scenario.open_loop().stages[0].streams if not s.background)

    def _requests(self, workload: Workload) -> list[Request]:
        arrivals, lengths, content = np.random.default_rng(self.seed).spawn(3)
        stages = build(workload, arrivals=arrivals, lengths=lengths, content=content)
        requests = [r for s in stages[0].streams if not s.background for r in s.requests]
        return sorted(requests, key=lambda request: request.arrival_s)

    def _load(
        self,
        name: str,
        plan: str,
        requests: list[Request],
        request_rate: float | None,
        max_concurrency: int | None,
        engine: Mapping[str, Any],
    ) -> Load:
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_timed_trace(from_requests(requests, block_tokens=BLOCK_TOKENS), folder / "trace.jsonl")
        return Load(name, plan, folder / "trace.jsonl", request_rate, max_concurrency, engine)


def concurrency(planner: Planner) -> list[Load]:
    """Closed loops of rising concurrency, past what the engine runs together."""
    most = planner.deployment.config.max_num_seqs
    levels = planner.concurrency or tuple(c for c in (1, 4, 16, 64, 256, 1024) if c <= 2 * most)
    return [planner.closed(level, "concurrency") for level in levels]


def rate(planner: Planner) -> list[Load]:
    """Open loops below, near and past the predicted largest rate."""
    shares = planner.rates or (0.5, 0.8, 0.95, 1.1)
    return [planner.at_rate(share * planner.max_rate, "rate") for share in shares]


def kv(planner: Planner) -> list[Load]:
    """An open loop at 80 % of the largest rate with 60 % of the KV blocks that it would hold: preemption."""
    name, request_rate = "kv", 0.8 * planner.max_rate
    load = planner.at_rate(request_rate, name)
    run = simulate(planner.scenario, workload=load.workload(), deployment=planner.deployment)
    used = float(run.steps["kv_usage"].max()) * planner.deployment.config.num_gpu_blocks
    longest = int((run.requests["prompt_tokens"] + run.requests["output_tokens"]).max())
    least = -(-max(longest, 1) // planner.deployment.config.block_size) + 2
    return [planner.at_rate(request_rate, name, num_gpu_blocks_override=max(least, round(0.6 * used)))]


def prefix(planner: Planner) -> list[Load]:
    """An open loop at half the largest rate whose prompts are eight groups with a prefix each."""
    stream = planner.stream()
    prefix_tokens = 16 * max(1, planner.deployment.config.max_model_len // 64)
    content = SharedPrefix(kind="shared_prefix", groups=8, prefix_tokens=prefix_tokens)
    shared = stream.model_copy(update={"content": content, "trace": None})
    if shared.prompt_tokens is None:
        raise InputError(
            "a trace's prompts cannot be given prefixes", where="--plan prefix", fix="Leave this plan out."
        )
    return [planner.at_rate(0.5 * planner.max_rate, "prefix", stream=shared)]


def mixed(planner: Planner) -> list[Load]:
    """An open loop at half the largest rate in which one prompt of ten is eight times as long."""
    stream = planner.stream()
    if stream.prompt_tokens is None:
        raise InputError(
            "a trace's prompts cannot be made longer", where="--plan mixed", fix="Leave this plan out."
        )
    drawn = stream.prompt_tokens.draw(1000, np.random.default_rng(planner.seed))
    short = int(np.median(drawn))
    longest = planner.deployment.config.max_model_len // 2
    lengths = Empirical(kind="empirical", values=(short, min(8 * short, longest)), weights=(0.9, 0.1))
    return [
        planner.at_rate(
            0.5 * planner.max_rate, "mixed", stream=stream.model_copy(update={"prompt_tokens": lengths})
        )
    ]


PLANS: dict[str, Callable[[Planner], list[Load]]] = {
    "concurrency": concurrency,
    "rate": rate,
    "kv": kv,
    "prefix": prefix,
    "mixed": mixed,
}
SLO_PLAN = "slo"  # its next load hangs on what the last one showed: see live.Campaign
