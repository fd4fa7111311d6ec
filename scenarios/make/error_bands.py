"""The error bands of ``sim/hardware/error_band.py``, from reproductions.

``python -m servecast.scenarios.make.error_bands docs/results`` reads what ``servecast reproduce NAME --json``
said of the shipped scenarios. Predicted means and medians, and rates, fall into groups that share what may be
wrong: a model on so many GPUs of a kind, or a whole report. A band is what 90 % of the errors keep, where
each group counts as much as another; how true it is, is told by groups left out: the share of a group's
errors inside the band of all others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARE = 0.9  # of the errors that a band is to hold
KERNELS = "inferencex-vllm"  # the scenario that rests on kernel timings
_CENTRAL = ("mean", "median", "p50")
_METRICS = {  # first word of a column -> the band that speaks of it
    "ttft": "ttft",
    "tpot": "tpot",
    "itl": "tpot",
    **dict.fromkeys(("e2e", "latency", "output", "throughput", "req", "makespan"), "throughput"),
}


@dataclass(frozen=True, slots=True)
class Error:
    """Of one predicted cell. basis: "kernel timings" or "fitted"; group: what shares its faults; value:
    relative, without its sign."""

    basis: str
    group: str
    metric: str
    value: float


def errors(documents: Iterable[Mapping[str, Any]]) -> Iterator[Error]:
    """Of the predicted cells of reproductions, as ``reproduce --json`` has them."""
    for document in documents:
        if document["scenario"] == KERNELS:
            yield from _of_kernels(document["rows"])
            continue
        for cell in (*document["rows"], *(c for table in document["tables"].values() for c in table["rows"])):
            first, *words = cell["metric"].split("_")
            central = first in ("output", "throughput", "req", "makespan") or set(words) & set(_CENTRAL)
            if (
                cell["used"] == "predicted"
                and cell["error_pct"] is not None
                and central
                and first in _METRICS
            ):
                yield Error("fitted", document["scenario"], _METRICS[first], abs(cell["error_pct"]) / 100)


def _of_kernels(cells: Sequence[Mapping[str, Any]]) -> Iterator[Error]:
    """TTFT and TPOT as they are, and throughput as the two make it in a closed loop."""
    rows: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    keys = ("model", "gpu", "precision", "tensor_parallel_size", "isl", "osl", "concurrency")
    for cell in cells:
        rows.setdefault(tuple(cell[key] for key in keys), {})[cell["metric"]] = cell
    for key, row in rows.items():
        group = " ".join(map(str, key[:4]))
        ttft, tpot, tokens = row["ttft_mean_ms"], row["tpot_mean_ms"], key[5] - 1
        whole = [ttft[of] + tokens * tpot[of] for of in ("reported", "predicted")]
        for metric, value in (
            ("ttft", ttft["error_pct"] / 100),
            ("tpot", tpot["error_pct"] / 100),
            ("throughput", whole[0] / whole[1] - 1),
        ):
            yield Error("kernel timings", group, metric, abs(value))


def by_group(found: Iterable[Error]) -> dict[str, list[float]]:
    """The errors of each group."""
    groups: dict[str, list[float]] = {}
    for error in found:
        groups.setdefault(error.group, []).append(error.value)
    return groups


def band(groups: Mapping[str, Sequence[float]]) -> float:
    """What ``SHARE`` of these errors keep, the groups alike."""
    values = np.concatenate([np.asarray(each) for each in groups.values()])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in groups.values()])
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, SHARE)])


def left_out(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each group the share of errors inside the band of all others."""
    return {
        name: float(np.mean(np.asarray(own) <= band({n: each for n, each in groups.items() if n != name})))
        for name, own in groups.items()
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """The reproductions in a folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [each for each in found if "mape_predicted" in each]


def main() -> None:
    """Print what every band would be, by basis and metric, and what groups left out say of it."""
    found = list(errors(read(Path(sys.argv[1]))))
    for basis in dict.fromkeys(error.basis for error in found):
        for metric in ("tpot", "ttft", "throughput"):
            groups = by_group(error for error in found if (error.basis, error.metric) == (basis, metric))
            inside = left_out(groups)
            print(f"{basis}, {metric}: {SHARE:.0%} keep {band(groups):.1%}; left out, ", end="")
            print(f"{np.mean(list(inside.values())):.0%} of a group are inside on average")
            for name, own in groups.items():
                print(
                    f"    {name}: {len(own)} errors, median {np.median(own):.1%}, {inside[name]:.0%} inside"
                )


if __name__ == "__main__":
    main()
