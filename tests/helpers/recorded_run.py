"""A recorded run of a live vLLM as a scenario, and the decisions that it must lead to."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from servecast.calibrate.measure.vllm.recording import Recording, read_recording
from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.parity import Recorded
from servecast.validate.parity.scenarios import Abort, Arrival, Scenario
from servecast.validate.parity.vllm_process import release


def recorded_run(file: Path) -> Recorded:
    """What recording_scheduler wrote: requests at the steps at which they arrived, and what the engine then
    decided. A request that had not ended when the recording did is taken to end at ``max_tokens``.

    Raises:
        InputError: the file is not such a recording.
    """
    run = read_recording(file)
    known = {field.name for field in fields(EngineConfig)}
    options = {key: value for key, value in run.engine.items() if key in known}
    if "version" not in options:
        raise InputError("not a recording of a whole run", where=str(file), fix="Give one from its start.")
    config = EngineConfig(**options | {"version": release(options["version"])})
    outputs = {n: count for step in run.steps for n, count in step.finished}
    arrivals = []
    for n, added in run.requests.items():
        ends = range(config.block_size, added.prompt_tokens + 1, config.block_size)
        content = tuple(zip(added.hashes, ends, strict=False))
        output = outputs.get(n, added.max_tokens)
        request = Request(n, 0.0, added.prompt_tokens, output, added.max_tokens, content, added.priority)
        arrivals.append(Arrival(added.steps, n, request))
    aborts = tuple(Abort(step, n, in_flight=in_flight) for n, step, in_flight in run.aborts)
    scenario = Scenario(file.stem, config, tuple(arrivals), aborts, max_steps=len(run.steps))
    return Recorded(scenario, json.dumps(_decisions(run)))


def _decisions(run: Recording) -> list[dict[str, Any]]:
    """The steps as ``engine_core.decisions`` tells them, in the order of the calls."""
    completed = [
        {"complete": i, "finished": [n for n, _ in step.finished], "emitted": step.delivered}
        for i, step in enumerate(run.steps)
        if step.ended is not None
    ]
    events: list[dict[str, Any]] = []
    admitted: set[int] = set()
    results = 0
    for i, step in enumerate(run.steps):
        events += completed[results : step.results]
        results = step.results
        events.append(
            {
                "schedule": i,
                "scheduled": [[n, tokens] for n, tokens, _ in step.scheduled],
                "context": sum(tokens + computed for _, tokens, computed in step.scheduled),
                "admitted": [n for n, _, _ in step.scheduled if n not in admitted],
                "preempted": step.preempted,
                "free_blocks": step.free_blocks,
            }
        )
        admitted.update(n for n, _, _ in step.scheduled)
    return events + completed[results:]
