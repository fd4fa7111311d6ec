"""Times the kernels of some models on this machine's device, and writes a row each."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..engine.measure import model_config
from ..errors import MeasureError
from ..facts import collect, nvidia_smi
from ..folder import Budget, Folder, say, walk
from .cases import DTYPES, TYPICAL_SHAPES, Case, Shape, cases
from .device_timer import DeviceTimer

FILE = "kernels.jsonl"
LOAD_FILE, LOAD_S = "nvidia-smi.txt", 3.0  # what the driver says of a GPU that has been busy for so long


def time_kernels(args: argparse.Namespace) -> None:
    """Time the kernels, the most useful first; what is left out is said on stderr."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = Budget(args.time_budget)
    shapes = [_shape(model) for model in args.model] or list(TYPICAL_SHAPES)
    wanted = cases(device, shapes, _dtypes(device, args.dtypes), max_tokens=args.max_tokens)
    with Folder(args.out, FILE, collect(), resume=args.resume) as folder:
        if device == "cuda" and not (folder.path / LOAD_FILE).exists():
            _look_under_load(folder.path / LOAD_FILE)
        _walk(folder, wanted, DeviceTimer(device, repeats=args.repeats), budget)


def _walk(folder: Folder, wanted: Sequence[Case], timer: DeviceTimer, budget: Budget) -> None:
    expected = 0.0

    def measure(case: Case) -> str:
        nonlocal expected
        began = budget.spent_s
        try:
            times = _measured(case, timer)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, or no such kernel here
            say(f"left out: {case.key}: {str(error).splitlines()[0]}")
        else:
            folder.add({**case.fields, "case": case.key, "times_s": times})
        expected = (expected + budget.spent_s - began) / 2
        return case.key

    todo = [case for case in wanted if case.key not in folder.cases]
    walk(todo, budget, measure, lambda _case: expected)


def _look_under_load(file: Path) -> None:
    """Keep what the driver says while matrix products run: the clocks that measurements are taken at."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    out = torch.empty_like(a)
    deadline, asked = time.monotonic() + LOAD_S, None
    with ThreadPoolExecutor(1) as pool:
        while asked is None or not asked.done():
            for _ in range(20):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize()
            if asked is None and time.monotonic() > deadline:
                asked = pool.submit(nvidia_smi)
    if (text := asked.result()) is not None:
        file.write_text(text, encoding="utf-8")


def _measured(case: Case, timer: DeviceTimer) -> list[float]:
    free = _free_bytes(timer.device)
    if case.bytes > 0.8 * free:
        raise RuntimeError(f"needs {case.bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    works = case.works(timer.device)
    times = timer.times(works, graph=case.graph)
    assert statistics.median(times) > 0
    return [float(f"{seconds:.4g}") for seconds in times]


def _free_bytes(device: str) -> float:
    if device == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")


def _dtypes(device: str, asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in DTYPES:
            raise MeasureError(f"{name!r} is no dtype", "--dtypes", f"Give some of {', '.join(DTYPES)}.")
    if asked:
        return list(dict.fromkeys(asked))
    if device == "cpu":
        return ["bf16", "fp32"]
    capability = torch.cuda.get_device_capability()
    return ["bf16", "fp16", *(["fp8"] if capability >= (8, 9) else [])]


def _shape(model: Path) -> Shape:
    config = model_config(model)
    try:
        return Shape.of(config)
    except (ValueError, KeyError, TypeError) as error:
        raise MeasureError(
            f"has not the sizes of a model ({error})", str(model), "Give a config.json."
        ) from error
