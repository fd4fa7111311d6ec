"""Run a scenario in simulated time."""

from __future__ import annotations

import numpy as np
import simpy

from servecast.sim.arrivals import ClosedLoop
from servecast.sim.deployment import Deployment
from servecast.sim.fleet import Fleet
from servecast.sim.front_end import Client
from servecast.sim.records import Run
from servecast.sim.replica import Replica
from servecast.sim.router import ROUTERS
from servecast.sim.scenario import Scenario
from servecast.sim.workload import build, check_lengths, with_request_rate
from servecast.sim.workload_spec import Workload


def simulate(
    scenario: Scenario,
    *,
    seed: int | None = None,
    workload: Workload | None = None,
    deployment: Deployment | None = None,
) -> Run:
    """Run the scenario's workload to the end of its last request.

    Randomness has one stream a purpose (arrivals, lengths, content, noise, front end), so that two runs
    with one seed see the same traffic whatever else differs between them.

    Args:
        seed: instead of the scenario's. workload: instead of the scenario's own.
        deployment: ``Deployment.of(scenario)``, if it is at hand.

    Raises:
        InputError: the scenario cannot be made concrete, or a request could never run.
    """
    seed = scenario.seed if seed is None else seed
    workload = scenario.stages() if workload is None else workload
    deployment = Deployment.of(scenario) if deployment is None else deployment
    streams = np.random.default_rng(seed).spawn(6)
    arrivals, lengths, content, noise, front_end, reading = streams
    stages = build(workload, arrivals=arrivals, lengths=lengths, content=content)
    check_lengths(stages, deployment.config.max_model_len, where=f"{scenario.source}: workload")

    count = scenario.fleet.replicas
    noise_streams, front_end_streams = noise.spawn(count), front_end.spawn(count)
    profile = deployment.profile

    def make_replica(env: simpy.Environment, index: int, client: Client) -> Replica:
        return Replica(
            env,
            index,
            deployment.config,
            deployment.step_time,
            profile.noise.factors(noise_streams[index]),
            deployment.step_time.roofline_seconds,
            profile.front_end,
            front_end_streams[index],
            client,
        )

    router = ROUTERS[scenario.fleet.router]()
    fleet = Fleet(simpy.Environment(), make_replica, count, router, Client(profile.front_end), reading)
    run = fleet.run(stages)
    run.meta |= {
        "scenario": scenario.name,
        "seed": seed,
        "engine_version": scenario.engine.version,
        "rules": deployment.config.version,
        "max_num_seqs": deployment.config.max_num_seqs,
        "max_num_batched_tokens": deployment.config.max_num_batched_tokens,
        "num_gpu_blocks": deployment.config.num_gpu_blocks,
        "replicas": count,
        **_load(workload),
    }
    return run


def _load(workload: Workload) -> dict[str, float | int | None]:
    """The load in vllm bench serve's terms, where one stream says it."""
    if len(workload.stages) != 1 or len(workload.stages[0].streams) != 1:
        return {}
    stream = workload.stages[0].streams[0]
    law = stream.arrivals
    if isinstance(law, ClosedLoop):
        return {"request_rate": float("inf"), "max_concurrency": law.concurrency}
    return {
        "request_rate": getattr(law, "request_rate", None),
        "burstiness": getattr(law, "burstiness", None),
        "max_concurrency": stream.max_concurrency,
    }


class RateProbe:
    """Probes a scenario's open-loop traffic at other rates, for ``capacity.plan``. It can be pickled."""

    def __init__(self, scenario: Scenario, deployment: Deployment | None = None) -> None:
        self.scenario = scenario
        self.deployment = Deployment.of(scenario) if deployment is None else deployment
        self._workload = scenario.open_loop()

    def __call__(self, request_rate: float, seed: int, num_requests: int) -> Run:
        """One replication: ``num_requests`` requests at ``request_rate`` requests/s."""
        workload = with_request_rate(self._workload, request_rate, num_requests=num_requests)
        return simulate(self.scenario, seed=seed, workload=workload, deployment=self.deployment)
