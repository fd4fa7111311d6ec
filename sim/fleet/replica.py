"""One server of a fleet: an engine, the loop around it, and the API server in front."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from servecast.sim.engine.engine import Engine, Step
from servecast.sim.engine.engine_loop import EngineLoop
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.engine_loop import PythonLoop
from servecast.sim.fleet.flow import Server
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.step_time.physical import PhysicalStepTime, StepTime
from servecast.sim.hardware.step_time.pipeline import PipelinedStepTime
from servecast.sim.inputs.units import to_ps


class Replica:
    """An engine, its API server, and what is recorded of both.

    Args:
        index: number of the replica in its fleet.
        engine: a fresh one.
        step_time: how long a step takes.
        noise: factors of mean 1 on the step time, one a step.
        floor: a step's least duration in seconds, which noise does not undercut (its roofline).
        costs, rng: of the API server in front of the engine. client: the process that reads its tokens.
        cold_start_s: how long the host is busy between deciding the first step and its start on the GPU.
    """

    def __init__(
        self,
        index: int,
        engine: Engine,
        step_time: StepTime,
        noise: Iterator[float],
        floor: Callable[[Step], float],
        costs: FrontEndCosts,
        rng: np.random.Generator,
        client: Client,
        *,
        cold_start_s: float = 0.0,
    ) -> None:
        self.index = index
        self.config = engine.config
        self.engine = engine
        served = to_ps(costs.token_s), to_ps(costs.delivery_s)
        read = client.read if client.reading_costs else None
        cold_start = to_ps(cold_start_s)
        self.loop: EngineLoop | PythonLoop
        if isinstance(engine, Scheduler):
            numbers = step_time.costs() if type(step_time) is PhysicalStepTime else None
            seconds = step_time.seconds
            self.loop = EngineLoop(engine, index, numbers, seconds, floor, noise, served, read, cold_start)
            if isinstance(step_time, PipelinedStepTime):
                self.loop.use(step_time.pipeline(engine.stride if engine.config.async_scheduling else 0))
        else:
            self.loop = PythonLoop(engine, index, step_time, floor, noise, served, read, cold_start)
        costs_s = costs.latency_s, costs.request_s, costs.prompt_token_s
        variation = _gamma_factors(costs.cv, rng) if costs.cv else None
        self.server = Server(self.loop, costs_s, variation, engine.config.preparation_round)

    @property
    def now(self) -> int:
        """Up to when the engine has run."""
        return self.loop.now


def _gamma_factors(cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Factors of mean 1 and the given coefficient of variation, drawn in blocks."""
    while True:
        yield from rng.gamma(1 / cv**2, cv**2, size=1024).tolist()
