"""What is sent to the servers: a workload's requests, drawn at random.

A stream's arrivals, prompt lengths, output lengths and contents come from generators of their own, one set
for each stream name, so that a change of one leaves the others as they were. A stream that comes again in
a later stage goes on drawing, except that ``content: repeat`` starts over with the same prompts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import PydanticCustomError

from servecast.sim.engine.request import Content, Requests, Stage, Stream
from servecast.sim.inputs.errors import InputError
from servecast.sim.traffic.adapters import choose
from servecast.sim.traffic.arrivals import ClosedLoop, Extent, Times, replay
from servecast.sim.traffic.content import ContentIds, Repeat, Same, SharedPrefix, Unique
from servecast.sim.traffic.lengths import draw_outputs
from servecast.sim.traffic.measured_lengths import Tokens
from servecast.sim.traffic.media import carry
from servecast.sim.traffic.sessions import Begins, session_stream
from servecast.sim.traffic.spec import StreamSpec, Workload
from servecast.sim.traffic.trace_spec import TraceSpec
from servecast.sim.traffic.traces import Trace


def with_request_rate(
    workload: Workload, request_rate: float, *, num_requests: int | None = None
) -> Workload:
    """The workload at another rate (requests/s over all its foreground streams, in their proportion).

    Built with the same generators it has the same lengths, contents and gaps, only stretched in time:
    common random numbers for the probes of a search.

    Args:
        num_requests: of all foreground streams, in place of their own extent.

    Raises:
        InputError: the workload has several stages, or arrivals without a rate.
    """
    if len(workload.stages) != 1:
        what = f"a workload of {len(workload.stages)} stages has no single request rate"
        fix = "Give the open-loop traffic to probe in a 'plan' block."
        raise InputError(what, where="workload.stages", fix=fix)
    stage = workload.stages[0]
    front = [stream for stream in stage.streams if not stream.background]
    shares = [1.0]
    if len(front) > 1:
        rates = [getattr(stream.arrivals, "request_rate", None) or 0.0 for stream in front]
        if not all(rates):
            where, fix = "workload.streams", "Give each foreground stream arrivals with a request_rate."
            raise InputError("streams without a request_rate cannot be scaled together", where, fix)
        shares = [rate / sum(rates) for rate in rates]
    scaled = {}
    for stream, share in zip(front, shares, strict=True):
        try:
            changes = stream.at_rate(request_rate * share, repeat=num_requests is not None)
        except PydanticCustomError as error:
            context = error.context or {}
            raise InputError(context["what"], where="workload.arrivals", fix=context["fix"]) from None
        if num_requests is not None:
            changes |= {"num_requests": max(1, round(num_requests * share)), "duration_s": None}
        scaled[stream.name] = stream.model_copy(update=changes)
    streams = tuple(scaled.get(stream.name, stream) for stream in stage.streams)
    return Workload(stages=(stage.model_copy(update={"streams": streams}),))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A stream's numbers: arrival times, own prompt tokens, output tokens; which prompt, which group."""

    times: Times
    body: Tokens
    output: Tokens
    prompt: npt.NDArray[np.int64] | None = None  # index of the prompt, where prompts come again
    group: npt.NDArray[np.int64] | None = None
    trace: Trace | None = None


class _Generators:
    """The generators of one stream name, and its order of prompts once drawn."""

    def __init__(self, arrivals: Any, lengths: Any, content: Any) -> None:
        self.arrivals: np.random.Generator = arrivals.spawn(1)[0]
        self.prompt, self.output = lengths.spawn(1)[0].spawn(2)
        self.content: np.random.Generator = content.spawn(1)[0]
        self.cycle: npt.NDArray[np.int64] | None = None


CLOSED_LOOP_REQUESTS = 1024


