"""What a workload is made of, as a scenario writes it: streams, stages, sweeps, and plans."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from servecast.sim.inputs.schema import Amount, Count, Flag, Model, NonNegative, Positive, invalid, within
from servecast.sim.traffic.arrivals import (
    Arrivals,
    ClosedLoop,
    Constant,
    Gamma,
    Poisson,
    Timestamps,
    VllmBench,
)
from servecast.sim.traffic.content import Content, Unique
from servecast.sim.traffic.lengths import Lengths
from servecast.sim.traffic.traces import TraceSpec

Row = dict[str, int | float | str]  # keys of a reported table's row, and their values


class StreamSpec(Model):
    """One client.

    A prompt is ``system_prompt_tokens`` (the same for all streams that have as many), the prefix of its
    group if ``content`` has groups, ``prompt_tokens`` of its own, and ``suffix_tokens``; a chat template's
    tokens belong to the first and the last. The model produces ``output_tokens``, at most ``max_tokens``;
    without ``max_tokens`` each request's limit is its output length (``ignore_eos``). A ``trace`` replaces
    lengths and, unless ``arrivals`` is given, arrivals. ``start_s`` delays the stream within its stage.
    """

    name: str = "requests"
    arrivals: Arrivals | None = None
    num_requests: Count | None = None
    duration_s: Positive | None = None
    max_concurrency: Count | None = None
    start_s: NonNegative = 0.0
    trace: TraceSpec | None = None
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    max_tokens: Count | None = None
    system_prompt_tokens: Amount = 0
    suffix_tokens: Amount = 0
    content: Content | None = None
    priority: int = 0
    abort_after_s: Positive | None = None
    background: Flag = False

    @model_validator(mode="after")
    def _lengths_once(self) -> StreamSpec:
        for name in ("prompt_tokens", "output_tokens"):
            if (getattr(self, name) is None) == (self.trace is None):
                what = f"{name} is missing" if self.trace is None else f"{name} beside a trace"
                fix = "Add it." if self.trace is None else "Remove it: the trace has the lengths."
                raise invalid(what, fix, at=name)
        if self.trace is not None and not (self.content is None or isinstance(self.content, Unique)):
            raise invalid(
                f"content {self.content.kind} beside a trace",
                "Remove it to use the trace's hash ids, or make it unique.",
                at="content",
            )
        if isinstance(self.arrivals, ClosedLoop) and self.max_concurrency is not None:
            raise invalid(
                "max_concurrency beside a closed loop",
                "Remove it: concurrency says it.",
                at="max_concurrency",
            )
        return self

    def check_complete(self) -> None:
        """Refuse a stream whose arrivals are not all given (as that of a sweep, before its levels)."""
        law = self.arrivals
        if law is None and self.trace is None:
            raise invalid("arrivals is missing", "Add it, for example {kind: poisson, request_rate: 2}.")
        own_end = self.trace is not None or isinstance(law, Timestamps)
        if self.num_requests is None and self.duration_s is None and not own_end:
            raise invalid("the stream has no end", "Give num_requests or duration_s.")
        by_count = isinstance(law, ClosedLoop) or (
            isinstance(law, VllmBench) and (law.ramp_up_strategy is not None or math.isinf(law.request_rate))
        )
        if by_count and self.duration_s is not None:
            what = "these arrivals are a number of requests, not a duration"
            raise invalid(what, "Give num_requests instead.", at="duration_s")


class Polling(Model):
    """How a load generator notices that a stage is done: from ``after_s`` after the stage's start it looks
    every ``every_s``, and waits another ``pause_s`` before the next stage."""

    after_s: NonNegative = 0.0
    every_s: Positive
    pause_s: NonNegative = 0.0

    def end_s(self, done_s: float) -> float:
        """When the next stage starts if all requests are done at ``done_s``, both from the stage's start."""
        looks = max(0, math.ceil((done_s - self.after_s) / self.every_s))
        return self.after_s + looks * self.every_s + self.pause_s


class StageSpec(Model):
    """Streams that run together. With ``drain`` the next stage waits until all requests are done, as its
    ``polling`` finds out (at once without), otherwise it starts after ``duration_s``. ``row`` names the row
    of a reported table that the stage reproduces."""

    streams: tuple[StreamSpec, ...] = Field(min_length=1)
    name: str | None = None
    drain: Flag = True
    polling: Polling | None = None
    duration_s: Positive | None = None
    row: Row | None = None

    @model_validator(mode="after")
    def _complete(self) -> StageSpec:
        if self.drain == (self.duration_s is not None):
            fix = "Remove duration_s." if self.drain else "Give duration_s, when the next stage starts."
            raise invalid(f"drain: {str(self.drain).lower()} with duration_s: {self.duration_s}", fix)
        if self.polling is not None and not self.drain:
            raise invalid("polling without drain", "Remove it: duration_s ends the stage.", at="polling")
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise invalid(
                "two streams of one name", "Give each stream of a stage its own name.", at="streams"
            )
        for stream in self.streams:
            stream.check_complete()
        if all(stream.background for stream in self.streams):
            raise invalid("all streams are background", "A background stream stops with the others.")
        return self


