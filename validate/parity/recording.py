"""What a recording scheduler wrote beside a live vLLM, as a scenario and the decisions it must lead to."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.parity import Recorded
from servecast.validate.parity.scenarios import Abort, Arrival, Scenario
from servecast.validate.parity.vllm_process import release


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run of a live engine.

    Attributes:
        recorded: its requests at the steps at which they arrived, and what the engine then decided.
        steps: schedule() calls.
        microseconds_per_step: what the recording itself cost.
    """

    recorded: Recorded
    steps: int
    microseconds_per_step: float


def read_recording(file: Path) -> Recording:
    """Read what calibrate/measure/vllm/recording_scheduler.py wrote.

    A request that had not ended when the recording did is taken to end at ``max_tokens``.

    Raises:
        InputError: the file is not such a recording.
    """
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return _recording(lines, file.stem)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"not a recording of vLLM's scheduler ({type(error).__name__}: {error})",
            where=str(file),
            fix="Record with servecast's calibrate/measure/vllm/recording_scheduler.py.",
        ) from error


def _recording(lines: list[list[Any]], name: str) -> Recording:
    engine = lines[0][1]
    known = {field.name for field in fields(EngineConfig)}
    options = {key: value for key, value in engine.items() if key in known}
    config = EngineConfig(**options | {"version": release(engine["version"])})
    outputs = {n: count for kind, *rest in lines if kind == "update" for n, count in rest[2]}
    arrivals: list[Arrival] = []
    aborts: list[Abort] = []
    events: list[dict[str, Any]] = []
    admitted: set[int] = set()
    gone: list[int] = []
    steps = updates = cost = 0
    for kind, *rest in lines[1:]:
        if kind == "add":
            _, n, prompt, max_tokens, priority, hashes = rest
            ends = range(config.block_size, prompt + 1, config.block_size)
            content = tuple(zip(hashes, ends, strict=False))
            request = Request(n, 0.0, prompt, outputs.get(n, max_tokens), max_tokens, content, priority)
            arrivals.append(Arrival(steps, n, request))
        elif kind == "abort":
            gone += rest[1]
        elif kind == "schedule":
            _, _, scheduled, preempted, free_blocks = rest
            aborts += [Abort(steps, n, in_flight=False) for n in gone]
            gone = []
            events.append(
                {
                    "schedule": steps,
                    "scheduled": [[n, tokens] for n, tokens, _ in scheduled],
                    "context": sum(tokens + computed for _, tokens, computed in scheduled),
                    "admitted": [n for n, _, _ in scheduled if n not in admitted],
                    "preempted": preempted,
                    "free_blocks": free_blocks,
                }
            )
            admitted.update(n for n, _, _ in scheduled)
            steps += 1
        elif kind == "update":
            _, _, finished, delivered = rest
            aborts += [Abort(steps - 1, n, in_flight=True) for n in gone]  # came while the step ran
            gone = []
            events.append({"complete": updates, "finished": [n for n, _ in finished], "emitted": delivered})
            updates += 1
        elif kind == "cost":
            cost = rest[1]
    scenario = Scenario(name, config, tuple(arrivals), tuple(aborts), max_steps=steps)
    answer = json.dumps({"decisions": events})
    return Recording(Recorded(scenario, answer), steps, cost / max(steps, 1) / 1000)
