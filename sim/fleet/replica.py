"""One server of a fleet: engine cores, the loops around them, and the API servers in front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from servecast.sim.engine.data_parallel import DataParallel
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.engine_loop import EngineLoop
from servecast.sim.engine.lockstep import Lockstep
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.balance import Balance
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.engine_loop import PythonLoop
from servecast.sim.fleet.flow import Engines, Server
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.step_time.physical import PhysicalStepTime, StepTime
from servecast.sim.hardware.step_time.pipeline import PipelinedStepTime
from servecast.sim.hardware.step_time.speculative import SpeculativeStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.units import to_ps
from servecast.sim.routing.gauges import Gauges


class Replica:
    """Engine cores, the API servers in front, and what is recorded of both.

    Args:
        index: number of the replica in its fleet.
        engines: fresh ones, as many as there are cores; or one.
        step_time: how long a step takes.
        noise: factors of mean 1 on the step time, one a step; they leave a step its roofline.
        costs, rng: of the API server in front of the engine. client: the process that reads its tokens.
        cold_start_s: how long the host is busy between deciding the first step and its start on the GPU.
        together: what the cores step with (``lockstep``); None: each by itself.

    Attributes:
        loops: around the engines, by rank.
        role: prefill or decode, in a fleet of such pools. Prompts alone go to a server that prefills, and no
            client reads its tokens.
        shares: whether it keeps KV where other replicas look for it.
    """

    def __init__(
        self,
        index: int,
        engines: Engine | Sequence[Engine],
        step_time: StepTime,
        noise: Iterator[float],
        costs: FrontEndCosts,
        rng: np.random.Generator,
        client: Client,
        *,
        cold_start_s: float = 0.0,
        together: Engines | None = None,
        role: str = "",
    ) -> None:
        self.index, self.role, self.shares = index, role, False
        floor = step_time.roofline_seconds
        self.engines = engines if isinstance(engines, Sequence) else (engines,)
        self.config = config = self.engines[0].config
        served = to_ps(costs.token_s), to_ps(costs.delivery_s)
        read = client.read if client.reading_costs and role != "prefill" else None
        cold_start = to_ps(cold_start_s)
        numbers = None
        if isinstance(step_time, SpeculativeStepTime) or type(step_time) is PhysicalStepTime:
            numbers = step_time.costs()
        self.loops: list[EngineLoop | PythonLoop] = []
        for engine in self.engines:
            if isinstance(engine, Scheduler):
                seconds = step_time.seconds
                loop = EngineLoop(engine, index, numbers, seconds, floor, noise, served, read, cold_start)
                self.loops.append(loop)
                if isinstance(step_time, PipelinedStepTime):
                    loop.use(step_time.pipeline(engine.stride if engine.config.async_scheduling else 0))
                if together is not None:
                    together.runner.add(loop)
            else:
                self.loops.append(PythonLoop(engine, index, step_time, noise, served, read, cold_start))
        stepping = [together or Engines(loop, [loop]) for loop in self.loops]
        costs_s = costs.latency_s, costs.request_s, costs.prompt_token_s
        variation = _gamma_factors(costs.cv, rng) if costs.cv else None
        cores, balance, spread, fronts = config.data_parallel, None, None, 1
        if cores is not None and cores.local > 1:
            balance, fronts = Balance(cores), cores.api_servers
            spread = _spread(fronts, rng.spawn(1)[0]) if fronts > 1 else None
            for each in self.loops:
                each.reports = True  # type: ignore[union-attr]
        most = config.preparation_round
        self.server = Server(
            self.loops,
            stepping,
            costs_s,
            variation,
            most,
            balance,
            spread,
            fronts,
            prefills=role == "prefill",
        )

    @property
    def now(self) -> int:
        """Up to when an engine has run."""
        return max(loop.now for loop in self.loops)

    def gauges(self) -> Gauges:
        """As a router sees them: requests of all cores, and the mean of their KV caches in use."""
        waiting = sum(engine.num_waiting for engine in self.engines)
        running = sum(engine.num_running for engine in self.engines)
        usage = sum(engine.kv.usage for engine in self.engines) / len(self.engines)
        if not self.config.max_loras:
            return Gauges(waiting, running, usage)
        adapters = (engine.adapters for engine in self.engines if isinstance(engine, Scheduler))
        return Gauges(waiting, running, usage, frozenset().union(*adapters))


def lockstep(cores: DataParallel, step_time: StepTime) -> Engines:
    """What steps the cores of a server that share layers of experts, all of its replicas' together.

    Raises:
        InputError: the step times are not such that they tell the layers of experts apart.
    """
    target, passes = step_time, list[PhysicalStepTime]()
    if isinstance(step_time, SpeculativeStepTime):
        target = step_time.target
        drafter = (step_time.first, step_time.later)
        passes = [each for each in drafter if each is not None and each.shard.expert_ranks.data > 1]
    if type(target) is not PhysicalStepTime:
        raise InputError(
            "the profile's step times do not tell the layers of experts apart, which engine cores share",
            where="profile",
            fix="Use a profile of kind physical, or kernels.",
        )
    runner = Lockstep(cores, target.in_lockstep, tuple(each.in_lockstep for each in passes))
    return Engines(runner, runner.loops)


def _spread(servers: int, rng: np.random.Generator) -> Iterator[int]:
    """To which API server a connection leads: the kernel hashes it (SO_REUSEPORT)."""
    while True:
        yield from rng.integers(servers, size=1024).tolist()


def _gamma_factors(cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Factors of mean 1 and the given coefficient of variation, drawn in blocks."""
    while True:
        yield from rng.gamma(1 / cv**2, cv**2, size=1024).tolist()