class Workload(Model):
    """Stages, one after the other, on servers that keep their state (and prefix cache) between them."""

    stages: tuple[StageSpec, ...] = Field(min_length=1)


class Level(Model):
    """One level of a sweep: what differs from the workload's stream."""

    concurrency: Count | None = None
    request_rate: Positive | None = None
    num_requests: Count | None = None
    duration_s: Positive | None = None
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    max_tokens: Count | None = None
    row: Row | None = None

    @model_validator(mode="after")
    def _one_axis(self) -> Level:
        if self.concurrency is not None and self.request_rate is not None:
            raise invalid("concurrency and request_rate in one level", "Give one of them.")
        return self


class Sweep(Model):
    """Levels of one stream, run one after the other in one run. A reported row belongs to the level whose
    ``row`` it matches; without ``row``, to that of its ``concurrency`` or ``request_rate``."""

    levels: tuple[Level, ...] = Field(min_length=1)
    drain: Flag = True

    def of(self, stream: StreamSpec) -> Workload:
        """The sweep's workload.

        Raises:
            PydanticCustomError: a level is incomplete; only while a scenario is validated.
        """
        stages = []
        for index, level in enumerate(self.levels):
            with within(f"sweep.levels.{index}"):
                stages.append(self._stage(stream, level, index))
        return Workload(stages=tuple(stages))

    def _stage(self, stream: StreamSpec, level: Level, index: int) -> StageSpec:
        same = {"row", "concurrency", "request_rate"}
        changes = {name: getattr(level, name) for name in level.model_fields_set - same}
        row = level.row
        if level.concurrency is not None:
            changes["arrivals"] = ClosedLoop(kind="closed_loop", concurrency=level.concurrency)
            row = row or {"concurrency": level.concurrency}
        elif level.request_rate is not None:
            changes["arrivals"] = at_rate(stream.arrivals, level.request_rate)
            row = row or {"request_rate": level.request_rate}
        at_level = stream.model_copy(update=changes)
        at_level.check_complete()
        if not self.drain and at_level.duration_s is None:
            raise invalid("a level without drain needs an end", "Add duration_s.", at="duration_s")
        return StageSpec(
            streams=(at_level,),
            name=" ".join(f"{key}={value}" for key, value in (row or {"level": index}).items()),
            row=row,
            drain=self.drain,
            duration_s=None if self.drain else at_level.duration_s,
        )


class PlanSpec(Model):
    """The open-loop traffic that ``plan`` probes: what differs from the workload's (first) stream. Prompts
    are unique unless ``content`` says otherwise, or ``keep_content`` that they are as in the workload."""

    arrivals: Literal["poisson", "gamma", "constant", "vllm_bench"] = "poisson"
    burstiness: Positive | None = None
    num_requests: Count | None = None
    duration_s: Positive | None = None
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    max_tokens: Count | None = None
    content: Content = Unique()
    keep_content: Flag = False

    @model_validator(mode="after")
    def _burst(self) -> PlanSpec:
        if self.burstiness is not None and self.arrivals not in ("gamma", "vllm_bench"):
            raise invalid(f"{self.arrivals} arrivals have no burstiness", "Use gamma.", at="burstiness")
        if self.keep_content and "content" in self.model_fields_set:
            raise invalid("content beside keep_content", "Give one of them.", at="content")
        return self

    def of(self, stream: StreamSpec) -> StreamSpec:
        """The stream to probe, at 1 request/s."""
        burstiness = self.burstiness or 1.0
        laws: dict[str, Arrivals] = {
            "poisson": Poisson(kind="poisson", request_rate=1.0),
            "gamma": Gamma(kind="gamma", request_rate=1.0, burstiness=burstiness),
            "constant": Constant(kind="constant", request_rate=1.0),
            "vllm_bench": VllmBench(kind="vllm_bench", request_rate=1.0, burstiness=burstiness),
        }
        no_extent = self.num_requests is None and self.duration_s is None
        content = stream.content if self.keep_content else self.content
        changes: dict[str, Any] = {
            "arrivals": laws[self.arrivals],
            "content": content if stream.trace is None else None,
            "max_concurrency": None,
            "num_requests": 1000 if no_extent else self.num_requests,
            "duration_s": self.duration_s,
        }
        for name in ("prompt_tokens", "output_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return stream.model_copy(update=changes)


def at_rate(law: Arrivals | None, request_rate: float) -> Arrivals:
    """The law at another rate; Poisson where there is none.

    Raises:
        PydanticCustomError: the law has no rate.
    """
    if law is None:
        return Poisson(kind="poisson", request_rate=request_rate)
    if isinstance(law, ClosedLoop) or (isinstance(law, VllmBench) and law.ramp_up_strategy):
        raise invalid(
            f"{law.kind} arrivals have no rate to set",
            "Use open-loop arrivals, such as poisson; for a plan, give them in a 'plan' block.",
        )
    return law.model_copy(update={"request_rate": request_rate})
