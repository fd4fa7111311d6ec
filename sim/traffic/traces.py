"""Recorded traffic: the formats that are read (`FORMATS`), and how their records become a trace.

Readers raise InputError with file and line: a file that cannot be read or ends in the middle of a record,
times that go backwards, lengths that are not whole numbers of tokens.
"""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from servecast.sim.inputs.errors import InputError, reason
from servecast.sim.traffic.timestamps import read_date, read_number, unit_of

MOONCAKE_BLOCK_TOKENS = 512
MOST_TOKENS = 10_000_000  # of a prompt or an output: the longest contexts

HashIds = list[tuple[int, ...]]
Container = Literal["csv", "jsonl"]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        times_s: (n,) arrival in seconds, rising; 0 is the start of the record.
        prompt_tokens, output_tokens: (n,) lengths, >= 1.
        hash_ids: one tuple a request: equal ids are equal blocks of ``block_tokens`` prompt tokens with
            equal tokens before them; None where the format has none.
        block_tokens: tokens a hash id stands for.
        sessions: (n,) number of each request's session, None where the format has none.
        delays_s: (n,) from the answer to the turn before to this request, NaN where the record does not say;
        None
            where the format has none.
        began_ns: what 0 s is in nanoseconds since 1970, None where the record does not say.
        notes: what of the record is not in the trace, and what was taken for granted.
    """

    times_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    hash_ids: HashIds | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    sessions: npt.NDArray[np.int64] | None = None
    delays_s: npt.NDArray[np.float64] | None = None
    began_ns: int | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.times_s)

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | slice) -> Trace:
        """The chosen requests."""
        rows = np.arange(len(self))[chosen]
        return replace(
            self,
            times_s=self.times_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            hash_ids=None if self.hash_ids is None else [self.hash_ids[row] for row in rows],
            sessions=None if self.sessions is None else self.sessions[rows],
            delays_s=None if self.delays_s is None else self.delays_s[rows],
        )

    def repeated(self, rounds: int) -> Trace:
        """The trace so many times, one after the other with a mean gap between. A round has prompts and
        sessions of its own, which share as they do within the first."""
        if rounds <= 1:
            return self
        count, span = len(self), float(self.times_s[-1])
        whole = self.take(np.tile(np.arange(count), rounds))
        number = np.repeat(np.arange(rounds), count)
        period_s = span * count / max(count - 1, 1)
        ids, sessions = whole.hash_ids, whole.sessions
        if ids is not None:
            fresh = 1 + max((max(each, default=0) for each in ids), default=0)
            ids = [tuple(i + fresh * n for i in each) for each, n in zip(ids, number.tolist(), strict=True)]
        if sessions is not None:
            sessions = sessions + number * (1 + int(sessions.max()))
        return replace(whole, times_s=whole.times_s + number * period_s, hash_ids=ids, sessions=sessions)


@dataclass(frozen=True, slots=True)
class Columns:
    """What a format calls the columns of its records; "" is a column that it does not have."""

    timestamp: str = ""
    input_tokens: str = ""
    output_tokens: str = ""
    hash_ids: str = ""
    token_ids: str = ""
    session: str = ""
    parent: str = ""
    images: str = ""
    delay: str = ""

    @property
    def needed(self) -> tuple[str, ...]:
        """What every record has."""
        return tuple(name for name in (self.timestamp, self.input_tokens, self.output_tokens) if name)


@dataclass(frozen=True, slots=True)
class Format:
    """How a kind of trace is written.

    seconds_per_unit: of its times; None: dates, or numbers whose unit their size tells. block_tokens: that a
    hash id stands for. exact: the last block has an id, too, where it is not full. every_block: all full ones
    have one. adds: a prompt of a session is what its turn adds, not all that was said.
    """

    container: Container
    columns: Columns
    seconds_per_unit: float | None = None
    block_tokens: int = 16
    exact: bool = False
    every_block: bool = False
    adds: bool = False


_TABLE = resources.files("servecast.sim.traffic").joinpath("formats.toml").read_text("utf-8")
FORMATS: dict[str, Format] = {
    name: Format(**form | {"columns": Columns(**form["columns"])})
    for name, form in tomllib.loads(_TABLE).items()
}


@dataclass(slots=True)
class _Records:
    """Collects a trace line by line and refuses what cannot be."""

    path: Path
    form: Format
    line: int = 0
    times: list[float] = field(default_factory=list)  # in the file's unit, or ns of dates
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    hash_ids: HashIds = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)  # in the file's unit
    zones: set[str | None] = field(default_factory=set)
    left_out: dict[str, int] = field(default_factory=dict)
    images: list[int] = field(default_factory=list)
    first: float | None = None  # the first time of all, in the file's unit
    dates: bool = False
    unit: float = 1.0
    unit_name: str = "seconds"
    has_sessions: bool = False
    _known: dict[Any, int] = field(default_factory=dict)  # session -> its number
    _began: dict[Any, float] = field(default_factory=dict)  # session -> time of its last request
    _blocks: dict[tuple[int, tuple[Any, ...]], int] = field(default_factory=dict)  # (id before, tokens) -> id

    def error(self, what: str, fix: str = "Correct or remove the line.") -> InputError:
        return InputError(what, where=f"{self.path}, line {self.line}", fix=fix)

    def value(self, record: Mapping[str, Any], name: str) -> Any:
        if record.get(name) is None:
            other = next(
                (
                    each
                    for each, form in FORMATS.items()
                    if name not in record and set(form.columns.needed) <= record.keys()
                ),
                None,
            )
            fix = "Is the line cut off, or the file of another format? Correct or remove it."
            if any(str(key).startswith(("{", "[")) for key in record):
                fix = "The file is JSON: its format is one of JSON lines, as mooncake or jsonl."
            elif isinstance(record.get("turns"), list) or "text_input" in record:
                fix = "Texts have no lengths: count tokens, and give a line a turn with input_length."
            elif "conversations" in record:
                fix = "Conversations as in ShareGPT have no times and no lengths: count their tokens first."
            elif other is not None:
                fix = f"Its columns are those of the format {other}."
            raise self.error(f"no {name!r}", fix)
        return record[name]

    def length(self, record: Mapping[str, Any], name: str) -> int:
        value = self.value(record, name)
        number = read_number(value)
        if number is None:
            raise self.error(f"{name} is {_short(value)}, not a number")
        if not math.isfinite(number) or number < 0 or number != math.floor(number):
            raise self.error(f"{name} is {_short(value)}, not a whole number of at least 1 token")
        if number > MOST_TOKENS:
            raise self.error(f"{name} is {number:.4g} tokens, more than any model takes")
        return int(number)

    def time(self, record: Mapping[str, Any]) -> float:
        """In the unit of the file, which the first time tells."""
        name, per_unit = self.form.columns.timestamp, self.form.seconds_per_unit
        if self.form.columns.delay and record.get(name) is None:  # it comes with its session
            self.first = self.first or 0.0
            self.unit = per_unit or 1.0
            return self._began.get(_key(record.get(self.form.columns.session)), 0.0)
        value = self.value(record, name)
        number = read_number(value)
        date = read_date(value) if number is None and isinstance(value, str) else None
        if (number is None and date is None) or (number is not None and not math.isfinite(number)):
            kind = "a date and time" if per_unit is None and self.form.container == "csv" else "a number"
            raise self.error(f"{name} is {_short(value)}, not {kind}")
        if self.first is None:
            self.dates = date is not None
            if self.dates:
                self.unit = 1e-9
            elif per_unit is None:
                assert number is not None
                self.unit, self.unit_name = unit_of(float(number))
            else:
                self.unit = per_unit
        if self.dates != (date is not None):
            others = "dates" if self.dates else "numbers"
            raise self.error(f"{name} is {_short(value)}, where other lines have {others}")
        if date is not None:
            self.zones.add(date[1])
            number = date[0]
        assert number is not None
        if self.first is None:
            self.first = number
        return number

    def _delay(self, record: Mapping[str, Any]) -> float:
        """In the unit of the file; NaN where none is given."""
        name = self.form.columns.delay
        value = record.get(name) if name else None
        number = math.nan if value is None else read_number(value)
        if number is None or number < 0 or math.isinf(number):
            raise self.error(f"{name} is {_short(value)}, not a time of at least 0")
        return float(number)

    def add(self, record: Mapping[str, Any]) -> None:
        """A request, or one more that is left out."""
        columns = self.form.columns
        time = self.time(record)
        delay = self._delay(record)
        ids = record.get(columns.token_ids) if columns.token_ids else None
        if isinstance(ids, list) and ids and columns.input_tokens not in record:
            prompt = len(ids)
        else:
            prompt = self.length(record, columns.input_tokens)
        output = self.length(record, columns.output_tokens)
        self._in_order(time)
        images = read_number(record.get(columns.images, 0)) or 0
        if not prompt or not output:
            what = "output" if prompt else "prompt"
            self.left_out[what] = self.left_out.get(what, 0) + 1
            return
        if columns.hash_ids and record.get(columns.hash_ids):
            self._hashed(record[columns.hash_ids], prompt)
        elif ids:
            self._of_tokens(ids, prompt)
        elif self.form.adds:
            self.hash_ids.append(())
        elif self.hash_ids:
            raise self.error(f"{columns.hash_ids} is given for some requests only")
        if columns.session:
            self.sessions.append(self._session(record))
            self._began[_key(record.get(columns.session))] = time
        self.times.append(time)
        self.delays.append(delay)
        self.prompts.append(prompt)
        self.outputs.append(output)
        if math.isfinite(images) and images > 0:
            self.images.append(int(images))

    def _in_order(self, time: float) -> None:
        assert self.first is not None
        if self.form.columns.delay:
            return  # session after session: they are put in order at the end
        if not self.dates and self.form.seconds_per_unit is not None and time < 0:
            raise self.error(f"the time is {time * self.unit}, not at or after the start")
        if len(self.zones) > 1:
            return  # as written they do not rise: they are put in order at the end
        last = self.times[-1] if self.times else self.first
        if time < last:
            since = self.first if self.dates or self.form.seconds_per_unit is None else 0
            before, now = ((each - since) * self.unit for each in (last, time))
            where = f"from {before} s to {now} s" if now >= 0 else "to before the first request"
            raise self.error(f"time goes backwards, {where}", "Sort the file by time.")

    def _hashed(self, ids: Any, prompt: int) -> None:
        name, block = self.form.columns.hash_ids, self.form.block_tokens
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise self.error(f"{name} is not a list of whole numbers")
        if self.times and not self.hash_ids:
            raise self.error(f"{name} is given for some requests only")
        blocks = -(-prompt // block)
        few = self.form.every_block and len(ids) < prompt // block
        if few or len(ids) > blocks or (self.form.exact and len(ids) != blocks):
            fix = "Give the file's block size as block_tokens."
            if few and len(ids) == -(-prompt // MOONCAKE_BLOCK_TOKENS):
                fix = "Blocks of 512 tokens fit: is it a Mooncake trace? Its format is mooncake."
            if self.form.exact and len(ids) in (-(-prompt // 16), prompt // 16):
                fix = "Blocks of 16 tokens fit: is it a Bailian trace? Its format is bailian."
            raise self.error(f"{len(ids)} {name} for {prompt} tokens in blocks of {block}", fix)
        self.hash_ids.append(tuple(ids))

    def _of_tokens(self, ids: Any, prompt: int) -> None:
        """Hash ids of the full blocks of a prompt that is given token by token."""
        name, size = self.form.columns.token_ids, self.form.block_tokens
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise self.error(f"{name} is not a list of whole numbers")
        if len(ids) != prompt:
            raise self.error(f"{len(ids)} {name} for {prompt} tokens")
        if self.times and not self.hash_ids:
            raise self.error(f"{name} is given for some requests only")
        found, before = [], -1
        for start in range(0, prompt - size + 1, size):
            key = (before, tuple(ids[start : start + size]))
            before = self._blocks.setdefault(key, len(self._blocks))
            found.append(before)
        self.hash_ids.append(tuple(found))

    def _session(self, record: Mapping[str, Any]) -> int:
        """The number of a request's session: that of its parent, where there is one."""
        columns = self.form.columns
        key = _key(record.get(columns.session))
        self.has_sessions |= key is not None
        own = ("line", self.line) if key is None else key
        parent = self._known.get(_key(record.get(columns.parent))) if columns.parent else None
        return self._known.setdefault(own, len(self._known) if parent is None else parent)

    def trace(self) -> Trace:
        left_out = sum(self.left_out.values())
        if not self.times:
            none = f"none of its {left_out} requests has prompt and output tokens"
            what = none if left_out else "no requests"
            raise InputError(what, where=str(self.path), fix="Give a file with at least one.")
        assert self.first is not None
        told = self.form.seconds_per_unit is None and (self.unit_name != "seconds" or self.first >= _EPOCH_S)
        absolute = self.dates or told
        first = min(self.times) if absolute else 0
        trace = Trace(
            np.array([(time - first) * self.unit if absolute else time * self.unit for time in self.times]),
            np.array(self.prompts, dtype=np.int64),
            np.array(self.outputs, dtype=np.int64),
            self.hash_ids or None,
            self.form.block_tokens,
            np.array(self.sessions, dtype=np.int64) if self.has_sessions else None,
            np.array(self.delays) * self.unit if self.form.columns.delay else None,
            round(first * self.unit * 1e9) if absolute else None,
            tuple(self._notes()),
        )
        if len(self.zones) > 1 or self.form.columns.delay:
            trace = trace.take(np.argsort(trace.times_s, kind="stable"))
        return trace

    def _notes(self) -> Iterator[str]:
        name = self.path.name
        for what, count in self.left_out.items():
            yield f"{name}: {count} requests without {what} tokens left out"
        if self.images:
            yield (
                f"{name}: {len(self.images)} requests have images ({sum(self.images)} in all), which are not "
                "modelled: their text alone counts"
            )
        if len(self.zones) > 1 and None in self.zones:
            yield f"{name}: some times have no zone, and are taken as UTC"
        elif len(self.zones) > 1:
            yield f"{name}: times of {len(self.zones)} zones, put in their true order"
        if self.unit_name != "seconds":
            yield f"{name}: its times are taken as {self.unit_name} since 1970"


