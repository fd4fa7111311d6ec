"""NVIDIA's tables of kernel times, read, and how an equation is fitted to some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel
from scipy.optimize import least_squares

from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.gpu_constants import Residuals
from servecast.sim.inputs.errors import InputError

Floats = npt.NDArray[np.float64]
Equation = Callable[[Sequence[float]], Floats]
C = TypeVar("C", bound=BaseModel)

TILE = 128  # query rows of an attention tile
LEAST_ROWS = 40
# of |fitted / measured - 1|, beyond which a fit that something else can stand for is not kept
WORST_MEDIAN = 0.25
FOLDERS = {  # GPU of the catalogue -> folder of its tables
    "A100": "a100_sxm",
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
    "B300": "b300_sxm",
    "GB200": "gb200",
    "GB300": "gb300",
    "L40S": "l40s",
    "RTX PRO 6000": "rtx_pro_6000_server",
}
KV = {"bfloat16": "bf16", "fp8": "fp8"}
# four bits and a scale for each 16 (nvfp4), 32 (mxfp4) or 64 (int4) weights
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4": 0.53125, "nvfp4": 0.5625, "mxfp4": 0.53125}
BYTES["mxfp4_mxfp8"] = BYTES["mxfp4"]


class Term(NamedTuple):
    """A part of a time: its constant times ``amount``, or ``amount`` over it. start, least, most: where the
    search for the constant begins, and its bounds."""

    amount: Floats | float
    start: float
    least: float
    most: float
    over: bool = False


def times(amount: Floats | float, start: float, most: float) -> Term:
    """So often an amount."""
    return Term(amount, start, 0.0, most)


def over(amount: Floats | float, start: float, least: float = 0.05, most: float = 1.0) -> Term:
    """An amount at the datasheet's rate, over the share of it that is reached."""
    return Term(amount, start, least, most, over=True)


@dataclass(frozen=True, slots=True)
class Timings:
    """Rows of one kind of kernel. seconds: measured. along: what they grow with, and edges of its regions."""

    seconds: Floats
    along: Floats
    edges: tuple[float, ...]

    @classmethod
    def of(cls, rows: pd.DataFrame, along: str, *edges: float) -> Timings:
        """Rows of a table that grow with one of its columns."""
        seconds, size = columns(rows, "seconds", along)
        return cls(seconds, size, edges)

    def sum_of(self, kind: type[C], known: Floats | float = 0.0, **terms: Term) -> C:
        """The constants of a kind of kernel whose times are a sum, by their names. known: a part of it that
        is."""

        def equation(constants: Sequence[float]) -> Floats:
            parts = zip(terms.values(), constants, strict=True)
            return np.asarray(known + sum(t.amount / c if t.over else t.amount * c for t, c in parts))

        ends = ([getattr(term, end) for term in terms.values()] for end in ("start", "least", "most"))
        values, kept = self.fit(equation, *ends)
        return kind(**dict(zip(terms, values, strict=True)), residuals=kept)

    def fit(
        self, equation: Equation, start: Sequence[float], least: Sequence[float], most: Sequence[float]
    ) -> tuple[list[float], Residuals]:
        """The constants between ``least`` and ``most`` for which ``equation`` is nearest, and what it
        leaves."""

        def residual(constants: Sequence[float]) -> Floats:
            return np.log(equation(constants) / self.seconds)

        found = least_squares(
            residual, start, bounds=(least, most), loss="soft_l1", f_scale=0.1, x_scale=np.abs(start)
        )
        error = np.expm1(residual(found.x))
        regions = {}
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            inside = (self.along >= low) & (self.along < high)
            if inside.any():
                regions[f"{low:g}-{high:g}"] = round(float(np.median(error[inside])), 3)
        size = np.abs(error)
        kept = Residuals(
            rows=len(error),
            median=round(float(np.median(size)), 4),
            p90=round(float(np.quantile(size, 0.9)), 4),
            by_region=regions,
        )
        return [float(f"{value:.4g}") for value in found.x], kept


class KernelTables:
    """The tables of one GPU.

    Args:
        folder: of an unpacked wheel, or any folder above ``systems/data``. gpu: of the catalogue.

    Raises:
        InputError: there are no tables of this GPU, or one cannot be read.
    """

    def __init__(self, folder: Path, gpu: GPU) -> None:
        self.gpu = gpu
        if gpu.name not in FOLDERS:
            raise InputError(
                f"there are no kernel tables of a {gpu.name}", where="--gpu", fix=f"Use {', '.join(FOLDERS)}."
            )
        found = sorted(folder.glob(f"**/data/{FOLDERS[gpu.name]}"))
        if not found:
            raise InputError(
                f"there is no folder systems/data/{FOLDERS[gpu.name]} below",
                where=str(folder),
                fix="Unpack the wheel of aiconfigurator-core there.",
            )
        self._folder = found[0]
        self.releases: set[str] = set()

    def has(self, operation: str, name: str, *, of: str = "vllm") -> bool:
        """Whether there is a table of that name."""
        return any(self._folder.glob(f"{operation}/{of}/*/{name}.parquet"))

    def read(
        self,
        operation: str,
        name: str,
        columns: Sequence[str],
        *,
        optional: Sequence[str] = (),
        of: str = "vllm",
    ) -> pd.DataFrame:
        """The newest table of an operation, with ``seconds``. optional: columns that old tables lack. of:
        whose releases."""
        files = sorted(
            self._folder.glob(f"{operation}/{of}/*/{name}.parquet"),
            key=lambda file: numbers(file.parent.name),
        )
        if not files:
            raise InputError(
                f"has no {operation}/vllm/*/{name}.parquet",
                where=str(self._folder),
                fix="Unpack the whole wheel.",
            )
        try:
            rows = pd.read_parquet(files[-1])
            rows = rows[[*columns, *(name for name in optional if name in rows), "latency"]]
        except ImportError as error:
            raise InputError(
                "reading parquet needs pyarrow", where=str(files[-1]), fix="Install servecast[parquet]."
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"is no table of kernel times ({error})", where=str(files[-1]), fix="Unpack the wheel again."
            ) from error
        if "dev" not in files[-1].parent.name and of == "vllm":
            self.releases.add(files[-1].parent.name)
        rows = rows[rows["latency"] > 0]
        return rows.assign(seconds=rows["latency"] * 1e-3)


def columns(rows: pd.DataFrame, *names: str) -> Iterator[Floats]:
    """Some of a table's columns as numbers."""
    return (rows[name].to_numpy(float) for name in names)


def parts(rows: pd.DataFrame, column: str, names: Mapping[str, str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Our name of each kind that a column names, and its rows; without those of few rows."""
    for name, ours in names.items():
        part = rows[rows[column] == name]
        if len(part) >= LEAST_ROWS:
            yield ours, part


def numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())
