"""A bare CSV table as a report: columns by their names, and what the table does not say of itself."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import read_text
from servecast.sim.scenario import scenario as scenarios
from servecast.sim.traffic.spec import Row
from servecast.validate.check.columns import ColumnName, read_name
from servecast.validate.check.table import (
    Hardware,
    Lengths,
    Level,
    PercentileLaw,
    Report,
    Span,
    Value,
    exactly,
)

_MISSING = ("", "nan")
_SHARES = ("kv_usage", "success")
_MOST = 1e15  # of anything that is counted or timed in a benchmark
_MOST_PLACES = 15


@dataclass(frozen=True, slots=True)
class Context:
    """What a bare table or a result file does not say of itself.

    Attributes:
        model_config: the model behind it: a shipped config's name, or a config.json.
        gpu: its GPU, as in the catalogue.
        tensor_parallel_size: GPUs of one engine.
        replicas: engines.
        prompt_tokens: prompt length, the same in every request.
        output_tokens: output length, the same in every request.
        num_requests: requests of each row.
        percentile_law: how percentiles were interpolated: linear (NumPy), or exclusive (Python's
            statistics.quantiles).

    Raises:
        InputError: a number is below 1.
    """

    model_config: str | None = None
    gpu: str | None = None
    tensor_parallel_size: int = 1
    replicas: int = 1
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    num_requests: int | None = None
    percentile_law: PercentileLaw = "linear"

    def __post_init__(self) -> None:
        for name in self.given():
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"is {value}", where=_flag(name), fix="Give a number from 1 on.")

    def given(self) -> list[str]:
        """The names of what is given."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]

    def refuse(self) -> None:
        """Raises InputError if anything is given, of what says it itself."""
        if given := self.given():
            fix = "Leave it out, or change the scenario."
            raise InputError("a scenario says it itself", where=_flag(given[0]), fix=fix)

    def lengths(self) -> dict[str, Lengths | None]:
        """What is known of output and prompt lengths, by name."""
        given = {"output_tokens": self.output_tokens, "prompt_tokens": self.prompt_tokens}
        return {name: None if n is None else Lengths(exactly(n), True) for name, n in given.items()}

    def hardware(self) -> Hardware | None:
        """Model and GPU, if both are given.

        Raises:
            InputError: only one of them is, or one is not known.
        """
        if self.model_config is None and self.gpu is None:
            return None
        if self.model_config is None or self.gpu is None:
            missing = "--model-config" if self.model_config is None else "--gpu"
            raise InputError(f"{missing} is missing", where=missing, fix="Bounds need the model and the GPU.")
        path = Path(self.model_config)
        if path.suffix != ".json":
            path = scenarios.shipped_folder() / "models" / f"{self.model_config}.json"
        model = ModelShape.from_config(path, path.stem)
        shard = Shard(model, find_gpu(self.gpu, where="--gpu"), self.tensor_parallel_size)
        return Hardware(shard, self.replicas)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def from_table(path: Path, context: Context) -> Report:
    """A CSV table with a header: a row a load, or (with columns ``metric`` and ``value``) a row a number.

    Raises:
        InputError: it cannot be read, a cell is not what its column can have, no column is known, or two mean
            the same.
    """
    header, lines, further = _read_csv(path)
    if {"metric", "value"} <= set(header):
        header, lines = _wide(path, header, lines)
    names = {column: read_name(column) for column in header}
    _refuse_twins(names, path)
    if not any(name.part == "metric" for name in names.values()):
        fix = "Name them as in concurrency, request_rate, ttft_p50_ms, e2e_p95_ms, output_tok_s."
        raise InputError(f"none of its columns is known ({', '.join(header)})", where=str(path), fix=fix)
    decimals = {column: max((_places(line[column]) for line in lines), default=0) for column in header}
    hardware = context.hardware()
    levels = [
        _table_level(path, line, names, decimals, context, hardware, f"{path}, line {number}")
        for number, line in enumerate(lines, start=2)
    ]
    unknown = [c for c, name in names.items() if name.part == "key" and _is_number(lines[0][c])]
    notes = [f"not a metric that is known: {', '.join(unknown)}"] if unknown else []
    if further:
        notes.append(f"{further} lines behind the first blank one not read: another table")
    return Report(str(path), tuple(levels), notes=tuple(notes))


def _refuse_twins(names: Mapping[str, ColumnName], path: Path) -> None:
    """Two columns that say the same would hide each other."""
    seen: dict[tuple[str, str | None], str] = {}
    for column, name in names.items():
        if name.part == "key":
            continue
        other = seen.setdefault((name.name, name.statistic), column)
        if other != column:
            fix = "Leave one out, or rename it."
            raise InputError(f"columns {other!r} and {column!r} mean the same", where=str(path), fix=fix)


