"""What differs between vLLM releases with pipeline stages and LoRA adapters; ``rules`` has the rest."""

from __future__ import annotations

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.rules import since

_STAGGERS_SINCE = "0.23"  # AsyncScheduler: next_decode_eligible_step
_FILLS_SINCE = "0.23"  # EngineCore.step_with_batch_queue: "model_executed or self.scheduler.has_requests()"
_RUNNING_LORAS_SINCE = "0.33"  # Scheduler.schedule: scheduled_loras of self.running
_STALE_SINCE = "0.27"  # Scheduler._preempt_request: num_stale_output_tokens


def max_concurrent_batches(config: EngineConfig) -> int:
    """Steps that are in flight at most (VllmConfig.max_concurrent_batches)."""
    stages = config.pipeline_parallel_size
    if not config.async_scheduling:
        return stages
    if stages > 1:
        return stages + (config.use_v2_model_runner and since(config.version, _STAGGERS_SINCE))
    return 2


def decode_stride(config: EngineConfig) -> tuple[int, bool]:
    """Steps from one token of a request to its next, and whether the scheduler has to see to that.

    Without asynchronous scheduling a request waits for its token; Model Runner V2 sends it to the first stage
    in as many steps as there are stages. Model Runner V1 has the same request in every step, and its first
    stage waits for the last.
    """
    stages = config.pipeline_parallel_size
    if stages == 1 or not config.async_scheduling:
        return stages, False
    staggers = config.use_v2_model_runner and since(config.version, _STAGGERS_SINCE)
    return (stages, True) if staggers else (1, False)


def fills_with_empty_steps(version: str) -> bool:
    """Whether the engine decides steps until as many are in flight as may be, although the last one was
    empty."""
    return since(version, _FILLS_SINCE)


def stale_waits(version: str) -> bool:
    """Whether a request that was preempted with output in flight waits for that before it is resumed."""
    return since(version, _STALE_SINCE)


def loras_of_all_running(version: str) -> bool:
    """Whether ``max_loras`` counts the adapters of all running requests, not only of those in the step."""
    return since(version, _RUNNING_LORAS_SINCE)
