"""What the steps of a vLLM engine were made of and how long they took, from inside its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step.

    Attributes:
        chunks: (tokens, context) of each prompt chunk: computed now, KV tokens already there.
        decodes, decode_context: requests with one token each; KV tokens they read, those included.
        samples: tokens sampled.
        seconds: from the end of the step before to the end of this one; None for the first of a busy period.
    """

    chunks: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int
    samples: int
    seconds: float | None


class StepRecorder:
    """Mixed into vLLM's scheduler, keeps what it decided until ``take`` is called; under 1 us a step.

    vLLM updates the scheduler with a step's result once it is there, in the order of the steps, with async
    scheduling too. So while there is always a next step to run, the time from update to update is the time
    of a step, whether the host or the GPU is what it waits for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends: list[tuple[Any, float]] = []

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self._ends.append((scheduler_output, perf_counter()))
        return result

    @property
    def recorded(self) -> int:
        """Steps since the last ``take``."""
        return len(self._ends)

    def take(self, prompts: Mapping[str, int]) -> list[Step]:
        """The steps since the last call. Call it with the engine empty.

        Args:
            prompts: request id -> prompt tokens.
        """
        steps = []
        before: float | None = None
        for output, end in self._ends:
            if output.total_num_scheduled_tokens:
                steps.append(_step(output, prompts, None if before is None else end - before))
            before = end
        self._ends = []
        return steps


def _step(output: Any, prompts: Mapping[str, int], seconds: float | None) -> Step:
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    chunks: list[tuple[int, int]] = []
    decodes = decode_context = samples = 0
    for name, tokens in output.num_scheduled_tokens.items():
        before = computed[name]
        if before >= prompts[name]:
            decodes += 1
            decode_context += before + tokens
            samples += 1
        else:
            chunks.append((tokens, before))
            samples += before + tokens >= prompts[name]
    return Step(tuple(chunks), decodes, decode_context, samples, seconds)
