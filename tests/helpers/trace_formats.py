"""Writers of the trace formats that traces.py reads."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from servecast.sim.traffic.trace_writers import write_timed_trace
from servecast.sim.traffic.traces import FORMATS, Trace, read_trace

AZURE_START = datetime.datetime(2023, 11, 16, 18, 0, 0)


def write_mooncake(trace: Trace, path: Path) -> None:
    """Write Mooncake's JSONL. Times are rounded to the format's whole milliseconds."""
    write_timed_trace(replace(trace, times_s=np.rint(1e3 * trace.times_s).astype(int)), path)


def write_azure(trace: Trace, path: Path, *, start: datetime.datetime = AZURE_START) -> None:
    """Write Azure's CSV, times to 100 ns from ``start``."""
    first = np.datetime64(start, "ns")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for time, prompt, output in _rows(trace):
            stamp = str(first + np.timedelta64(round(time * 1e7) * 100, "ns"))[:-2]
            writer.writerow([stamp.replace("T", " "), prompt, output])


def write_burstgpt(trace: Trace, path: Path, *, model: str = "GPT-4") -> None:
    """Write BurstGPT's CSV. vLLM's reader keeps the rows of model "GPT-4" only."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
        )
        for time, prompt, output in _rows(trace):
            writer.writerow([time, model, prompt, output, prompt + output, "API log"])


def _rows(trace: Trace) -> Iterator[tuple[float, int, int]]:
    yield from zip(
        trace.times_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
    )


WRITERS: dict[str, Callable[[Trace, Path], None]] = {
    "mooncake": write_mooncake,
    "azure": write_azure,
    "burstgpt": write_burstgpt,
    "timed_trace": write_timed_trace,
}


def read_mooncake(path: Path) -> Trace:
    return read_trace(path, FORMATS["mooncake"])


def read_azure(path: Path) -> Trace:
    return read_trace(path, FORMATS["azure"])


def read_burstgpt(path: Path) -> Trace:
    return read_trace(path, FORMATS["burstgpt"])


def read_timed_trace(path: Path, **changes: Any) -> Trace:
    """changes: of the format, as ``vllm bench serve`` takes them with ``--timed-trace-...``."""
    return read_trace(path, replace(FORMATS["timed_trace"], **changes))
