"""A trace in a scenario: which file, which part of it, and how it is stretched and thinned."""

from __future__ import annotations

import datetime
import math
import zlib
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Count, Flag, InputFile, Model, NonNegative, Positive, invalid
from servecast.sim.traffic.timestamps import read_date
from servecast.sim.traffic.traces import FORMATS, Columns, Format, Trace, read_trace

_GENERIC = ("csv", "jsonl")


def _written(value: Any) -> Any:
    """A date that YAML has read already, as text again."""
    return value.isoformat() if isinstance(value, datetime.datetime) else value


TraceFormat = Literal[
    "mooncake",
    "bailian",
    "aiperf",
    "azure",
    "burstgpt",
    "timed_trace",
    "llmservingsim",
    "vidur",
    "csv",
    "jsonl",
]
Moment = Annotated[NonNegative | str, Field(union_mode="left_to_right"), BeforeValidator(_written)]


class TraceColumns(Model):
    """What the columns of a trace are called."""

    timestamp: str | None = None
    """When a request arrives: a date and time, or a number."""
    input_tokens: str | None = None
    """Its prompt tokens."""
    output_tokens: str | None = None
    """Its output tokens."""
    session: str | None = None
    """What requests of one session have in common: the key of ``session_affinity``."""
    hash_ids: str | None = None
    """List of the prompt's blocks (of ``block_tokens``); equal ids are equal blocks behind equal ones."""
    token_ids: str | None = None
    """List of the prompt's tokens; equal leading ones are shared."""
    delay: str | None = None
    """From the answer to the turn before in its session to this request, in the unit of the times."""
    images: str | None = None
    """How many images it has. They are counted and told, not modelled."""