def _table_level(
    path: Path,
    line: Mapping[str, str],
    names: Mapping[str, ColumnName],
    decimals: Mapping[str, int],
    context: Context,
    hardware: Hardware | None,
    where: str,
) -> Level:
    keys: Row = {}
    load: dict[str, float] = {}
    values: dict[tuple[str, str | None], Value] = {}
    series = []
    lengths = context.lengths()
    for column, name in names.items():
        text = line[column].strip()
        if text.lower() in _MISSING:
            continue
        half = 0.5 * 10.0 ** -decimals[column] * name.scale
        # what has decimals or is a mean was measured, and does not tell series apart
        chosen = not _is_number(text) or (decimals[column] <= 0 and "mean" not in column.lower())
        if name.part == "metric":
            number = _number(text, column, name, where)
            values[name.name, name.statistic] = Value(
                column, name.name, name.statistic, number * name.scale, half
            )
        elif name.part == "load" and (_is_number(text) or name.name not in ("request_rate", "concurrency")):
            number = load[name.name] = _number(text, column, name, where)
            if name.name in lengths:
                lengths[name.name] = Lengths(Span(max(1.0, number - half), number + half), False)
                series += [f"{column}={text}"] * chosen
            if name.name != "failed":
                keys[column] = _plain(text)
        else:
            keys[column] = _plain(text)
            series += [f"{column}={text}"] * chosen
    rate, slots = load.get("request_rate"), load.get("concurrency")
    requests = load.get("num_requests", context.num_requests)
    return Level(
        table=path.stem,
        keys=keys,
        series=tuple(series),
        values=values,
        concurrency=None if slots is None else int(slots),
        request_rate=rate if rate is not None and math.isfinite(rate) else None,
        num_requests=None if requests is None else int(requests),
        failed=load.get("failed"),
        output=lengths["output_tokens"],
        prompt=lengths["prompt_tokens"],
        law=context.percentile_law,
        hardware=hardware,
    )


def _number(text: str, column: str, name: ColumnName, where: str) -> float:
    """A cell of a metric or of the load.

    Raises:
        InputError: it is no number, or one that the column cannot have.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    what, fix = "not a number", "Correct it, or leave it empty."
    if not math.isnan(number):
        what = _wrong(number, name)
        if not what:
            return number
        if name.name in _SHARES and number > 1:
            fix = f"Is it percent? Name it {column}_pct."
    raise InputError(f"{column} is {text!r}, {what}", where=where, fix=fix)


def _wrong(number: float, name: ColumnName) -> str:
    """What is wrong with a number in such a column, nothing if it is good."""
    if name.name == "request_rate":
        return "" if number > 0 else "which is no rate"
    if not 0 <= number < _MOST:
        return "which cannot be"
    if name.name in ("concurrency", "num_requests") and (number < 1 or not number.is_integer()):
        return "not a whole number from 1 on"
    if name.name in ("output_tokens", "prompt_tokens") and number < 1:
        return "not a number from 1 on"
    if name.name in _SHARES and name.scale == 1 and number > 1:
        return "above all of it, and without a unit"
    return ""


def _wide(
    path: Path, header: Sequence[str], lines: Sequence[Mapping[str, str]]
) -> tuple[list[str], list[dict[str, str]]]:
    """A row a number turned into a row a load: a column for each metric."""
    keys = [column for column in header if column not in ("metric", "value")]
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        key = tuple(line[column] for column in keys)
        row = rows.setdefault(key, dict(zip(keys, key, strict=True)) | dict.fromkeys(metrics, ""))
        if row[line["metric"]]:
            raise InputError(
                f"{line['metric']} is given twice of {', '.join(key) or 'the run'}",
                where=str(path),
                fix="Give each number once.",
            )
        row[line["metric"]] = line["value"]
    return [*keys, *metrics], list(rows.values())


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]], int]:
    """Header and rows of the first table of a file, and how many lines come behind the blank one after it."""
    text = read_text(path, fix="Give a CSV file.").removeprefix("\ufeff")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(f"cannot be read: {error}", where=str(path), fix="Give a CSV file.") from None
    begin = next((number for number, row in enumerate(rows) if any(row)), len(rows))
    end = next((n for n in range(begin + 2, len(rows)) if not any(rows[n])), len(rows))
    header, cells = rows[begin] if begin < len(rows) else [], [row for row in rows[begin + 1 : end] if row]
    further = sum(any(row) for row in rows[end:])
    lines = [dict(zip(header, row + [""] * (len(header) - len(row)), strict=False)) for row in cells]
    what = ""
    if not lines:
        what = "has no rows"
    elif any(len(row) > len(header) for row in cells):
        what = "has a row with more cells than its header"
    elif len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        what = f"has column {twice!r} twice"
    if what:
        raise InputError(what, where=str(path), fix="Give a table with a header and a row a load.")
    return header, lines, further


def decimals_of(path: Path) -> dict[str, int]:
    """Digits after the point of each column: those of its most precise cell."""
    header, lines, _ = _read_csv(path)
    return {column: max(_places(line[column]) for line in lines) for column in header}


def _places(text: str) -> int:
    mantissa, _, exponent = text.strip().lower().partition("e")
    places = len(mantissa.partition(".")[2]) - (int(exponent) if exponent.lstrip("+-").isdigit() else 0)
    return min(max(places, -_MOST_PLACES), _MOST_PLACES)


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _plain(text: str) -> float | int | str:
    if not _is_number(text) or not math.isfinite(number := float(text)):
        return text
    return int(number) if number.is_integer() else number
