"""What a workload is made of, as a scenario writes it: streams, stages, sweeps, and plans."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, Count, Flag, Model, NonNegative, Positive, invalid, within
from servecast.sim.traffic.adapters import LoraTrafficSplit, StructuredOutputs
from servecast.sim.traffic.arrivals import (
    Arrivals,
    ClosedLoop,
    Constant,
    Gamma,
    Poisson,
    Profile,
    Timestamps,
    VllmBench,
)
from servecast.sim.traffic.content import Content, SharedPrefix, Unique
from servecast.sim.traffic.lengths import Correlation, Lengths, check_pair
from servecast.sim.traffic.media import MediaSpec
from servecast.sim.traffic.session_spec import SessionSpec
from servecast.sim.traffic.trace_spec import TraceSpec

Row = dict[str, int | float | str]  # keys of a reported table's row, and their values


class StreamSpec(Model):
    """One client.

    A prompt is ``system_prompt_tokens``, the prefix of its group if ``content`` has groups, ``prompt_tokens``
    of its own, and ``suffix_tokens``; a chat template's tokens belong to the first and the last.
    """

    name: str = "requests"
    """Name of the stream, which also names its random numbers."""
    arrivals: Arrivals | None = None
    """When requests are sent."""
    num_requests: Count | None = None
    """How many requests."""
    duration_s: Positive | None = None
    """Send what arrives before this many seconds."""
    max_concurrency: Count | None = None
    """Most requests in flight; others wait in the client."""
    start_s: NonNegative = 0.0
    """Delay of the stream within its stage."""
    trace: TraceSpec | None = None
    """Recorded traffic, instead of drawn lengths and, unless ``arrivals`` is given, arrivals."""
    prompt_tokens: Lengths | None = None
    """Prompt lengths."""
    output_tokens: Lengths | None = None
    """Output lengths, as the model would end by itself."""
    length_correlation: Correlation | None = None
    """How outputs go with their prompts: the rank correlation (Spearman's) of the two, or ``rows``, drawn
    together from the rows of one table. Default, not at all."""
    max_tokens: Count | None = None
    """Limit given to the engine. Without it, each request's limit is its output length (``ignore_eos``)."""
    system_prompt_tokens: Amount = 0
    """Leading tokens that are the same in all prompts, and in all streams that have as many."""
    suffix_tokens: Amount = 0
    """Tokens behind each prompt, such as a chat template's."""
    content: Content | None = None
    """Which prompts share leading tokens. Default, none do."""
    sessions: SessionSpec | None = None
    """Each arrival is a session of several turns: rates, numbers of requests and a closed loop's concurrency
    are of sessions, ``prompt_tokens`` are what a turn adds."""
    priority: int = 0
    """Lower runs first under the ``priority`` policy."""
    abort_after_s: Positive | None = None
    """The client gives up this long after sending."""
    lora_traffic_split: LoraTrafficSplit | None = None
    """Share of the requests of each LoRA adapter by its name; the others use the base model."""
    structured_outputs: StructuredOutputs | None = None
    """Requests whose output follows a grammar. Default, none."""
    media: MediaSpec | None = None
    """Images and videos in the prompts, whose tokens come on top of ``prompt_tokens``. Default, none."""
    background: Flag = False
    """Stop this stream when the others of its stage are done."""

    @model_validator(mode="after")
    def _lengths_once(self) -> StreamSpec:
        for name in ("prompt_tokens", "output_tokens"):
            if (getattr(self, name) is None) == (self.trace is None):
                what = f"{name} is missing" if self.trace is None else f"{name} beside a trace"
                fix = "Add it." if self.trace is None else "Remove it: the trace has the lengths."
                raise invalid(what, fix, at=name)
        if self.trace is not None and not (self.content is None or isinstance(self.content, Unique)):
            fix = "Remove it to use the trace's hash ids, or make it unique."
            raise invalid(f"content {self.content.kind} beside a trace", fix, at="content")
        if self.length_correlation is not None:
            self.check_lengths(self.length_correlation)
        if self.media is not None:
            again = isinstance(self.content, SharedPrefix) and self.content.prompts_per_group is not None
            if self.trace is not None or self.sessions is not None:
                raise invalid(
                    "media of recorded requests or sessions is not modelled", "Remove it.", at="media"
                )
            if again or not isinstance(self.content, Unique | SharedPrefix | None):
                raise invalid("media in prompts that come again is not modelled", "Remove it.", at="media")
        if self.talks:
            self._check_sessions()
        if isinstance(self.arrivals, ClosedLoop) and self.max_concurrency is not None and not self.talks:
            fix = "Remove it: concurrency says it."
            raise invalid("max_concurrency beside a closed loop", fix, at="max_concurrency")
        return self

    @property
    def talks(self) -> bool:
        """Whether its requests wait for others of their session."""
        return self.sessions is not None or (self.trace is not None and self.trace.waits)

    def _check_sessions(self) -> None:
        spec, content = self.sessions, self.content
        for name in ("lora_traffic_split", "structured_outputs"):
            if getattr(self, name) is not None:
                raise invalid(f"{name} of sessions is not modelled", "Remove it.", at=name)
        if self.trace is not None:
            if spec is not None:
                raise invalid("sessions beside a trace, which has its own", "Remove them.", at="sessions")
            for name in ("system_prompt_tokens", "suffix_tokens"):
                if getattr(self, name):
                    raise invalid(f"{name} beside recorded sessions", "Remove it.", at=name)
            return
        assert spec is not None
        if self.length_correlation is not None:
            raise invalid("a correlation of turns is not modelled", "Remove it.", at="length_correlation")
        if content is not None and not isinstance(content, Unique | SharedPrefix):
            what = f"content {content.kind} of sessions, which go on differently"
            raise invalid(what, "Remove it, or use shared_prefix.", at="content")
        each = content.prompts_per_group if isinstance(content, SharedPrefix) else None
        if (
            isinstance(content, SharedPrefix)
            and each is not None
            and (spec.users != content.groups * each or content.order != "cycle")
        ):
            fix = "Remove it, or give as many users as groups x prompts_per_group, and order: cycle."
            raise invalid("prompts_per_group of sessions", fix, at="content.prompts_per_group")
        if spec.prefix_again and (spec.users is None or not isinstance(content, SharedPrefix)):
            what = "prefix_again without users and a shared prefix"
            raise invalid(what, "Remove it.", at="sessions.prefix_again")

    def check_lengths(self, correlation: Correlation) -> None:
        """Refuse prompts and outputs that cannot go together so."""
        if self.prompt_tokens is None or self.output_tokens is None:
            what = "length_correlation beside a trace, which has its own"
            raise invalid(what, "Remove it.", at="length_correlation")
        check_pair(self.prompt_tokens, self.output_tokens, correlation)
        again = isinstance(self.content, SharedPrefix) and self.content.prompts_per_group is not None
        if correlation == "rows" and again:
            what = "rows of a table for prompts that come again"
            raise invalid(what, "Give a rank correlation.", at="length_correlation")

    @property
    def own_arrivals(self) -> bool:
        """Whether the arrivals are those of its trace."""
        return self.trace is not None and self.arrivals is None

    def at_rate(self, request_rate: float, *, repeat: bool) -> dict[str, Any]:
        """The fields that change at another rate: a trace's own arrivals are stretched to it.

        Args:
            repeat: begin the trace anew where more requests are wanted than it has.

        Raises:
            PydanticCustomError: the arrivals have no rate.
        """
        if self.trace is not None:
            trace = self.trace.model_copy(update={"repeat": self.trace.repeat or repeat})
            if self.own_arrivals:
                return {"trace": trace.model_copy(update={"request_rate": request_rate})}
            return {"trace": trace, "arrivals": at_rate(self.arrivals, request_rate)}
        return {"arrivals": at_rate(self.arrivals, request_rate)}

    def check_complete(self) -> None:
        """Refuse a stream whose arrivals are not all given (as that of a sweep, before its levels)."""
        if self.length_correlation is not None:
            self.check_lengths(self.length_correlation)
        law = self.arrivals
        if law is None and self.trace is None:
            raise invalid("arrivals is missing", "Add it, for example {kind: poisson, request_rate: 2}.")
        own_end = self.trace is not None or isinstance(law, Timestamps | Profile)
        if self.num_requests is None and self.duration_s is None and not own_end:
            raise invalid("the stream has no end", "Give num_requests or duration_s.")
        by_count = isinstance(law, VllmBench) and (
            law.ramp_up_strategy is not None or math.isinf(law.request_rate)
        )
        if by_count and self.duration_s is not None:
            what = "these arrivals are a number of requests, not a duration"
            raise invalid(what, "Give num_requests instead.", at="duration_s")


class Polling(Model):
    """How a load generator notices that a stage is done: it looks now and then."""

    after_s: NonNegative = 0.0
    """First look, in seconds from the start of the stage."""
    every_s: Positive
    """Between looks."""
    pause_s: NonNegative = 0.0
    """From the look that finds all done to the next stage."""

    def end_s(self, done_s: float) -> float:
        """When the next stage starts if all requests are done at ``done_s``, both from the stage's start."""
        looks = max(0, math.ceil((done_s - self.after_s) / self.every_s))
        return self.after_s + looks * self.every_s + self.pause_s


class StageSpec(Model):
    """Streams that run together."""

    streams: tuple[StreamSpec, ...] = Field(min_length=1)
    """Streams that run together."""
    name: str | None = None
    """Name of the stage in results."""
    drain: Flag = True
    """Wait for all requests before the next stage."""
    polling: Polling | None = None
    """How the load generator notices that they are done. Without it, at once."""
    duration_s: Positive | None = None
    """Without ``drain``, when the next stage starts."""
    row: Row | None = None
    """Keys of the reported row that this stage reproduces."""

    @model_validator(mode="after")
    def _complete(self) -> StageSpec:
        if self.drain == (self.duration_s is not None):
            fix = "Remove duration_s." if self.drain else "Give duration_s, when the next stage starts."
            raise invalid(f"drain: {str(self.drain).lower()} with duration_s: {self.duration_s}", fix)
        if self.polling is not None and not self.drain:
            raise invalid("polling without drain", "Remove it: duration_s ends the stage.", at="polling")
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            what = "two streams of one name"
            raise invalid(what, "Give each stream of a stage its own name.", at="streams")
        for stream in self.streams:
            stream.check_complete()
        if all(stream.background for stream in self.streams):
            raise invalid("all streams are background", "A background stream stops with the others.")
        return self


class Workload(Model):
    """Traffic of several stages."""

    stages: tuple[StageSpec, ...] = Field(min_length=1)
    """Stages, one after the other, on servers that keep their state (and prefix cache) between them."""


class Level(Model):
    """One level of a sweep: what differs from the workload's stream."""

    concurrency: Count | None = None
    """Closed loop at this concurrency."""
    request_rate: Positive | None = None
    """Open loop at this rate, in requests a second."""
    num_requests: Count | None = None
    """Instead of the stream's."""
    duration_s: Positive | None = None
    """Instead of the stream's."""
    prompt_tokens: Lengths | None = None
    """Instead of the stream's."""
    output_tokens: Lengths | None = None
    """Instead of the stream's."""
    max_tokens: Count | None = None
    """Instead of the stream's."""
    row: Row | None = None
    """Keys of the reported row that this level reproduces. Default, its concurrency or request rate."""

    @model_validator(mode="after")
    def _one_axis(self) -> Level:
        if self.concurrency is not None and self.request_rate is not None:
            raise invalid("concurrency and request_rate in one level", "Give one of them.")
        return self


class Sweep(Model):
    """Levels of one stream, run one after the other in one run."""

    levels: tuple[Level, ...] = Field(min_length=1)
    """The levels, in order."""
    drain: Flag = True
    """Wait for all requests of a level before the next."""

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
            more = level.num_requests is not None or level.duration_s is not None
            changes |= stream.at_rate(level.request_rate, repeat=more)
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
    """The open-loop traffic that ``plan`` probes: what differs from the workload's (first) stream."""

    arrivals: Literal["poisson", "gamma", "constant", "vllm_bench"] = "poisson"
    """Arrival law. Open loops and traces keep their own unless this is given."""
    burstiness: Positive | None = None
    """Shape of the gaps under ``gamma`` and ``vllm_bench``."""
    num_requests: Count | None = None
    """Requests of the stream; ``plan`` picks its own number."""
    duration_s: Positive | None = None
    """Instead of a number of requests."""
    prompt_tokens: Lengths | None = None
    """Instead of the stream's."""
    output_tokens: Lengths | None = None
    """Instead of the stream's."""
    max_tokens: Count | None = None
    """Instead of the stream's."""
    content: Content = Unique()
    """Which prompts share leading tokens. Default, those of an open loop; none in place of closed loops."""
    keep_content: Flag = False
    """The prompts are those of the workload."""

    @model_validator(mode="after")
    def _burst(self) -> PlanSpec:
        if self.burstiness is not None and self.arrivals not in ("gamma", "vllm_bench"):
            raise invalid(f"{self.arrivals} arrivals have no burstiness", "Use gamma.", at="burstiness")
        if self.keep_content and "content" in self.model_fields_set:
            raise invalid("content beside keep_content", "Give one of them.", at="content")
        return self

    def of(self, stream: StreamSpec, *, swept: bool = False) -> StreamSpec:
        """The stream to probe, at 1 request/s, or where it keeps its arrivals at their rate.

        Args:
            swept: it is one of several stages or levels, so that its arrivals are not the traffic's.

        Raises:
            InputError: the plan has what the stream's trace has.
        """
        burstiness = self.burstiness or 1.0
        laws: dict[str, Arrivals] = {
            "poisson": Poisson(kind="poisson", request_rate=1.0),
            "gamma": Gamma(kind="gamma", request_rate=1.0, burstiness=burstiness),
            "constant": Constant(kind="constant", request_rate=1.0),
            "vllm_bench": VllmBench(kind="vllm_bench", request_rate=1.0, burstiness=burstiness),
        }
        no_extent = self.num_requests is None and self.duration_s is None
        law: Arrivals | None = laws[self.arrivals]
        open_loop = not (swept or stream.arrivals is None or isinstance(stream.arrivals, ClosedLoop))
        if stream.trace is not None:
            self._check_beside_trace()
        if (open_loop or stream.trace is not None) and not {"arrivals", "burstiness"} & self.model_fields_set:
            law = None if isinstance(stream.arrivals, ClosedLoop | Timestamps) else stream.arrivals
        own = (open_loop or stream.trace is not None) and "content" not in self.model_fields_set
        changes: dict[str, Any] = {
            "arrivals": law,
            "content": stream.content if own or self.keep_content else self.content,
            "max_concurrency": stream.max_concurrency if open_loop else None,
            "num_requests": 1000 if no_extent else self.num_requests,
            "duration_s": self.duration_s,
        }
        for name in ("prompt_tokens", "output_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        planned = stream.model_copy(update=changes)
        if stream.length_correlation is not None:
            try:
                planned.check_lengths(stream.length_correlation)
            except PydanticCustomError as error:
                told = error.context or {}
                raise InputError(told["what"], where=f"plan: {told['at']}", fix=told["fix"]) from None
        return planned

    def _check_beside_trace(self) -> None:
        """Refuse what a trace has itself."""
        given = [name for name in ("prompt_tokens", "output_tokens") if getattr(self, name) is not None]
        if not isinstance(self.content, Unique):
            given.append("content")
        if given:
            what = f"{given[0]} for the plan of a trace, which has its own"
            raise InputError(what, where=f"plan.{given[0]}", fix="Remove it.")


def at_rate(law: Arrivals | None, request_rate: float) -> Arrivals:
    """The law at another rate; Poisson where there is none.

    Raises:
        PydanticCustomError: the law has no rate.
    """
    if law is None:
        return Poisson(kind="poisson", request_rate=request_rate)
    if isinstance(law, ClosedLoop) or (isinstance(law, VllmBench) and law.ramp_up_strategy):
        fix = "Use open-loop arrivals, such as poisson; for a plan, give them in a 'plan' block."
        raise invalid(f"{law.kind} arrivals have no rate to set", fix)
    return law.model_copy(update={"request_rate": request_rate})
