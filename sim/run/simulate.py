"""Run a scenario in simulated time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from servecast.sim.engine.engine_loop import EngineLoop
from servecast.sim.engine.held_costs import MediaProcessor
from servecast.sim.engine.request import Stage
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import NOT_READY, Fleet
from servecast.sim.fleet.flow import Engines
from servecast.sim.fleet.replica import Replica, lockstep
from servecast.sim.fleet.scaling import PaidLife, Scaling
from servecast.sim.fleet.spec import ReplicaSpec
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import to_seconds
from servecast.sim.metrics.kv_offload import busiest, offload_counters
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.spec_decode import DraftCounts
from servecast.sim.routing.llmd.config import read_epp
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.routers import ROUTERS, Router
from servecast.sim.run.disaggregated import ServerPools
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.kv_offload import Shared
from servecast.sim.scenario.kv_pull import pull_settings
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.arrivals import ClosedLoop
from servecast.sim.traffic.draw import CLOSED_LOOP_REQUESTS, check_requests, draw, with_request_rate
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.sessions import SessionRequest, SessionStream
from servecast.sim.traffic.spec import Workload

_MOST_REQUESTS = 10_000_000  # of a closed loop


def simulate(
    scenario: Scenario | Deployment,
    *,
    seed: int | None = None,
    workload: Workload | None = None,
    stages: list[Stage] | None = None,
    condensed_s: float | None = None,
) -> Run:
    """Run a scenario's workload to the end of its last request.

    Randomness has one stream a purpose (arrivals, lengths, content, noise, front end), so that two runs
    with one seed see the same traffic whatever else differs between them.

    Args:
        scenario: or the deployment that was made of it. seed, workload: instead of its own.
        stages: requests that are drawn already, instead of a workload. condensed_s: see ``Fleet.run``.

    Raises:
        InputError: the scenario cannot be made concrete, or a request could never run.
    """
    deployment = scenario if isinstance(scenario, Deployment) else Deployment.of(scenario)
    seed = deployment.scenario.seed if seed is None else seed
    if stages is not None:
        load = {}
        if [len(stage.streams) for stage in stages] == [1]:
            load = {"max_concurrency": stages[0].streams[0].max_concurrency}
        return _run(deployment, stages, seed, load, condensed_s)[0]
    workload = _own_workload(deployment) if workload is None else workload
    requests, before = CLOSED_LOOP_REQUESTS, 0
    while True:  # one cannot tell beforehand how many requests a closed loop of some duration sends
        stages = draw(workload, seed, closed_loop=requests)
        run, ran_out = _run(deployment, stages, seed, _load(workload), condensed_s)
        drawn = sum(len(stream.requests) for stage in stages for stream in stage.streams)
        if not ran_out or drawn == before or requests > _MOST_REQUESTS:
            return run
        requests, before = 4 * requests, drawn


def _run(
    deployment: Deployment,
    stages: list[Stage],
    seed: int,
    load: dict[str, Any],
    condensed_s: float | None = None,
) -> tuple[Run, bool]:
    """A run of requests that are drawn, and whether a closed loop of a duration had too few of them."""
    scenario = deployment.scenario
    noise, front_end, reading, routing = np.random.default_rng(seed).spawn(7)[3:]  # behind those of draw
    specs, deployments = _endpoints(deployment)
    shortest = min(each.config.max_model_len for each in deployments)
    check_requests(stages, shortest, where=f"{scenario.source}: workload")

    count = len(specs)
    shared = Shared()
    noise_streams, front_end_streams = noise.spawn(count), front_end.spawn(count)
    stepping: dict[int, Engines] = {}  # by replica, of cores in lockstep
    processors: list[MediaProcessor] = []

    def make_replica(index: int, client: Client) -> Replica:
        its = deployments[min(index, count - 1)]
        connected, costs, role = list[tuple[Scheduler, Any]](), its.front_end, ""
        if pools is not None:
            connected, role = pools.engines(index), pools.roles[index]
            costs = pools.front_end(index)
        if index >= len(noise_streams):  # one that an autoscaler started
            noise_streams.extend(noise.spawn(1))
            front_end_streams.extend(front_end.spawn(1))
        cores, together = its.config.data_parallel, None
        if cores is not None and cores.lockstep:
            together = stepping.get(index - 1)
            if together is None or len(together.loops) == cores.size:
                together = lockstep(cores, its.step_time)
            stepping[index] = together
        made = Replica(
            index,
            [engine for engine, _ in connected]
            or [its.engine(index, shared) for _ in range(1 if cores is None else cores.local)],
            its.step_time,
            its.profile.noise.factors(noise_streams[index]),
            costs,
            front_end_streams[index],
            client,
            cold_start_s=scenario.fleet.cold_start_s,
            together=together,
            role=role,
        )
        made.shares = its.offloading is not None and its.offloading.shares
        for loop in made.loops:
            its.equip(loop)
        for (_, connector), loop in zip(connected, made.loops, strict=False):
            connector.clock = lambda loop=loop: loop.now
        if (processor := its.processor()) is not None:
            server: Any = made.server
            server.processor = processor.seconds
            processors.append(processor)
        return made

    picking, scraping = routing.spawn(2)
    clock: Callable[[], float] = lambda: to_seconds(fleet.now)  # noqa: E731
    pools = ServerPools(scenario, deployments, picking, clock) if scenario.fleet.prefill else None
    fleet = Fleet(
        make_replica,
        [spec.life for spec in specs],
        router(scenario, picking, clock) if pools is None else pools.disaggregation.router,
        Client(deployment.front_end),
        reading,
        options=scenario.fleet.router_options,
        routing=scraping,
        detection_s=scenario.fleet.failure_detection_s,
        autoscaler=scenario.fleet.autoscaler,
        disaggregation=None if pools is None else pools.disaggregation,
    )
    run = fleet.run(stages, condensed_s=condensed_s)
    if fleet.failures[NOT_READY] == len(run.requests):
        where, fix = f"{scenario.source}: fleet.replicas", "Let one start earlier, or drain or fail later."
        raise InputError(f"no replica was ready for any of the {len(run.requests)} requests", where, fix)
    run.meta |= {
        "scenario": scenario.name,
        "seed": seed,
        "engine_version": scenario.engine.version,
        "rules": deployment.config.version,
        "max_num_seqs": deployment.config.max_num_seqs,
        "max_num_batched_tokens": deployment.config.max_num_batched_tokens,
        "num_gpu_blocks": deployment.config.num_gpu_blocks,
        "replicas": len(fleet.replicas),
        "lives": lives_of(fleet.scaling, specs),
        **load,
    }
    counters = [
        offload_counters(engine, its.ranks, replica.now)
        for replica in fleet.replicas
        if (its := deployments[min(replica.index, count - 1)].offloading) is not None
        for engine in replica.engines
    ]
    if counters:
        run.meta |= {"kv_offload": counters, "kv_links": busiest(counters)}
    if deployment.speculating is not None:
        run.meta["spec_decode"] = DraftCounts.of(
            [getattr(engine, "drafts", None) for replica in fleet.replicas for engine in replica.engines]
        )
    if processors:
        loops = [loop for replica in fleet.replicas for loop in replica.loops]
        run.meta["mm"] = {
            "mm_cache_queries": sum(each.queries for each in processors),
            "mm_cache_hits": sum(each.hits for each in processors),
            "encoder_items": sum(loop.encoded for loop in loops if isinstance(loop, EngineLoop)),
            "encoder_time": sum(loop.encoding_s for loop in loops if isinstance(loop, EngineLoop)),
        }
    together = {id(each): each.runner for each in stepping.values()}.values()
    if together:
        run.meta["dummy_steps"] = {
            "share": sum(sum(each.dummy_s) for each in together)
            / max(sum(sum(each.dummy_s) for each in together) + float(run.steps["duration"].sum()), 1e-12),
            "steps": sum(sum(each.dummies) for each in together),
            "waves": sum(each.waves for each in together),
        }
    if pools is not None:
        run.meta["roles"] = list(pools.roles)
    if fleet.failures:
        run.meta["failures"] = dict(sorted(fleet.failures.items()))
    _tell_turns(run, stages, fleet.unsent)
    closed = [_closed_loop(stage) for stage in stages]
    if any(loop is not None for loop in closed):
        run.meta["closed_loops"] = closed
    return run, fleet.ran_out


def lives_of(scaling: Scaling | None, specs: Sequence[ReplicaSpec]) -> list[PaidLife]:
    """When each replica of a run was there."""
    if scaling is not None:
        return scaling.lives
    return [
        PaidLife(
            spec.start_s,
            spec.start_s,
            spec.drain_s if spec.fail_s is None else min(spec.fail_s, spec.drain_s or spec.fail_s),
            index,
        )
        for index, spec in enumerate(specs)
    ]


def _tell_turns(run: Run, stages: list[Stage], unsent: int) -> None:
    """Which turn of its session each request is, where there are sessions."""
    streams = [stream for stage in stages for stream in stage.streams if isinstance(stream, SessionStream)]
    if not streams:
        return
    drawn = [each for s in streams for each in s.requests if isinstance(each, SessionRequest)]
    known = {each.request_id: each.turn for each in drawn}
    run.requests["turn"] = run.requests["request_id"].map(known).astype("Int64")
    sent = set(run.requests["request_id"].tolist())
    run.meta["cut_sessions"] = {each.group for each in drawn if each.request_id not in sent}
    if unsent:
        run.meta.setdefault("failures", {})["never sent, as their session had failed"] = unsent


def _closed_loop(stage: Stage) -> tuple[int, float] | None:
    """Clients and seconds of a stage that is a closed loop of a given duration, alone."""
    front = [stream for stream in stage.streams if not stream.background]
    if len(front) != 1 or front[0].until_s is None:
        return None
    clients = front[0].max_sessions if isinstance(front[0], SessionStream) else front[0].max_concurrency
    return None if clients is None else (clients, front[0].until_s)


def _own_workload(deployment: Deployment) -> Workload:
    """The scenario's workload. The stages of inference-perf's sweep are those that its burst leads to, with
    the scenario's own seed, so that all seeds have the same."""
    scenario = deployment.scenario
    spec, workload = scenario.workload, scenario.stages()
    sweep = spec.asks_server() if isinstance(spec, InferencePerfWorkload) else None
    if sweep is None or not isinstance(spec, InferencePerfWorkload):
        return workload
    requests = simulate(deployment, seed=scenario.seed, workload=workload).requests
    rate = sweep.saturation_rate(requests["sent"].to_numpy(), requests["finish"].to_numpy())
    if rate is None or rate <= 1:
        what = "the burst of the sweep does not saturate the server"
        fix = "Raise num_requests or timeout, or give workload.saturation_rate."
        raise InputError(what, where=f"{spec.inference_perf}: load.sweep", fix=fix)
    return spec.model_copy(update={"saturation_rate": rate}).workload()


