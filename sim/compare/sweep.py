"""A grid of what-ifs, run in parallel, one result file a cell, so that a sweep can be taken up again."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from joblib import Parallel, delayed, parallel_config

from servecast.sim.inputs.errors import InputError
from servecast.sim.run.results import measured, result, write_result, write_table
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import with_request_rate
from servecast.sim.traffic.spec import Workload

Backend = Literal["loky", "dask", "ray"]
Reload = Callable[[Mapping[str, Any]], Scenario]
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation of a sweep.

    changes: dotted field paths and values, beyond what the whole sweep changes. request_rate,
    num_requests: open-loop traffic (requests/s); None runs the scenario's own workload.
    """

    changes: Mapping[str, Any]
    seed: int
    request_rate: float | None = None
    num_requests: int | None = None

    def to_json(self) -> Document:
        return {
            "changes": dict(self.changes),
            "seed": self.seed,
            "request_rate": self.request_rate,
            "num_requests": self.num_requests,
        }

    def workload(self, scenario: Scenario) -> Workload | None:
        """What to run instead of the scenario's own workload."""
        if self.request_rate is None:
            return None
        return with_request_rate(scenario.open_loop(), self.request_rate, num_requests=self.num_requests)


def grid(
    vary: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    num_requests: int = 1000,
) -> list[Cell]:
    """All combinations: the first varied field changes slowest, then the others, rates, seeds."""
    cells = []
    for values in itertools.product(*vary.values()):
        changes = dict(zip(vary, values, strict=True))
        for rate in rates or (None,):
            count = None if rate is None else num_requests
            cells += [Cell(changes, seed, rate, count) for seed in seeds]
    return cells


def fingerprint(cell: Cell, scenario: Scenario | None) -> str:
    """A hash of all that a cell's result depends on: version, scenario with its files' content, load, seed.

    scenario: None if the cell has none, since its changes cannot be applied.
    """
    content: Document = {"servecast_version": version("servecast"), "cell": cell.to_json()}
    if scenario is not None:
        files = {scenario.config_file(), scenario.profile_file(), *_paths(scenario.model_dump())} - {None}
        files |= {scenario.of_replica(spec).profile_file() for spec in scenario.fleet.specs} - {None}
        hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file is not None)
        content |= {"scenario": scenario.model_dump(mode="json"), "files": hashes}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)


@dataclass(frozen=True, slots=True)
class Swept:
    """A finished sweep: each cell's document in the grid's order, and how many were there before."""

    documents: tuple[Document, ...]
    reused: int

    @property
    def failed(self) -> int:
        return sum("error" in document for document in self.documents)

    def table(self) -> pd.DataFrame:
        """A row a cell (and stage): what was varied, then the metrics, and the error where it failed."""
        rows = []
        for document in self.documents:
            cell = document["cell"]
            head = {**cell["changes"], "seed": cell["seed"]}
            if cell["request_rate"] is not None:
                head["request_rate"] = cell["request_rate"]
            if "error" in document:
                rows.append(head | {"error": document["error"]})
                continue
            for part in document["stages"]:
                rows.append(head | {"stage": part["stage"]} | measured(part))
            if not document["stages"]:
                rows.append(head | measured(document))
        return pd.DataFrame(rows)


