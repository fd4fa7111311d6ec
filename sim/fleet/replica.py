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
from servecast.sim.hardware.step_time.speculative import SpeculativeStepTime
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
        role: prefill or decode, in a fleet of such pools. Prompts alone go to a server that prefills, and no
            client reads its tokens.
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
        role: str = "",
    ) -> None:
        self.index, self.role = index, role
        self.config = engine.config
        self.engine = engine
        served = to_ps(costs.token_s), to_ps(costs.delivery_s)
        read = client.read if client.reading_costs and role != "prefill" else None
        cold_start = to_ps(cold_start_s)
        self.loop: EngineLoop | PythonLoop
        if isinstance(engine, Scheduler):
            numbers = None
            if isinstance(step_time, SpeculativeStepTime) or type(step_time) is PhysicalStepTime:
                numbers = step_time.costs()
            seconds = step_time.seconds
            self.loop = EngineLoop(engine, index, numbers, seconds, floor, noise, served, read, cold_start)
        else:
            self.loop = PythonLoop(engine, index, step_time, floor, noise, served, read, cold_start)
        costs_s = costs.latency_s, costs.request_s, costs.prompt_token_s
        variation = _gamma_factors(costs.cv, rng) if costs.cv else None
        self.server = Server(
            self.loop, costs_s, variation, engine.config.preparation_round, role == "prefill"
        )

    @property
    def now(self) -> int:
        """Up to when the engine has run."""
        return self.loop.now


def _gamma_factors(cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Factors of mean 1 and the given coefficient of variation, drawn in blocks."""
    while True:
        yield from rng.gamma(1 / cv**2, cv**2, size=1024).tolist()
