"""Where simulations run: processes here, or those of dask or ray; results do not depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from joblib import Parallel, parallel_config

from servecast.sim.inputs.errors import InputError

Backend = Literal["loky", "dask", "ray"]


@dataclass(frozen=True, slots=True)
class Workers:
    """Where they run; results do not depend on it.

    Attributes:
        jobs: processes; -1 is one for each core.
        backend: what runs them.
        dask_scheduler: address of the scheduler for the backend dask, as tcp://127.0.0.1:8786.
    """

    jobs: int = -1
    backend: Backend = "loky"
    dask_scheduler: str | None = None


@contextmanager
def parallel(workers: Workers) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
    """What runs tasks and yields their results as they are done."""
    jobs, backend = workers.jobs, workers.backend
    if backend == "loky":
        yield Parallel(n_jobs=jobs, backend="loky", batch_size=1, return_as="generator_unordered")
    elif backend == "dask":
        with _dask_client(workers.dask_scheduler) as client, parallel_config(backend="dask", client=client):
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
        fix = "Start one with dask scheduler, and give for example tcp://127.0.0.1:8786."
        raise InputError("dask needs the address of its scheduler", where="--dask-scheduler", fix=fix)
    try:
        client = _optional("distributed", "dask").Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        what = f"no dask scheduler answers at {address!r} ({error})"
        fix = "Start one with dask scheduler, and workers with dask worker ADDRESS."
        raise InputError(what, where="--dask-scheduler", fix=fix) from None
    with client:
        yield client


def _optional(module: str, extra: str) -> Any:
    """A module that servecast only needs for one backend."""
    try:
        return import_module(module)
    except ImportError:
        what = f"{extra} is not installed"
        raise InputError(what, where=f"--backend {extra}", fix=f"Install servecast[{extra}].") from None
