"""Results of load generators, read as runs like simulated ones.

``read(path)`` recognises the format by what is in the file: vllm bench serve, guidellm, aiperf,
inference-perf, or an llm-d benchmark report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.validate.readers.aiperf import Aiperf
from servecast.validate.readers.benchmark_report import BenchmarkReport
from servecast.validate.readers.document import values_of
from servecast.validate.readers.guidellm import Guidellm
from servecast.validate.readers.inference_perf import InferencePerf
from servecast.validate.readers.reading import Context, Reader, Reading
from servecast.validate.readers.vllm_bench import VllmBench

__all__ = ["READERS", "Context", "Reading", "read", "read_all", "sniff"]

READERS: dict[str, Reader] = {
    "vllm": VllmBench(),
    "guidellm": Guidellm(),
    "aiperf": Aiperf(),
    "inference-perf": InferencePerf(),
    "benchmark-report": BenchmarkReport(),
}


def read(path: Path) -> Reading:
    """The one run of a result file.

    Raises:
        InputError: as ``read_all``, or the file has several runs.
    """
    readings = read_all(path)
    if len(readings) > 1:
        raise InputError(
            f"has {len(readings)} runs ({'; '.join(each.label for each in readings)})",
            where=str(path),
            fix="Give a file with one run.",
        )
    return readings[0]


def read_all(path: Path) -> list[Reading]:
    """The runs of a result file, in its order.

    Raises:
        InputError: it cannot be read, is cut off, of no known format, a mix of formats, or without a run.
    """
    try:
        values = values_of(path)
        sweep = values[0] if len(values) == 1 and isinstance(values[0], list) else []
        if sweep and all(map(READERS["vllm"].recognises, sweep)):
            values = sweep  # the summary.json of vllm bench sweep
        return READERS[sniff(values, path)].read(values, path)
    except RecursionError:
        raise InputError(
            "is nested too deeply", where=str(path), fix="Is it a result? Save it again with the tool."
        ) from None


def sniff(values: Sequence[Any], path: Path) -> str:
    """Which of ``READERS`` reads these values of a file.

    Raises:
        InputError: none does, or not the same one does all of them.
    """
    found = [next((name for name, reader in READERS.items() if reader.recognises(v)), None) for v in values]
    if len(set(found)) == 1 and found[0] is not None:
        return found[0]
    if set(found) == {None}:
        fix = f"Known are {', '.join(reader.name for reader in READERS.values())}."
        raise InputError(f"is a result of no known tool{_seen(values[0])}", where=str(path), fix=fix)
    odd = next(i for i, name in enumerate(found) if name != found[0])
    kinds = [READERS[name].name if name else "nothing known" for name in (found[0], found[odd])]
    raise InputError(
        f"is {kinds[1]}, the lines before it {kinds[0]}",
        where=f"{path}, line {odd + 1}",
        fix="Give each tool's results in a file of their own.",
    )


def _seen(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f" (it is a list, of objects with {', '.join(map(str, list(value[0])[:8]))})"
    if isinstance(value, dict):
        return f" (its fields are {', '.join(map(str, list(value)[:8]))}{', ...' if len(value) > 8 else ''})"
    return f" (it is a {type(value).__name__})"
