"""Recorded traffic: readers of Mooncake, LLMServingSim and vLLM timed_trace JSONL, Azure and BurstGPT CSV.

Readers raise InputError with file and line: a file that cannot be read or ends in the middle of a record,
times that go backwards, lengths that are not whole numbers of at least 1 token.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Count, InputFile, Model, Positive

MOONCAKE_BLOCK_TOKENS = 512

HashIds = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        times_s: (n,) arrival in seconds, rising; 0 is the start of the record.
        prompt_tokens, output_tokens: (n,) lengths, >= 1.
        hash_ids: one tuple a request: equal ids are equal blocks of ``block_tokens`` prompt tokens with
            equal tokens before them; None where the format has none.
        block_tokens: tokens a hash id stands for.
    """

    times_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    hash_ids: HashIds | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    def __len__(self) -> int:
        return len(self.times_s)

    def take(self, chosen: npt.NDArray[np.bool_] | slice) -> Trace:
        """The chosen requests."""
        rows = np.arange(len(self))[chosen]
        return Trace(
            self.times_s[rows],
            self.prompt_tokens[rows],
            self.output_tokens[rows],
            None if self.hash_ids is None else [self.hash_ids[row] for row in rows],
            self.block_tokens,
        )


class TraceSpec(Model):
    """A trace in a scenario: it gives arrival times, lengths and, where it has hash ids, content."""

    format: Literal["mooncake", "azure", "burstgpt", "timed_trace", "llmservingsim"]
    """Format of the file."""
    path: InputFile
    """The file."""
    block_tokens: Count | None = None
    """Tokens that a hash id stands for. Default, the format's."""
    seconds_per_unit: Positive = 1.0
    """Unit of a ``timed_trace``'s timestamps, in seconds."""
    request_rate: Positive | None = None
    """Stretch the times to this mean rate (n / last time)."""
    max_total_tokens: Count | None = None
    """Leave longer requests out (prompt and output)."""

    def read(self) -> Trace:
        """The trace.

        Raises:
            InputError: the file is wrong, or no request is left.
        """
        if self.format == "mooncake":
            trace = read_mooncake(self.path, block_tokens=self.block_tokens or MOONCAKE_BLOCK_TOKENS)
        elif self.format == "timed_trace":
            trace = read_timed_trace(
                self.path, seconds_per_unit=self.seconds_per_unit, block_tokens=self.block_tokens or 16
            )
        else:
            readers = {
                "azure": read_azure,
                "burstgpt": read_burstgpt,
                "llmservingsim": read_llmservingsim,
            }
            trace = readers[self.format](self.path)
        if self.max_total_tokens is not None:
            trace = trace.take(trace.prompt_tokens + trace.output_tokens <= self.max_total_tokens)
        if not len(trace):
            raise InputError(
                f"no request of at most {self.max_total_tokens} tokens",
                where=str(self.path),
                fix="Raise max_total_tokens.",
            )
        return trace


class _Records:
    """Collects a trace line by line and refuses what cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.times: list[float] = []
        self.prompts: list[int] = []
        self.outputs: list[int] = []
        self.hash_ids: HashIds = []

    def error(self, what: str, fix: str = "Correct or remove the line.") -> InputError:
        return InputError(what, where=f"{self.path}, line {self.line}", fix=fix)

    def field(self, record: dict[str, Any], name: str) -> Any:
        if record.get(name) is None:
            raise self.error(
                f"no {name!r}", "Is the line cut off, or the file of another format? Correct or remove it."
            )
        return record[name]

    def length(self, record: dict[str, Any], name: str) -> int:
        value = self.field(record, name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.error(f"{name} is {value!r}, not a number") from None
        if not number.is_integer() or number < 1:
            raise self.error(f"{name} is {value}, not a whole number of at least 1 token")
        return int(number)

    def add(self, time_s: float, prompt: int, output: int) -> None:
        if not math.isfinite(time_s) or time_s < 0:
            raise self.error(f"the time is {time_s}, not at or after the start")
        if self.times and time_s < self.times[-1]:
            raise self.error(
                f"time goes backwards, from {self.times[-1]} s to {time_s} s", "Sort the file by time."
            )
        self.times.append(time_s)
        self.prompts.append(prompt)
        self.outputs.append(output)

    def trace(self, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
        if not self.times:
            raise InputError("no requests", where=str(self.path), fix="Give a file with at least one.")
        return Trace(
            np.array(self.times, dtype=np.float64),
            np.array(self.prompts, dtype=np.int64),
            np.array(self.outputs, dtype=np.int64),
            self.hash_ids or None,
            block_tokens,
        )


def _lines(records: _Records) -> Iterator[str]:
    """The file's lines, counted in ``records.line``."""
    try:
        with records.path.open(encoding="utf-8-sig", newline="") as file:
            for records.line, line in enumerate(file, start=1):
                yield line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {error}", where=str(records.path), fix="Give a readable UTF-8 text file."
        ) from None


