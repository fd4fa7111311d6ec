"""The error bands of ``sim/hardware/error_band.py``, from reproductions.

``python -m servecast.scenarios.make.error_bands docs/results`` reads what ``servecast reproduce NAME --json``
said of the shipped scenarios. Predicted means and medians, and rates, fall into groups that share what may be
wrong: a model on so many GPUs of a kind, or a whole report. A band is what 90 % of the errors keep, where
each group counts as much as another, and of several precisions that of the worst; how true it is, is told by
groups left out: the share of a group's errors inside the band of all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

SHARE = 0.9  # of the errors that a band is to hold
KERNELS = "inferencex-vllm"  # the scenario that rests on kernel timings
# Its tables whose waits are not predicted: KV pools that were full, or nearly.
APART = ("qwen3_235b_ranks",)
FITTED = "fitted to a report"  # the basis of scenarios with a profile
_CENTRAL = ("mean", "median", "p50")
_METRICS = {  # first word of a column -> the band that speaks of it
    "ttft": "ttft",
    "tpot": "tpot",
    "itl": "tpot",
    **dict.fromkeys(("e2e", "latency", "output", "throughput", "req", "makespan"), "throughput"),
}


@dataclass(frozen=True, slots=True)
class Error:
    """Of one predicted cell.

    basis: "kernel timings", the same with ", experts", or "fitted". kind: the precision, of kernel timings.
    group: what shares its faults. value: relative, without its sign.
    """

    basis: str
    kind: str
    group: str
    metric: str
    value: float


def errors(documents: Iterable[Mapping[str, Any]]) -> Iterator[Error]:
    """Of the predicted cells of reproductions, as ``reproduce --json`` has them."""
    for document in documents:
        if document["scenario"] == KERNELS:
            yield from _of_kernels(document["rows"], "kernel timings")
            for name, table in document["tables"].items():
                if name not in APART:
                    yield from _of_kernels(table["rows"], "kernel timings, experts")
            continue
        if document["provenance"]["basis"] != FITTED:
            continue  # a fleet by kernel timings: its errors are its router's, too
        for cell in (*document["rows"], *(c for table in document["tables"].values() for c in table["rows"])):
            first, *words = cell["metric"].split("_")
            central = first in ("output", "throughput", "req", "makespan") or set(words) & set(_CENTRAL)
            if (
                cell["used"] == "predicted"
                and cell["error_pct"] is not None
                and central
                and first in _METRICS
            ):
                yield Error("fitted", "", document["scenario"], _METRICS[first], abs(cell["error_pct"]) / 100)


def _of_kernels(cells: Sequence[Mapping[str, Any]], basis: str) -> Iterator[Error]:
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
            yield Error(basis, key[2], group, metric, abs(value))


Groups = Mapping[str, Sequence[float]]


def by_kind(found: Iterable[Error]) -> dict[str, dict[str, list[float]]]:
    """The errors of each group, the groups of a kind together."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for error in found:
        kinds.setdefault(error.kind, {}).setdefault(error.group, []).append(error.value)
    return kinds


def band(groups: Groups) -> float:
    """What ``SHARE`` of these errors keep, the groups alike."""
    values = np.concatenate([np.asarray(each) for each in groups.values()])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in groups.values()])
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, SHARE - 1e-9)])


def widest(kinds: Mapping[str, Groups]) -> float:
    """The band that all kinds keep."""
    return max(band(groups) for groups in kinds.values() if groups)


def left_out(kinds: Mapping[str, Groups]) -> dict[str, float]:
    """Of each group the share of errors inside the band of all others."""
    found = {}
    for groups in kinds.values():
        for name, own in groups.items():
            others = {k: {n: each for n, each in g.items() if n != name} for k, g in kinds.items()}
            found[name] = float(np.mean(np.asarray(own) <= widest(others)))
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """The reproductions in a folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [each for each in found if "mape_predicted" in each]


app = App(help="Derive the error bands from reproductions.")


@app.default
def main(folder: Path) -> None:
    """Print what every band would be, by basis and metric, and what groups left out say of it.

    Args:
        folder: of what ``servecast reproduce NAME --json`` printed.
    """
    found = list(errors(read(folder)))
    for basis in dict.fromkeys(error.basis for error in found):
        for metric in ("tpot", "ttft", "throughput"):
            kinds = by_kind(error for error in found if (error.basis, error.metric) == (basis, metric))
            inside = left_out(kinds)
            print(f"{basis}, {metric}: {SHARE:.0%} keep {widest(kinds):.1%}; groups left out:")
            for name, own in (each for groups in kinds.values() for each in groups.items()):
                print(
                    f"    {name}: {len(own)} errors, median {np.median(own):.1%}, {inside[name]:.0%} inside"
                )


if __name__ == "__main__":
    app()