def draw(workload: Workload, seed: int, *, closed_loop: int = CLOSED_LOOP_REQUESTS) -> list[Stage]:
    """Draw the workload's requests, which count from 0 over all stages, and are the same whoever draws them.

    Args:
        closed_loop: requests of each closed loop that only its duration ends.

    Raises:
        InputError: a trace cannot be read or is too short.
    """
    arrivals, lengths, content = np.random.default_rng(seed).spawn(3)
    generators: dict[str, _Generators] = {}
    drawn: list[list[_Drawn]] = []
    for stage in workload.stages:
        drawn.append([])
        for stream in stage.streams:
            if stream.name not in generators:
                generators[stream.name] = _Generators(arrivals, lengths, content)
            drawn[-1].append(_draw(stream, generators[stream.name], closed_loop))

    texts: dict[str, set[int]] = {}  # text -> lengths at which a prompt leaves it
    for stage, numbers in zip(workload.stages, drawn, strict=True):
        for stream, d in zip(stage.streams, numbers, strict=True):
            if isinstance(stream.content, Same):
                texts.setdefault(stream.content.text, set()).update(np.unique(d.body).tolist())

    ids, adapters = ContentIds(), dict[str, int]()
    stages: list[Stage] = []
    request_id = 0
    for index, (stage, numbers) in enumerate(zip(workload.stages, drawn, strict=True)):
        streams: list[Stream] = []
        for stream, d in zip(stage.streams, numbers, strict=True):
            if stream.talks:
                begins = _begins(stream, d, ids)
                rngs = generators[stream.name]
                each = (rngs.prompt, rngs.output, rngs.content)
                streams.append(session_stream(stream, begins, ids, request_id, index, each))
                request_id += len(streams[-1].requests)
                continue
            requests = _requests(stream, d, _contents(stream, d, ids, texts), request_id)
            if stream.media is not None:
                named_stream = f"{index} {stream.name}"
                requests = carry(requests, stream.media, stream.suffix_tokens, ids, seed, named_stream)
            if stream.lora_traffic_split or stream.structured_outputs:
                named = (seed, f"{index} {stream.name}")
                split = stream.lora_traffic_split or {}
                requests = choose(requests, split, adapters, stream.structured_outputs, ids, named)
            request_id += len(requests)
            limit, until_s = stream.max_concurrency, None
            if isinstance(stream.arrivals, ClosedLoop):
                limit, until_s = stream.arrivals.concurrency, stream.duration_s
            streams.append(Stream(stream.name, requests, limit, stream.background, until_s))
        name = stage.name or (f"stage {index}" if len(workload.stages) > 1 else "all")
        end_s = None if stage.polling is None else stage.polling.end_s
        stages.append(Stage(name, streams, stage.drain, stage.duration_s, end_s))
    return stages


def _draw(stream: StreamSpec, rngs: _Generators, closed_loop: int) -> _Drawn:
    extent = Extent(stream.num_requests, stream.duration_s, closed_loop)
    if stream.trace is not None:
        draw_it = _draw_recorded_sessions if stream.trace.waits else _draw_trace
        return draw_it(stream, stream.trace, extent, rngs)
    assert stream.arrivals is not None
    times = stream.arrivals.times(extent, rngs.arrivals) + stream.start_s
    if stream.sessions is not None:
        which = None
        if isinstance(stream.content, SharedPrefix):
            which = _which_prompt(stream.content, len(times), rngs)
        return _Drawn(times, times[:0].astype(np.int64), times[:0].astype(np.int64), which)
    assert stream.prompt_tokens is not None
    assert stream.output_tokens is not None
    prompt_rng, output_rng = rngs.prompt, rngs.output
    if isinstance(stream.content, Repeat):
        prompt_rng, output_rng = copy.deepcopy(prompt_rng), copy.deepcopy(output_rng)
    together = stream.length_correlation
    if together == "rows":
        output_rng = copy.deepcopy(prompt_rng)
    which = group = body = None
    if isinstance(stream.content, SharedPrefix):
        which, each = _which_prompt(stream.content, len(times), rngs), stream.content.prompts_per_group
        group = which // (each or 1)
        if each is not None:
            distinct = stream.content.groups * each
            body = stream.prompt_tokens.draw(distinct, copy.deepcopy(prompt_rng))[which]
    if body is None:
        body = stream.prompt_tokens.draw(len(times), prompt_rng)
    output = draw_outputs(stream.output_tokens, body, together, output_rng)
    return _Drawn(times, body, output, which, group)


def _which_prompt(content: SharedPrefix, n: int, rngs: _Generators) -> npt.NDArray[np.int64]:
    """Index of each request's prompt among groups x prompts_per_group."""
    distinct = content.groups * (content.prompts_per_group or 1)
    if content.order == "random":
        return rngs.content.integers(0, distinct, size=n)
    if rngs.cycle is None:
        rngs.cycle = rngs.content.permutation(distinct)
    return rngs.cycle[np.arange(n) % distinct]