def sweep(
    reload: Reload,
    cells: Sequence[Cell],
    out: Path,
    *,
    what_if: Mapping[str, Any],
    resume: bool = False,
    jobs: int = 1,
    backend: Backend = "loky",
    dask_scheduler: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Swept:
    """Run the cells and write each one's result as soon as it is done, and ``summary.csv`` at the end.

    Results do not depend on the backend or the number of jobs. A cell whose input is wrong is recorded with
    its message, and the others go on.

    Args:
        reload: the scenario with a cell's changes. what_if: what the whole sweep changes, for the results.
        out: folder of the results; a file is named after its cell's `fingerprint`.
        resume: leave alone the cells that are there; those that failed are tried again.
        jobs: processes. backend, dask_scheduler: where they run; dask needs the scheduler's address.
        progress: called with (cells done, all cells).

    Raises:
        InputError: the backend is not there, or a file cannot be written.
    """
    documents: dict[int, Document] = {}
    waiting: list[tuple[int, Cell, Scenario]] = []
    names: dict[int, Path] = {}

    def keep(index: int, document: Document) -> None:
        documents[index] = document
        write_result(names[index], document)
        if progress is not None:
            progress(len(documents), len(cells))

    for index, cell in enumerate(cells):
        try:
            scenario = reload(cell.changes)
            names[index] = out / f"{fingerprint(cell, scenario)}.json"
        except InputError as error:
            names[index] = out / f"{fingerprint(cell, None)}.json"
            keep(index, {"cell": cell.to_json(), "error": str(error)})
            continue
        found = _done(names[index]) if resume else None
        if found is None:
            waiting.append((index, cell, scenario))
        else:
            documents[index] = found
    reused = len(cells) - len(waiting) - sum("error" in each for each in documents.values())
    with _parallel(backend, jobs, dask_scheduler) as run:
        tasks = (delayed(_simulate)(*each, dict(what_if)) for each in waiting)
        for index, document in run(tasks):
            keep(index, document)
    swept = Swept(tuple(documents[index] for index in range(len(cells))), reused)
    write_table(out / "summary.csv", swept.table())
    return swept


def _done(path: Path) -> Document | None:
    """A cell's result, if it is there and no failure."""
    if not path.is_file():
        return None
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return None if "error" in document else document


def _simulate(index: int, cell: Cell, scenario: Scenario, what_if: Mapping[str, Any]) -> tuple[int, Document]:
    try:
        deployment = Deployment.of(scenario)
        run = simulate(deployment, seed=cell.seed, workload=cell.workload(scenario))
        document = result(deployment, run, what_if={**what_if, **cell.changes})
    except InputError as error:
        document = {"error": str(error)}
    return index, {"cell": cell.to_json(), **document}


@contextmanager
def _parallel(
    backend: Backend, jobs: int, dask_scheduler: str | None
) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
    """What runs tasks and yields their results as they are done."""
    if backend == "loky":
        yield Parallel(n_jobs=jobs, backend="loky", batch_size=1, return_as="generator_unordered")
    elif backend == "dask":
        with _dask_client(dask_scheduler) as client, parallel_config(backend="dask", client=client):
            yield Parallel(n_jobs=-1, batch_size=1, return_as="generator_unordered")
    else:
        _optional("ray.util.joblib", "ray").register_ray()
        with parallel_config(backend="ray", n_jobs=jobs):
            yield lambda tasks: _in_chunks(Parallel(), tasks, size=4 * max(jobs, 1))


def _in_chunks(parallel: Parallel, tasks: Iterable[Any], *, size: int) -> Iterator[Any]:
    """For a backend that returns only lists: results come chunk by chunk."""
    tasks = iter(tasks)
    while chunk := list(itertools.islice(tasks, size)):
        yield from parallel(chunk)


@contextmanager
def _dask_client(address: str | None) -> Iterator[Any]:
    if address is None:
        raise InputError(
            "dask needs the address of its scheduler",
            where="--dask-scheduler",
            fix="Start one with dask scheduler, and give for example tcp://127.0.0.1:8786.",
        )
    try:
        client = _optional("distributed", "dask").Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no dask scheduler answers at {address!r} ({error})",
            where="--dask-scheduler",
            fix="Start one with dask scheduler, and workers with dask worker ADDRESS.",
        ) from None
    with client:
        yield client


def _optional(module: str, extra: str) -> Any:
    """A module that servecast only needs for one backend."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"{extra} is not installed", where=f"--backend {extra}", fix=f"Install servecast[{extra}]."
        ) from None
