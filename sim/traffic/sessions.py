"""Sessions as requests that wait for each other, drawn or recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from servecast.sim.engine.request import Request, Stream
from servecast.sim.inputs.errors import InputError
from servecast.sim.traffic.arrivals import ClosedLoop, Times
from servecast.sim.traffic.content import ContentIds, SharedPrefix
from servecast.sim.traffic.session_spec import SessionSpec, ToolSpec
from servecast.sim.traffic.spec import StreamSpec
from servecast.sim.traffic.traces import Trace

Parts = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class SessionRequest(Request):
    """A request of a session, whose ``group`` is its session.

    It is sent ``delay_s`` after the last of ``after`` (ids of earlier requests of the session) has ended, and
    not before ``arrival_s``; where one of them failed, never. Its content goes on over its output, which is a
    part of the next turn's prompt. turn: from 1.
    """

    after: tuple[int, ...] = ()
    delay_s: float = 0.0
    turn: int = 1


@dataclass(slots=True)
class SessionStream(Stream):
    """A client of sessions. At most ``max_sessions`` of them are going on, and others wait to begin; as
    elsewhere ``max_concurrency`` bounds the requests in flight."""

    max_sessions: int | None = None


class _Law(Protocol):
    def draw(self, n: int, rng: np.random.Generator) -> Any: ...


def _supply(law: _Law | None, rng: np.random.Generator) -> Callable[[], Any]:
    """A law's draws one by one, so that more sessions begin with the same ones."""

    def draws() -> Iterator[Any]:
        while law is not None:
            yield from law.draw(1024, rng).tolist()

    return partial(next, draws())


@dataclass(slots=True)
class Conversation:
    """What one model has read and written: its shared beginning, the id of the rest, tokens so far."""

    front: Parts
    content_id: int
    tokens: int


class Script:
    """Writes the requests of a stream's sessions down.

    Args:
        extras: what they have in common: suffix_tokens, max_tokens (the limit given, or None), priority and
            abort_after_s. first_id: id of the first. first_content: of the range of content ids that are
            theirs.
        longest: no request is longer.
    """

    def __init__(
        self, extras: dict[str, Any], first_id: int, first_content: int, longest: int | None = None
    ) -> None:
        self.requests: list[Request] = []
        self._extras, self._first_id, self._content, self._longest = extras, first_id, first_content, longest

    @property
    def next_id(self) -> int:
        return self._first_id + len(self.requests)

    def begin(self, front: Parts, own_tokens: int = 0) -> Conversation:
        """A conversation behind its shared parts and so many tokens of its own."""
        self._content += 1
        return Conversation(front, self._content - 1, (front[-1][1] if front else 0) + own_tokens)

    def ask(self, talk: Conversation, new: int, output: int, **fields: Any) -> int | None:
        """One request, of what was said and so many new tokens. Returns its id, or None where it would be too
        long."""
        limit = self._extras["max_tokens"]
        prompt, output = talk.tokens + new + self._extras["suffix_tokens"], min(output, limit or output)
        if self._longest is not None and prompt + (limit or output) > self._longest:
            return None
        talk.tokens = prompt + output
        return self.add(prompt, output, (*talk.front, (talk.content_id, talk.tokens)), **fields)

    def add(self, prompt: int, output: int, content: Parts, **fields: Any) -> int:
        """One request as it stands. Returns its id."""
        found = {"request_id": self.next_id, "arrival_s": 0.0} | fields
        rest = {name: self._extras[name] for name in ("priority", "abort_after_s")}
        most = self._extras["max_tokens"] or output
        self.requests.append(
            SessionRequest(
                prompt_tokens=prompt, output_tokens=output, max_tokens=most, content=content, **rest, **found
            )
        )
        return int(found["request_id"])


class _Uniform:
    def draw(self, n: int, rng: np.random.Generator) -> Any:
        return rng.random(n)


class _Tools:
    """What tools do, call by call."""

    def __init__(self, spec: ToolSpec | None, output: Callable[[], Any], rng: np.random.Generator) -> None:
        laws = (None,) * 5 if spec is None else (
            _Uniform(), spec.calls, spec.seconds, spec.result_tokens, spec.output_tokens
        )  # fmt: skip
        supplies = [_supply(law, each) for law, each in zip(laws, rng.spawn(5), strict=True)]
        self._uniform, self._calls, self.seconds, self.result, written = supplies
        self.output = output if spec is None or spec.output_tokens is None else written
        self._share = 0.0 if spec is None else spec.share

    def calls(self) -> int:
        """How many a turn makes."""
        return int(self._calls()) if self._share and self._uniform() < self._share else 0