class TraceSpec(Model):
    """A trace in a scenario: it gives arrival times, lengths and, where it has hash or token ids, content.

    Its first request is sent at once. Requests without prompt or output tokens are left out, which is told.
    """

    format: TraceFormat | None = None
    """Format of the file; ``csv`` and ``jsonl`` are any table with ``columns``."""
    path: InputFile
    """The file."""
    columns: TraceColumns | None = None
    """What its columns are called, where not as in its format."""
    block_tokens: Count | None = None
    """Tokens that a hash id stands for. Default, the format's."""
    seconds_per_unit: Positive | None = None
    """Unit of its times, in seconds. Default, the format's; of ``csv`` and ``jsonl`` it is told by their
    size: seconds, or milliseconds, microseconds or nanoseconds since 1970."""
    from_: Moment | None = Field(None, alias="from")
    """Leave out what arrives before: seconds after the first request, or a date and time."""
    to: Moment | None = None
    """Leave out what arrives then or later."""
    keep_share: Annotated[Positive, Field(le=1)] = 1.0
    """Keep about this share of the requests, and of sessions all requests or none. Which, does not depend on
    the seed."""
    max_total_tokens: Count | None = None
    """Leave longer requests out (prompt and output)."""
    time_scale: Positive = 1.0
    """Multiply the times: 0.5 sends twice as fast."""
    request_rate: Positive | None = None
    """Stretch the times to this mean rate (n / last time)."""
    repeat: Flag = False
    """Begin anew where more requests are wanted than it has, with new prompts that share as those do."""
    turns: Literal["as_recorded", "wait"] | None = None
    """When later requests of a session are sent: at their times, or only after the answer to the one before.
    Default, ``wait`` where the format has delays."""
    history: Literal["included", "added"] | None = None
    """Of sessions whose turns wait: prompts are whole, and begin with what was said before, or they are what
    a turn adds to it. Default, the format's: ``added`` of aiperf, otherwise ``included``."""
    first_at_zero: Flag = True
    """The first request is sent at once. If false, as long after the start as the file has it."""

    @model_validator(mode="after")
    def _known_columns(self) -> TraceSpec:
        named = self.columns or TraceColumns()
        if self.format is None and self.columns is None:
            raise invalid("neither a format nor columns", f"Give one: {', '.join([*FORMATS, *_GENERIC])}.")
        if self.format not in FORMATS:
            missing = [name for name in ("timestamp", "output_tokens") if getattr(named, name) is None]
            if named.input_tokens is None and named.token_ids is None:
                missing.insert(0, "input_tokens")
            if missing:
                fix = "Write columns: {timestamp: ..., input_tokens: ..., output_tokens: ...}."
                raise invalid(f"it does not say which column has {', '.join(missing)}", fix, at="columns")
        if self.history is not None and self.turns == "as_recorded":
            what = "history of turns that do not wait"
            raise invalid(what, "Remove it, or write turns: wait.", at="history")
        for name, moment in (("from", self.from_), ("to", self.to)):
            if isinstance(moment, str) and read_date(moment) is None:
                fix = "Write seconds after the first request, or as 2024-05-10T08:00:00Z."
                raise invalid(f"{moment!r} is no date and time", fix, at=name)
        return self

    @property
    def waits(self) -> bool:
        """Whether turns of a session wait for each other."""
        return self.turns == "wait" or (self.turns is None and bool(self.layout().columns.delay))

    @property
    def adds(self) -> bool:
        """Whether a prompt is what its turn adds to the history."""
        return self.layout().adds if self.history is None else self.history == "added"

    def layout(self) -> Format:
        """How the file is written."""
        named = {} if self.columns is None else self.columns.model_dump(exclude_none=True)
        form = FORMATS.get(self.format or "")
        if form is None:
            container = self.format if self.format in _GENERIC else self._container()
            form = Format("csv" if container == "csv" else "jsonl", Columns())
        return replace(
            form,
            columns=replace(form.columns, **named),
            block_tokens=self.block_tokens or form.block_tokens,
            seconds_per_unit=self.seconds_per_unit or form.seconds_per_unit,
        )

    def _container(self) -> str:
        """Of a table without a format: lines of JSON begin with a brace."""
        with self.path.open("rb") as file:
            return "jsonl" if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "csv"

    def read(self) -> Trace:
        """The trace, or the part of it that is asked for; read anew only where it has changed. Not to be
        changed.

        Raises:
            InputError: the file is wrong, or no request is left.
        """
        if not self.path.is_file():
            return self._read()  # which says so
        now = self.path.stat()
        return _kept(self, now.st_mtime_ns, now.st_size)

    def _read(self) -> Trace:
        trace = read_trace(self.path, self.layout())
        chosen = self._window(trace) & self._thinned(trace)
        if not chosen.any():
            what = f"none of its {len(trace)} requests lies between from and to, or is kept"
            fix = "Widen the window (seconds after the first request), or raise keep_share."
            raise InputError(what, where=str(self.path), fix=fix)
        trace = trace.take(chosen)
        if self.max_total_tokens is not None:
            trace = trace.take(trace.prompt_tokens + trace.output_tokens <= self.max_total_tokens)
        if not len(trace):
            what = f"no request of at most {self.max_total_tokens} tokens"
            raise InputError(what, where=str(self.path), fix="Raise max_total_tokens.")
        begins_s = trace.times_s[0] if self.first_at_zero else 0.0
        return replace(trace, times_s=(trace.times_s - begins_s) * self.time_scale)

    def _window(self, trace: Trace) -> npt.NDArray[np.bool_]:
        low, high = (self._seconds(moment, trace) for moment in (self.from_, self.to))
        since_first = trace.times_s - trace.times_s[0]
        after: npt.NDArray[np.bool_] = since_first >= (-math.inf if low is None else low)
        inside: npt.NDArray[np.bool_] = after & (since_first < (math.inf if high is None else high))
        return inside

    def _seconds(self, moment: float | str | None, trace: Trace) -> float | None:
        """A moment in seconds after the first request."""
        if not isinstance(moment, str):
            return moment
        if trace.began_ns is None:
            where, fix = str(self.path), "Give from and to in seconds after the first request."
            raise InputError(f"its times are no dates, so {moment!r} is none of them", where, fix)
        date = read_date(moment)
        assert date is not None
        return (date[0] - trace.began_ns) / 1e9 - float(trace.times_s[0])

    def _thinned(self, trace: Trace) -> npt.NDArray[np.bool_]:
        """Which requests are kept: by a checksum of their place, or of their session's."""
        if self.keep_share == 1:
            return np.ones(len(trace), dtype=bool)
        places = (np.arange(len(trace)) if trace.sessions is None else trace.sessions).tolist()
        sums = np.array([zlib.crc32(str(place).encode()) for place in places])
        kept: npt.NDArray[np.bool_] = sums < self.keep_share * 2**32
        return kept


@lru_cache(4)
def _kept(spec: TraceSpec, _mtime_ns: int, _size: int) -> Trace:
    """A file is one as long as its time and size are: a plan asks for its trace in every run."""
    return spec._read()