def _endpoints(deployment: Deployment) -> tuple[list[ReplicaSpec], list[Deployment]]:
    """What each is that the router picks among, one by one: a replica, or one of its groups of cores."""
    scenario, specs, found = deployment.scenario, list[ReplicaSpec](), list[Deployment]()
    for spec, like in itertools.groupby(scenario.fleet.specs):
        whole = spec.as_in_scenario and not scenario.fleet.prefill
        own = deployment if whole else Deployment.of(scenario.of_replica(spec))
        groups = own.endpoints
        cores = own.config.data_parallel
        if own.offloading is not None and cores is not None and cores.lockstep:
            raise InputError(
                "offloading by engine cores that step together is not modelled",
                where=f"{scenario.source}: engine.data_parallel_size",
                fix="Leave it out, and give more replicas.",
            )
        way = pull_settings(own.scenario.engine.kv_transfer).way
        if scenario.fleet.prefill and cores is not None and (groups > 1 or way != "pull"):
            raise InputError(
                "prefill and decode servers of several engine cores that are balanced from outside, or pass "
                "KV on over a file system, are not modelled",
                where=f"{scenario.source}: engine.data_parallel_size",
                fix="Let their own API servers balance, and use NixlConnector.",
            )
        if groups > 1 and scenario.fleet.autoscaler is not None:
            what = "an autoscaler of servers whose ranks are replicas to the router"
            fix = "Leave it out, or let the servers' own API servers balance."
            raise InputError(what, where=f"{scenario.source}: fleet.autoscaler", fix=fix)
        for each in like:
            specs += [each] * groups
            found += [own] * groups
    return specs, found