def write_sessions(
    script: Script,
    spec: SessionSpec,
    lengths: tuple[_Law, _Law],
    begins: Sequence[tuple[float, Parts]],
    sub_agent: Parts,
    rng: np.random.Generator,
) -> None:
    """Sessions drawn at random.

    Args:
        lengths: laws of prompts and outputs. begins: when each session begins, and what its prompts begin
        with. sub_agent: what those of its agents begin with.
    """
    agents = spec.sub_agents
    laws: list[_Law | None] = [*lengths, spec.turns, spec.think_s, spec.context_tokens, _Uniform()]
    laws += [None] * 3 if agents is None else [agents.agents, agents.prompt_tokens, agents.calls]
    *rngs, of_tools = rng.spawn(len(laws) + 1)
    supplies = [_supply(law, each) for law, each in zip(laws, rngs, strict=True)]
    prompt, output, turns, think, context, uniform, count, task, steps = supplies
    tools = _Tools(spec.tools, output, of_tools)

    def fan_out(parent: int, group: int, turn: int) -> tuple[tuple[int, ...], int]:
        """Agents at work. Returns the last request of each, and the tokens of their answers."""
        ends, answers = list[int](), 0
        for _ in range(count()):
            talk, new, last, delay, answer = script.begin(sub_agent), task(), parent, 0.0, 0
            for left in range(steps(), -1, -1):
                tokens = tools.output() if left else output()
                known = {"after": (last,), "delay_s": delay, "group": group, "turn": turn}
                found = script.ask(talk, new, tokens, **known)
                if found is None:
                    break
                last, delay, new, answer = found, tools.seconds(), tools.result(), tokens
            if last != parent:
                ends.append(last)
                answers += answer
        return tuple(ends) or (parent,), max(answers, 1)

    for begins_s, front in begins:
        group, after, delay = script.next_id, tuple[int, ...](), 0.0
        talk = script.begin(front, 0 if spec.context_tokens is None else context())
        steps_left = [(turn, left) for turn in range(1, turns() + 1) for left in range(tools.calls(), -1, -1)]
        new = prompt()
        for turn, left in steps_left:
            known = {"after": after, "delay_s": delay, "group": group, "turn": turn}
            known["arrival_s"] = 0.0 if after else begins_s
            found = script.ask(talk, new, tools.output() if left else output(), **known)
            if found is None:
                break
            after, delay = (found,), 0.0
            if not left:
                delay, new = think(), prompt()
            elif agents is not None and uniform() < agents.share:
                after, new = fan_out(found, group, turn)
            else:
                delay, new = tools.seconds(), tools.result()


