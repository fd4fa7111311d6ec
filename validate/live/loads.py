"""What to run on a live server: each kind of load is a dict entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.sim.engine.request import Stage
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.content import SharedPrefix
from servecast.sim.traffic.draw import draw, replayed, with_request_rate
from servecast.sim.traffic.lengths import Empirical
from servecast.sim.traffic.spec import StageSpec, StreamSpec, Workload
from servecast.sim.traffic.trace_writers import from_requests
from servecast.sim.traffic.traces import Trace

LEAST_REQUESTS = 20
SHARES = (0.5, 0.8, 0.95, 1.1, 1.3)  # of the predicted largest rate
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Load:
    """One run of the load generator.

    Attributes:
        name: of its folder. kind: see KINDS and SEARCHED. requests: that are sent.
        request_rate: mean rate in requests/s, None for a closed loop. max_concurrency: of the client.
        engine: fields of the scenario's engine that the server needs for it, by name; each different set
            is a server of its own.
    """

    name: str
    kind: str
    requests: Trace
    request_rate: float | None
    max_concurrency: int | None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "name": self.name,
            "plan": self.kind,
            "request_rate": self.request_rate,
            "max_concurrency": self.max_concurrency,
            "engine": dict(self.engine),
        }

    def stages(self) -> list[Stage]:
        """The same requests, as the simulator takes them."""
        return replayed(self.requests, self.max_concurrency)


@dataclass(frozen=True, slots=True)
class Loads:
    """Makes the loads of a scenario.

    Attributes:
        deployment: that was made of it. max_rate: the predicted largest rate at the SLOs, requests/s.
        duration_s: how long an open-loop load sends. seed: of its traffic.
        rates: requests/s, concurrency: levels, instead of each kind's own.
    """

    deployment: Deployment
    max_rate: float
    duration_s: float = 60.0
    seed: int = 0
    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()

    @property
    def scenario(self) -> Scenario:
        """Whose loads they are."""
        return self.deployment.scenario

    def at_rate(self, request_rate: float, kind: str, *, stream: StreamSpec | None = None) -> Load:
        """Open-loop traffic at a rate, of the scenario's kind or of a stream of its kind."""
        workload = self.scenario.open_loop()
        if stream is not None:
            workload = Workload(stages=(StageSpec(streams=(stream,)),))
        count = max(LEAST_REQUESTS, round(request_rate * self.duration_s))
        requests = self._requests(with_request_rate(workload, request_rate, num_requests=count))
        return Load(f"{kind}-{_figures(request_rate)}", kind, requests, request_rate, None)

    def closed(self, concurrency: int, kind: str) -> Load:
        """A closed loop of the scenario's requests: at least four a slot."""
        count = max(LEAST_REQUESTS, 4 * concurrency)
        requests = self._requests(with_request_rate(self.scenario.open_loop(), 1.0, num_requests=count))
        at_once = replace(requests, times_s=np.zeros(len(requests)))
        return Load(f"{kind}-{concurrency}", kind, at_once, None, concurrency)

    def stream(self, kind: str) -> StreamSpec:
        """The scenario's (first foreground) open-loop stream, whose lengths a kind of load changes.

        Raises:
            InputError: a trace fixes them.
        """
        stream = next(s for s in self.scenario.open_loop().stages[0].streams if not s.background)
        if stream.prompt_tokens is None:
            raise InputError(
                "the prompts of a trace cannot be changed", where=f"--plan {kind}", fix="Leave this plan out."
            )
        return stream

    def prompts(self, stream: StreamSpec) -> Ints:
        """Prompt lengths as a stream draws them."""
        assert stream.prompt_tokens is not None
        return np.asarray(stream.prompt_tokens.draw(1000, np.random.default_rng(self.seed)))

    def room(self, stream: StreamSpec) -> int:
        """Tokens that could be added to the longest of these prompts."""
        assert stream.output_tokens is not None
        output = stream.output_tokens.draw(1000, np.random.default_rng(self.seed))
        longest = self.prompts(stream).max() + stream.system_prompt_tokens + stream.suffix_tokens
        return int(self.deployment.config.max_model_len - longest - np.max(output))

    def _requests(self, workload: Workload) -> Trace:
        streams = draw(workload, self.seed)[0].streams
        requests = [r for s in streams if not s.background for r in s.requests]
        if any(request.media for request in requests):
            raise InputError(
                "a live server is sent text alone, and the prompts carry images",
                where=f"{self.scenario.source}: workload.media",
                fix="Remove it.",
            )
        return from_requests(sorted(requests, key=lambda request: request.arrival_s))


