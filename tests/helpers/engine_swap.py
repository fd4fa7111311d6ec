"""Puts the plain engine, which loops over all running requests, into a replica in the scheduler's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from plain_engine import PlainEngine, PlainStep

from servecast.sim.engine.config import EngineConfig
from servecast.sim.scenario.servers import SERVERS
from servecast.sim.scenario.vllm_server import Vllm


class SwappedEngine(PlainEngine):
    """The plain engine with the read-outs that a replica wants: gauges, and where each token's
    predecessor came from."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.last_tick: dict[int, int] = {}  # request -> tick of the step that delivered its newest token

    @property
    def num_running(self) -> int:
        return len(self.running_states)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting_states)

    def schedule(self) -> SwappedStep:
        return SwappedStep(super().schedule())

    def complete(self, step: SwappedStep) -> None:  # type: ignore[override]
        takers = [request_id for request_id in step.plain.samplers if request_id in self.requests]
        super().complete(step.plain)
        for request_id in takers:
            last = self.last_tick.get(request_id)
            if last == step.tick - 1:
                step.steady += 1
            elif last is not None:
                step.gaps.append(last)
            self.last_tick[request_id] = step.tick
        for request_id in step.plain.finished:
            del self.last_tick[request_id]


class SwappedStep:
    """A plain step with the gaps in front of its tokens; see sim.step.Step."""

    idle_s = 0.0

    def __init__(self, plain: PlainStep) -> None:
        self.plain, self.tick = plain, plain.tick
        self.steady = 0
        self.gaps: list[int] = []
        self.total_tokens = plain.total_tokens

    def __getattr__(self, name: str) -> object:
        return getattr(self.plain, name)


@contextmanager
def plain_engine() -> Iterator[None]:
    """Simulations inside use the plain engine."""
    with patch.dict(SERVERS, vllm=Vllm(SwappedEngine)):
        yield