def _draw_trace(
    stream: StreamSpec, spec: TraceSpec, extent: Extent, rngs: _Generators, trace: Trace | None = None
) -> _Drawn:
    trace = spec.read() if trace is None else trace
    wanted = 0 if extent.num_requests is None or extent.duration_s is not None else extent.num_requests
    times = None
    if stream.arrivals is not None:
        if extent.num_requests is None and extent.duration_s is None:
            extent = Extent(num_requests=len(trace), duration_s=None)
        times = stream.arrivals.times(extent, rngs.arrivals)
        if isinstance(stream.arrivals, ClosedLoop) and not spec.repeat and extent.num_requests is None:
            times = times[: len(trace)]
        wanted = len(times)
    elif spec.request_rate is not None and len(trace) > 0 and trace.times_s[-1] <= 0:
        where, fix = str(spec.path), "Give the workload arrivals with a request_rate, or remove the rate."
        raise InputError("all its requests come at once, so there is no rate to change", where, fix)
    elif spec.repeat and extent.duration_s is not None:
        rate = spec.request_rate or len(trace) / float(trace.times_s[-1] or math.inf)
        wanted = extent.num_requests or math.ceil(rate * extent.duration_s) + 1
    if spec.repeat:
        trace = trace.repeated(-(-wanted // len(trace)))
    elif wanted > len(trace):
        what = f"the trace has {len(trace)} requests, {wanted} are wanted"
        fix = "Lower num_requests, duration_s or the rate, give a longer trace, or set its repeat to true."
        raise InputError(what, where=str(spec.path), fix=fix)
    if times is None:
        times = replay(trace.times_s, spec.request_rate, extent)
    trace = trace.take(slice(len(times)))
    return _Drawn(
        times + stream.start_s, trace.prompt_tokens, trace.output_tokens, group=trace.sessions, trace=trace
    )


def _draw_recorded_sessions(stream: StreamSpec, spec: TraceSpec, extent: Extent, rngs: _Generators) -> _Drawn:
    """The sessions of a trace; ``times`` are those at which they begin."""
    trace = spec.read()
    if trace.sessions is None:
        where, fix = str(spec.path), "Name their column (columns: {session: ...}), or leave turns out."
        raise InputError("its requests have no sessions, so no turn can wait for another", where, fix)
    firsts = np.sort(np.unique(trace.sessions, return_index=True)[1])
    recorded = replace(trace.take(firsts), hash_ids=None)
    begins = _draw_trace(stream, spec, extent, rngs, recorded)
    assert begins.trace is not None
    wanted = begins.trace.sessions
    assert wanted is not None
    if len(wanted) > len(firsts):
        trace = trace.repeated(-(-len(wanted) // len(firsts)))
    return replace(begins, trace=trace)


def _begins(stream: StreamSpec, d: _Drawn, ids: ContentIds) -> Begins:
    """When a stream's sessions begin, and with what."""
    parts: list[Content] = []
    if d.trace is not None:
        assert stream.trace is not None
        parts = [()] * len(d.trace)
        if d.trace.hash_ids is not None and stream.content is None:
            parts = _hashed_parts((), 0, d.trace, ids.first("trace", stream.trace.path, 0))
    return Begins(d.times, d.prompt, d.trace, parts)


Contents = tuple[list[Content], npt.NDArray[Any]]  # different ones, and which of them each request has


def _contents(stream: StreamSpec, d: _Drawn, ids: ContentIds, texts: dict[str, set[int]]) -> Contents:
    """The requests' shared parts (see ``Request.content``)."""
    system, content, count = stream.system_prompt_tokens, stream.content, len(d.times)
    front: Content = ((ids.first("system", system), system),) if system else ()
    if d.trace is not None and d.trace.hash_ids is not None and content is None:
        assert stream.trace is not None
        first = ids.first("trace", stream.trace.path, system)
        return _hashed_parts(front, system, d.trace, first), np.arange(count)
    if content is None or isinstance(content, Unique):
        return [front], np.zeros(count, np.int32)
    totals = system + d.body + stream.suffix_tokens
    if isinstance(content, Repeat):
        first = ids.first("repeat", stream.name, system, repr(stream.prompt_tokens), stream.suffix_tokens)
        return [(*front, (first + i, total)) for i, total in enumerate(totals.tolist())], np.arange(count)
    if isinstance(content, Same):
        text = ids.first("text", content.text, system)
        end = ids.first("end of text", content.text, system, stream.suffix_tokens)
        cuts = sorted(texts[content.text])
        lengths, which = np.unique(d.body, return_inverse=True)
        parts: list[Content] = [
            (
                *front,
                *((text + cut, system + cut) for cut in cuts if cut <= length),
                *(((end + length, system + length + stream.suffix_tokens),) if stream.suffix_tokens else ()),
            )
            for length in lengths.tolist()
        ]
        return parts, which
    assert d.prompt is not None
    assert d.group is not None
    prefix = ids.first("prefix", stream.name, system, content.prefix_tokens)
    heads = [(*front, (prefix + group, system + content.prefix_tokens)) for group in range(content.groups)]
    if content.prompts_per_group is None:
        return heads, d.group
    whole = ids.first("prompt", stream.name, system, content.prefix_tokens)
    prompts, at, which = np.unique(d.prompt, return_index=True, return_inverse=True)
    ends = (totals[at] + content.prefix_tokens).tolist()
    rows = zip(d.group[at].tolist(), prompts.tolist(), ends, strict=True)
    return [(*heads[group], (whole + prompt, end)) for group, prompt, end in rows], which


def replayed(trace: Trace, max_concurrency: int | None = None) -> list[Stage]:
    """A trace's requests as they stand there: one stage, sent by one client."""
    count, hashed = len(trace), trace.hash_ids is not None
    requests = Requests(
        np.arange(count),
        trace.times_s,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.output_tokens,
        np.arange(count, dtype=np.int32) if hashed else np.zeros(count, np.int32),
        _hashed_parts((), 0, trace, 0) if hashed else [()],
    )
    return [Stage("all", [Stream("requests", requests, max_concurrency)])]


def _hashed_parts(front: Content, system: int, trace: Trace, first: int) -> list[Content]:
    assert trace.hash_ids is not None
    dense: dict[int, int] = {}
    block = trace.block_tokens
    return [
        front
        + tuple(
            (first + dense.setdefault(hash_id, len(dense)), system + min((j + 1) * block, length))
            for j, hash_id in enumerate(hash_ids)
        )
        for hash_ids, length in zip(trace.hash_ids, trace.prompt_tokens.tolist(), strict=True)
    ]


def _requests(stream: StreamSpec, d: _Drawn, contents: Contents, first_id: int) -> Requests:
    extra = stream.system_prompt_tokens + stream.suffix_tokens
    if isinstance(stream.content, SharedPrefix):
        extra += stream.content.prefix_tokens
    count, limit = len(d.times), stream.max_tokens
    output = d.output if limit is None else np.minimum(d.output, limit)
    return Requests(
        np.arange(first_id, first_id + count),
        d.times,
        d.body + extra if extra else d.body,
        output,
        output if limit is None else np.full(count, limit),
        contents[1].astype(np.int32, copy=False),
        contents[0],
        d.group,
        np.full(count, stream.priority) if stream.priority else None,
        None if stream.abort_after_s is None else np.full(count, float(stream.abort_after_s)),
    )


LONGEST_S = 90 * 86_400.0  # a run's clock counts picoseconds in 63 bits: 106 days


def check_requests(stages: list[Stage], max_model_len: int, *, where: str) -> None:
    """Refuse requests that the server would refuse: prompt and ``max_tokens`` beyond ``max_model_len``. And
    those that come later than can be simulated."""
    for stage in stages:
        for stream in stage.streams:
            requests = Requests.of(stream.requests)
            last_s = float(requests.arrival_s.max(initial=0.0))
            if last_s > LONGEST_S:
                raise InputError(
                    f"requests arrive over {last_s / 86_400:.4g} days (stage {stage.name!r}, stream "
                    f"{stream.name!r}), more than {LONGEST_S / 86_400:.0f}",
                    where=where,
                    fix="Give fewer requests or a higher rate; of a trace a window (from, to).",
                )
            too_long = requests.prompt_tokens + requests.max_tokens > max_model_len
            if too_long.any():
                request = requests[int(too_long.argmax())]
                raise InputError(
                    f"request {request.request_id} (stage {stage.name!r}, stream {stream.name!r}) of "
                    f"{request.prompt_tokens} prompt tokens and max_tokens {request.max_tokens} "
                    f"is longer than max_model_len {max_model_len}",
                    where=where,
                    fix="Shorten the lengths, bound their distribution, or raise engine.max_model_len.",
                )