def _json_records(records: _Records) -> Iterator[dict[str, Any]]:
    for line in _lines(records):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise records.error(f"not valid JSON ({error})", "Is the file cut off? Get it again.") from None
        if not isinstance(record, dict):
            raise records.error("not a JSON object", "Give one object a line.")
        yield record


def _csv_records(records: _Records) -> Iterator[dict[str, Any]]:
    yield from csv.DictReader(_lines(records))


def _read_hashed(
    path: Path, seconds_per_unit: float, block_tokens: int, columns: Sequence[str], *, exact: bool
) -> Trace:
    records = _Records(path)
    time_name, prompt_name, output_name, hash_name = columns
    for record in _json_records(records):
        time = records.field(record, time_name)
        if isinstance(time, bool) or not isinstance(time, (int, float)):
            raise records.error(f"{time_name} is {time!r}, not a number")
        prompt = records.length(record, prompt_name)
        records.add(time * seconds_per_unit, prompt, records.length(record, output_name))
        ids = record.get(hash_name) or []
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise records.error(f"{hash_name} is not a list of whole numbers")
        if bool(ids) != bool(records.hash_ids) and len(records.times) > 1:
            raise records.error(f"{hash_name} is given for some requests only")
        blocks = -(-prompt // block_tokens)
        if len(ids) > blocks or (exact and ids and len(ids) != blocks):
            raise records.error(
                f"{len(ids)} {hash_name} for {prompt} tokens in blocks of {block_tokens}",
                "Give the file's block size as block_tokens.",
            )
        if ids:
            records.hash_ids.append(tuple(ids))
    return records.trace(block_tokens)


def read_mooncake(path: Path, *, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """Mooncake's JSONL: timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens)."""
    columns = ("timestamp", "input_length", "output_length", "hash_ids")
    return _read_hashed(path, 1e-3, block_tokens, columns, exact=True)


def read_timed_trace(
    path: Path,
    *,
    seconds_per_unit: float = 1.0,
    block_tokens: int = 16,
    columns: Sequence[str] = ("timestamp", "input_length", "output_length", "hash_ids"),
) -> Trace:
    """The JSONL of ``vllm bench serve --dataset-name timed_trace``.

    The arguments are its ``--timed-trace-sec-multiplier``, ``--timed-trace-chunk-hash-size`` and
    ``--timed-trace-label-{timestamp,input-length,output-length,hash-ids}``.
    """
    return _read_hashed(path, seconds_per_unit, block_tokens, columns, exact=False)


def read_llmservingsim(path: Path) -> Trace:
    """LLMServingSim's JSONL: arrival_time_ns, input_toks, output_toks, hash_ids (blocks of 16 tokens, full
    ones only)."""
    columns = ("arrival_time_ns", "input_toks", "output_toks", "hash_ids")
    return _read_hashed(path, 1e-9, 16, columns, exact=False)


def read_azure(path: Path) -> Trace:
    """Azure's LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens. The first request is at 0."""
    records = _Records(path)
    start: np.datetime64 | None = None
    for record in _csv_records(records):
        text = str(records.field(record, "TIMESTAMP"))
        prompt = records.length(record, "ContextTokens")
        output = records.length(record, "GeneratedTokens")
        try:
            time = np.datetime64(text.split("+")[0], "ns")
        except ValueError:
            raise records.error(f"TIMESTAMP is {text!r}, not a date and time") from None
        start = time if start is None else start
        elapsed = int((time - start).astype(np.int64)) / 1e9
        if elapsed < 0:
            raise records.error("time goes backwards, to before the first request", "Sort the file by time.")
        records.add(elapsed, prompt, output)
    return records.trace()


def read_burstgpt(path: Path) -> Trace:
    """BurstGPT's CSV: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

    Requests that failed there (no response tokens) are left out, as vLLM's BurstGPT dataset does.
    """
    records = _Records(path)
    for record in _csv_records(records):
        text = records.field(record, "Timestamp")
        try:
            time = float(text)
        except ValueError:
            raise records.error(f"Timestamp is {text!r}, not a number") from None
        if str(records.field(record, "Response tokens")).strip() != "0":
            records.add(
                time, records.length(record, "Request tokens"), records.length(record, "Response tokens")
            )
    return records.trace()
