"""vLLM's schedulers with a step recorder, by name, since vLLM sends the class to its workers."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .steps import StepRecorder


class SyncStepScheduler(StepRecorder, Scheduler):  # type: ignore[misc]
    """Without async scheduling."""


class AsyncStepScheduler(StepRecorder, AsyncScheduler):  # type: ignore[misc]
    """With async scheduling."""


def recording(*, async_scheduling: bool) -> type[Any]:
    """The class for that kind of engine."""
    return AsyncStepScheduler if async_scheduling else SyncStepScheduler
