"""What recording_scheduler wrote, read back; its docstring says what the lines mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MeasureError


@dataclass(slots=True)
class Added:
    """A request as it joined the engine. received: by its process, ns. steps: decided before it joined."""

    received: int
    prompt_tokens: int
    max_tokens: int
    priority: int
    hashes: list[int]
    steps: int


@dataclass(slots=True)
class Step:
    """A step of the engine, times in ns.

    Attributes:
        began, decided: of schedule(). ended: when its result was worked in; None: the recording ended before.
        scheduled: (request, tokens, computed before). finished: (request, output tokens).
        preempted: requests. free_blocks: left of the KV cache. delivered: tokens that left the engine.
        results: of steps before it that were worked in when it was decided.
    """

    began: int
    decided: int
    scheduled: list[tuple[int, int, int]]
    preempted: list[int]
    free_blocks: int
    results: int
    ended: int | None = None
    finished: list[tuple[int, int]] = field(default_factory=list)
    delivered: int = 0


@dataclass(slots=True)
class Recording:
    """A recorded run.

    Attributes:
        engine: its configuration. requests: by number, in order of arrival. steps: in order.
        aborts: (request, step, whether that one was under way): before or in which a request went away.
        cost_ns: what recording itself took.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    requests: dict[int, Added] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    aborts: list[tuple[int, int, bool]] = field(default_factory=list)
    cost_ns: int = 0


def read_recording(file: Path) -> Recording:
    """Read a recording.

    Raises:
        MeasureError: the file is none.
    """
    try:
        return parse_recording(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise MeasureError(
            f"not a recording of vLLM's scheduler ({type(error).__name__}: {error})",
            str(file),
            "Record with servecast's calibrate/measure/vllm/recording_scheduler.py.",
        ) from error


def parse_recording(text: str) -> Recording:
    """The lines of a recording, of which the last one may be half written.

    Raises:
        ValueError, KeyError, IndexError, TypeError: it is none.
    """
    found = Recording()
    received: dict[int, int] = {}
    gone: list[int] = []
    results = 0
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            kind, *rest = json.loads(line)
        except ValueError:
            if number == len(lines) > 1:
                break
            raise
        if kind == "engine":
            found.engine = rest[0]
        elif kind == "received":
            received[rest[1]] = rest[0]
        elif kind == "add":
            at, request, prompt, max_tokens, priority, hashes = rest
            at = received.get(request, at)
            found.requests[request] = Added(at, prompt, max_tokens, priority, hashes, len(found.steps))
        elif kind == "abort":
            gone += rest[1]
        elif kind == "schedule":
            found.aborts += [(request, len(found.steps), False) for request in gone]
            began, decided, scheduled, preempted, free_blocks = rest
            found.steps.append(Step(began, decided, scheduled, preempted, free_blocks, results))
            gone = []
        elif kind == "update":
            found.aborts += [
                (request, len(found.steps) - 1, True) for request in gone
            ]  # came in the meantime
            gone = []
            if results < len(found.steps):  # otherwise that of a step before a part of a recording
                step = found.steps[results]
                _, step.ended, step.finished, step.delivered = rest
                results += 1
        elif kind == "cost":
            found.cost_ns = rest[1]
        else:
            raise ValueError(f"a line of kind {kind!r}")
    return found
