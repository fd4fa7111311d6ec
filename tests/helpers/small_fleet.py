"""Small fleets whose steps last a second."""

from __future__ import annotations

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.hardware.step_time.physical import StepShape
from servecast.sim.metrics.records import Run


class OneSecondSteps:
    """Every step takes a second, whatever is in it."""

    def seconds(self, step: StepShape) -> float:
        return 1.0

    def roofline_seconds(self, step: StepShape) -> float:
        return 0.9

    def breakdown(self, step: StepShape) -> dict[str, float]:
        return {"host": 1.0}

    def binding(self, step: StepShape) -> str:
        return "host"


def config(**changes: object) -> EngineConfig:
    settings: dict[str, object] = {
        "version": "0.32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        "num_gpu_blocks": 101,
        "async_scheduling": False,
    }
    return EngineConfig(**{**settings, **changes})  # type: ignore[arg-type]


def one_stream(requests: list[Request], **stream: object) -> list[Stage]:
    return [Stage("all", [Stream("requests", requests, **stream)])]  # type: ignore[arg-type]


def times(result: Run, column: str) -> list[float]:
    return [round(value, 6) for value in result.requests[column]]