def write_rounds(
    script: Script, spec: SessionSpec, turns: Sequence[tuple[float, int, Parts, int, int]], prefix: int,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Turns that arrive by themselves, and wait for the answer to the last of their session.

    Args:
        turns: when it arrives, whose it is, what its prompts begin with, and its lengths. prefix: tokens that
        each
            turn but the first brings again.
    """
    think, talks, last = _supply(spec.think_s, rng), dict[int, Conversation](), dict[int, tuple[int, int]]()
    for begins_s, user, front, new, output in turns:
        if user not in talks:
            talks[user] = script.begin(front)
        before, turn = last.get(user, (-1, 0))
        known = {
            "after": () if before < 0 else (before,),
            "delay_s": think() if turn else 0.0,
            "turn": turn + 1,
        }
        more = new + (prefix if turn and spec.prefix_again else 0)
        found = script.ask(talks[user], more, output, arrival_s=begins_s, group=user, **known)
        if found is not None:
            last[user] = (found, turn + 1)


def write_trace(
    script: Script, trace: Trace, begins: Sequence[float], parts: Sequence[Parts], added: bool
) -> None:
    """Recorded sessions, whose turns wait for each other. Where the record has delays, a turn comes so long
    after the answer before; otherwise as long after the session's start as recorded, or when that answer is
    there.

    Args:
        trace: with sessions. begins: when each begins, in order of their first requests. parts: each
        request's
            shared parts, () where none are known.
        added: prompts are what a turn adds; otherwise they are whole.
    """
    assert trace.sessions is not None
    rows: dict[int, list[int]] = {}
    for row, session in enumerate(trace.sessions.tolist()):
        rows.setdefault(session, []).append(row)
    times, prompts, outputs = (
        each.tolist() for each in (trace.times_s, trace.prompt_tokens, trace.output_tokens)
    )
    for begins_s, own in zip(begins, rows.values(), strict=False):
        group, after, talk = script.next_id, tuple[int, ...](), script.begin(())
        talk.front = parts[own[0]] if added else ()
        for place, row in enumerate(own):
            known: dict[str, Any] = {"after": after, "group": group, "turn": place + 1, "arrival_s": begins_s}
            if after and trace.delays_s is not None:
                known |= {"arrival_s": 0.0, "delay_s": float(trace.delays_s[row])}
            elif after:
                known["arrival_s"] = begins_s + times[row] - times[own[0]]
            prompt, output = prompts[row], outputs[row]
            if added:
                found = script.ask(talk, prompt, output, **known)
                assert found is not None
            elif parts[row]:
                following = parts[own[place + 1]] if place + 1 < len(own) else ()
                found = script.add(
                    prompt, output, _with_output(parts[row], following, prompt + output), **known
                )
            else:
                if prompt < talk.tokens:  # the client has cut what was said
                    talk = script.begin(())
                talk.tokens = prompt + output
                found = script.add(prompt, output, ((talk.content_id, talk.tokens),), **known)
            after = (found,)


def _with_output(own: Parts, following: Parts, end: int) -> Parts:
    """The parts of a prompt and its output: those that the next turn's prompt has there, if it goes on."""
    last = len(own) - 1
    if not following or following[-1][1] < end or following[:last] != own[:last]:
        return own
    if following[last] != own[last] and following[last][1] <= own[last][1]:
        return own
    starts = (0, *(part_end for _, part_end in following))
    return tuple(
        (part, min(to, end)) for (part, to), start in zip(following, starts, strict=False) if start < end
    )


@dataclass(frozen=True, slots=True)
class Begins:
    """When a stream's sessions begin (of users: when their turns arrive), in seconds. which: place of each
    one's prompt in the groups of its content. trace, parts: recorded requests, and what they share."""

    times: Times
    which: npt.NDArray[np.int64] | None = None
    trace: Trace | None = None
    parts: Sequence[Parts] = ()


def session_stream(
    stream: StreamSpec, begins: Begins, ids: ContentIds, first_id: int, stage: int, rngs: Sequence[Any]
) -> SessionStream:
    """The client of a stream of sessions, with their requests.

    Args:
        first_id: id of the first request. stage: number of the stage. rngs: of prompts, outputs and the rest.
    """
    spec, times, law = stream.sessions, begins.times.tolist(), stream.arrivals
    extras = {
        name: getattr(stream, name) for name in ("suffix_tokens", "max_tokens", "priority", "abort_after_s")
    }
    longest = None if spec is None else spec.max_context_tokens
    script = Script(extras, first_id, ids.first("sessions", stream.name, stage), longest)
    limit, until_s, most = stream.max_concurrency, None, None
    if isinstance(law, ClosedLoop):
        until_s, most = stream.duration_s, law.concurrency
    if spec is None:
        assert begins.trace is not None
        assert stream.trace is not None
        write_trace(script, begins.trace, times, begins.parts, stream.trace.adds)
    else:
        assert stream.prompt_tokens is not None
        assert stream.output_tokens is not None
        lengths, n, size = (
            (stream.prompt_tokens, stream.output_tokens),
            len(times),
            stream.system_prompt_tokens,
        )
        heads: list[Parts] = [((ids.first("system", size), size),) if size else ()]
        content, which = stream.content, begins.which
        prefix = 0
        if isinstance(content, SharedPrefix):
            prefix = content.prefix_tokens
            first = ids.first("prefix", stream.name, size, prefix)
            heads = [(*heads[0], (first + group, size + prefix)) for group in range(content.groups)]
        if spec.users is None:
            fronts = heads * n if which is None else [heads[group] for group in which.tolist()]
            agent = 0 if spec.sub_agents is None else spec.sub_agents.system_prompt_tokens
            sub: Parts = ((ids.first("sub-agent", agent), agent),) if agent else ()
            write_sessions(script, spec, lengths, list(zip(times, fronts, strict=True)), sub, rngs[2])
        else:
            users = np.arange(n) % spec.users if which is None else which
            again = isinstance(content, SharedPrefix) and content.prompts_per_group is not None
            drawn = [
                law.draw(spec.users, copy.deepcopy(rng))[users] if again else law.draw(n, rng)
                for law, rng in zip(lengths, rngs, strict=False)
            ]
            fronts = [heads[user * len(heads) // spec.users] for user in users.tolist()]
            columns = (times, users.tolist(), fronts, *(each.tolist() for each in drawn))
            write_rounds(script, spec, list(zip(*columns, strict=True)), prefix, rngs[2])
            limit, most = most or limit, None
    if not script.requests and longest is not None:
        what = f"no turn of any session fits into {longest} tokens"
        raise InputError(what, where="sessions.max_context_tokens", fix="Raise it, or shorten prompts.")
    return SessionStream(stream.name, script.requests, limit, stream.background, until_s, most)