def concurrency(loads: Loads) -> list[Load]:
    """Closed loops of rising concurrency, past what the engine runs together."""
    most = loads.deployment.config.max_num_seqs
    levels = loads.concurrency or tuple(c for c in (1, 4, 16, 64, 256, 1024) if c <= 2 * most)
    return [loads.closed(level, "concurrency") for level in levels]


def rate(loads: Loads) -> list[Load]:
    """Open loops below, near and past the predicted largest rate."""
    rates = loads.rates or [share * loads.max_rate for share in SHARES]
    return [loads.at_rate(request_rate, "rate") for request_rate in rates]


def kv(loads: Loads) -> list[Load]:
    """An open loop at 80 % of the largest rate with 60 % of the KV blocks that it would hold: preemption.

    A server must have blocks for one sequence of max_model_len, which is lowered to the longest request.
    """
    load = loads.at_rate(0.8 * loads.max_rate, "kv")
    config = loads.deployment.config
    run = simulate(loads.deployment, stages=load.stages())
    used = float(run.steps["kv_usage"].max()) * config.num_gpu_blocks
    longest = int((run.requests["prompt_tokens"] + run.requests["output_tokens"]).max())
    least = -(-longest // config.block_size) + 1  # one block is never used
    blocks = max(least, round(0.6 * used))
    return [replace(load, engine={"num_gpu_blocks_override": blocks, "max_model_len": longest})]


def prefix(loads: Loads) -> list[Load]:
    """An open loop at half the largest rate whose prompts begin with one of eight prefixes, four times as
    long as they were, or as long as there is room for."""
    stream = loads.stream("prefix")
    tokens = min(4 * int(np.median(loads.prompts(stream))), loads.room(stream))
    if tokens < loads.deployment.config.block_size:
        raise InputError(
            "max_model_len leaves no room for a prefix", where="--plan prefix", fix="Leave this plan out."
        )
    content = SharedPrefix(kind="shared_prefix", groups=8, prefix_tokens=tokens)
    shared = stream.model_copy(update={"content": content})
    return [loads.at_rate(0.5 * loads.max_rate, "prefix", stream=shared)]


def mixed(loads: Loads) -> list[Load]:
    """An open loop at half the largest rate in which one prompt of ten is eight times as long, or as long
    as there is room for."""
    stream = loads.stream("mixed")
    short = int(np.median(loads.prompts(stream)))
    long = min(8 * short, short + loads.room(stream))
    lengths = Empirical(kind="empirical", values=(short, long), weights=(0.9, 0.1))
    return [
        loads.at_rate(
            0.5 * loads.max_rate, "mixed", stream=stream.model_copy(update={"prompt_tokens": lengths})
        )
    ]


KINDS: dict[str, Callable[[Loads], list[Load]]] = {
    "concurrency": concurrency,
    "rate": rate,
    "kv": kv,
    "prefix": prefix,
    "mixed": mixed,
}
SEARCHED = ("slo", "knee")  # whose next load hangs on what the last one showed: see search
SWEPT = ("rate", *SEARCHED)  # kinds whose loads differ in nothing but the rate


def check_kinds(names: Sequence[str], rates: Sequence[float] = (), concurrency: Sequence[int] = ()) -> None:
    """Refuse a kind of load that there is not, and loads that would share a folder.

    Args:
        rates, concurrency: levels that are given instead of each kind's own.

    Raises:
        InputError: says which are known, or which is there twice.
    """
    known = [*KINDS, *SEARCHED]
    for name in names:
        if name not in known:
            fix = did_you_mean(name, known) or f"Known are {', '.join(known)}."
            raise InputError(f"there is no plan {name!r}", where="--plan", fix=fix)
    levels = [f"rate {_figures(each)}" for each in rates] + [f"concurrency {each}" for each in concurrency]
    for name, count in Counter([*names, *levels]).items():
        if count > 1:
            raise InputError(
                f"{name} is there {count} times",
                where="--plan, --rates, --concurrency",
                fix="Give each load once, and rates that differ in four figures: they name its folder.",
            )


def _figures(request_rate: float) -> str:
    """A rate as the folder of its load says it."""
    return f"{request_rate:.4g}"