def router(scenario: Scenario, rng: np.random.Generator, clock: Callable[[], float]) -> Router:
    """The router that a scenario names. clock: simulated seconds.

    Raises:
        InputError: its EndpointPickerConfig does not load.
    """
    fleet = scenario.fleet
    if fleet.epp is not None:
        config = read_epp(fleet.epp, fleet.router_options.epp_release)
        return EndpointPicker(config, fleet.router_options, rng, clock)
    assert isinstance(fleet.router, str)
    return ROUTERS[fleet.router](fleet.router_options, rng)


def _load(workload: Workload) -> dict[str, float | int | None]:
    """The load in vllm bench serve's terms, where one stream says it."""
    if len(workload.stages) != 1 or len(workload.stages[0].streams) != 1:
        return {}
    stream = workload.stages[0].streams[0]
    law = stream.arrivals
    if stream.talks:
        return {"max_concurrency": stream.max_concurrency}
    if isinstance(law, ClosedLoop):
        return {"request_rate": float("inf"), "max_concurrency": law.concurrency}
    return {
        "request_rate": getattr(law, "request_rate", None),
        "burstiness": getattr(law, "burstiness", None),
        "max_concurrency": stream.max_concurrency,
    }


class RateProbe:
    """Probes a scenario's open-loop traffic at other rates, for ``capacity.plan``. It can be pickled.

    Args:
        scenario: or the deployment that was made of it.
    """

    def __init__(self, scenario: Scenario | Deployment) -> None:
        self.deployment = scenario if isinstance(scenario, Deployment) else Deployment.of(scenario)
        own = self.deployment.scenario
        if own.fleet.autoscaler is not None:
            what = "a fleet that grows with its load has no largest rate of its own"
            fix = "Leave the autoscaler out (--set fleet.autoscaler=null), or use servecast day."
            raise InputError(what, where=f"{own.source}: fleet.autoscaler", fix=fix)
        self._workload = own.open_loop()

    def __call__(self, request_rate: float, seed: int, num_requests: int) -> Run:
        """One replication: ``num_requests`` requests at ``request_rate`` requests/s."""
        workload = with_request_rate(self._workload, request_rate, num_requests=num_requests)
        return simulate(self.deployment, seed=seed, workload=workload)
