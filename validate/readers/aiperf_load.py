"""The load of an aiperf or a genai-perf run, out of the configuration that either repeats in its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from servecast.validate.readers.reading import Context, Part, Rate, Slots, expect

FORM, GENAI_PERF = "aiperf", "genai-perf"
_SHAPES = {"poisson": 1.0, "constant": math.inf}


class _Load(Part):
    model: str | None = None
    endpoint: str | None = None
    rate: Rate | None = None
    concurrency: Slots | None = None
    pattern: str | None = None
    smoothness: Rate | None = None


def load_of(config: Any, version: str | None, source: str) -> Context:
    """What a run was asked for. aiperf has a list of phases since 0.10, and had a ``loadgen`` before;
    genai-perf a stimulus of its perf_analyzer, and before 0.0.14 its flags as they were.

    Args:
        version: of aiperf, None where the file does not say: then its configuration tells which tool it is.

    Raises:
        InputError: a part is there and not what it should be.
    """
    loadgen, phases = _at(config, "loadgen"), _at(config, "phases")
    tool = FORM
    if isinstance(phases, list):
        phase = next((each for each in phases if _at(each, "kind") in (None, "profiling")), None)
        said = {"rate": _at(phase, "rate"), "concurrency": _at(phase, "concurrency")}
        said |= {"pattern": _at(phase, "type"), "smoothness": _at(phase, "smoothness")}
    elif loadgen is not None:
        said = {"rate": _at(loadgen, "request_rate"), "concurrency": _at(loadgen, "concurrency")}
        said["pattern"] = _at(loadgen, "arrival_pattern") or _at(loadgen, "request_rate_mode")
        said["smoothness"] = _at(loadgen, "arrival_smoothness")
    else:
        tool = FORM if version is not None else GENAI_PERF
        stimulus = _at(config, "perf_analyzer", "stimulus")
        flags = stimulus if isinstance(stimulus, Mapping) else config
        said = {"rate": _at(flags, "request_rate"), "concurrency": _at(flags, "concurrency")}
    models = _at(config, "models", "items")
    names = _at(config, "endpoint", "model_names") or _at(config, "model_names") or _at(config, "model")
    said["model"] = _at(_only(models), "name") if models is not None else _only(names)
    said["endpoint"] = _at(config, "endpoint", "type") or _at(config, "endpoint_type")
    load = expect(_Load, {k: v for k, v in said.items() if v not in (None, "")}, source=source, form=tool)
    closed = load.rate is None and load.concurrency is not None
    gamma = load.smoothness if load.pattern == "gamma" else None
    return Context(
        tool=tool,
        tool_version=version,
        backend=load.endpoint,
        model=load.model,
        request_rate=math.inf if closed else load.rate,
        max_concurrency=load.concurrency,
        burstiness=gamma if closed is False and gamma is not None else _SHAPES.get(load.pattern or ""),
    )


def _at(value: Any, *path: str) -> Any:
    """What lies at a path, None where nothing does."""
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _only(value: Any) -> Any:
    """The first of a list."""
    return (value[0] if value else None) if isinstance(value, list) else value