_EPOCH_S = 1e8  # seconds: what is later counts from 1970


def _key(value: Any) -> Any:
    """What a session is called, None where nothing stands there."""
    text = value if isinstance(value, str | int) else None if value is None else repr(value)
    return None if text == "" else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lines(records: _Records) -> Iterator[str]:
    """The file's lines, counted in ``records.line``."""
    try:
        with records.path.open(encoding="utf-8-sig", newline="") as file:
            for records.line, line in enumerate(file, start=1):
                yield line
    except (OSError, UnicodeDecodeError) as error:
        fix = "Give a readable UTF-8 text file."
        raise InputError(f"cannot be read: {reason(error)}", where=str(records.path), fix=fix) from None


def _json_records(records: _Records) -> Iterator[dict[str, Any]]:
    for line in _lines(records):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise records.error(f"not valid JSON ({error})", "Is the file cut off? Get it again.") from None
        if not isinstance(record, dict):
            raise records.error("not a JSON object", "Give one object a line.")
        yield record


def _csv_records(records: _Records) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(_lines(records))
    except csv.Error as error:
        raise records.error(f"not valid CSV ({error})") from None


def read_trace(path: Path, form: Format) -> Trace:
    """A file of a format. Times are the file's own, but for dates and times since 1970, which count from the
    first. Requests without prompt or output tokens are left out, and the notes tell.

    Raises:
        InputError: the file is none of this format, or nothing is left.
    """
    records = _Records(path, form)
    for record in _csv_records(records) if form.container == "csv" else _json_records(records):
        records.add(record)
    return records.trace()
