"""``measure engine``: step times of a real vLLM engine over a designed grid of steps."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasureError
from ..facts import collect
from ..folder import Budget, Folder, say, walk
from ..folder import add_arguments as add_shared_arguments
from .grid import Case, grid
from .steps import Step

if TYPE_CHECKING:
    from .engine import Engine

FILE = "engine.jsonl"
SAME_NOT = ("num_gpu_blocks",)  # flags that may differ between two starts of one engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        help="folder with the model's config.json; of several, each step is measured on one after the other",
    )
    parser.add_argument("--name", help="the model's name in the rows; the folder's name without it")
    add_shared_arguments(parser)
    parser.add_argument("--passes", type=int, default=1, help="how often the grid is walked (1)")
    parser.add_argument("--steps", type=int, default=20, help="steps measured of each case, at most (20)")
    parser.add_argument("--least-steps", type=int, default=5, help="and at least (5), after ...")
    parser.add_argument("--case-seconds", type=float, default=1.0, help="... so many seconds (1)")
    parser.add_argument("--long-run-steps", type=int, default=500, help="steps of a long run, at most (500)")
    parser.add_argument("--regions", nargs="+", help="measure only these regions of the grid")
    parser.add_argument("--largest", type=int, help="leave out cases of more tokens or KV tokens than this")


def run(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Measure and return 0; cases that do not fit and what is left over are said on stderr.

    Args:
        flags: all that the parser did not know, for vLLM.
    """
    _check(args)
    budget = Budget(args.time_budget)  # the engines' start counts
    configs = [model_config(model) for model in args.model]
    try:
        from .engine import Engine  # brings vLLM, which neither --help nor a wrong argument waits for
    except ImportError as error:
        fix = "Give the Python of an environment that has vLLM."
        raise MeasureError(f"vLLM cannot be imported ({error})", "--python", fix) from error
    names = [args.name or model.resolve().name for model in args.model]
    engines: dict[str, Engine] = {}
    with Folder(args.out, FILE, collect(), resume=args.resume) as folder:
        try:
            for name, model, config in zip(names, args.model, configs, strict=True):
                engines[name] = Engine(model, flags)
                _add_engine_row(folder, name, config, engines[name])
            grids = {name: _cases(engine, args) for name, engine in engines.items()}
            _walk(folder, engines, grids, args, budget)
        finally:
            for engine in engines.values():
                engine.close()
    return 0


def _cases(engine: Engine, args: argparse.Namespace) -> list[Case]:
    cases, skipped = grid(engine.limits)
    for key, reason in skipped.items():
        say(f"does not fit, left out: {key}: {reason}")
    return [
        case
        for case in cases
        if (not args.regions or case.region in args.regions)
        and (not args.largest or _size(case) <= args.largest)
    ]


def _walk(
    folder: Folder,
    engines: dict[str, Engine],
    grids: dict[str, list[Case]],
    args: argparse.Namespace,
    budget: Budget,
) -> None:
    """Measure the grids. Several models take turns, so that what slows a machine down slows all alike."""
    todo = [
        (f"{name}/{case.key}" + (f"#{walk}" if walk > 1 else ""), name, case)
        for walk in range(1, args.passes + 1)
        for same in zip_longest(*grids.values())
        for name, case in zip(grids, same, strict=True)
        if case is not None
    ]
    todo = [(key, name, case) for key, name, case in todo if key not in folder.cases]
    took = defaultdict[str, list[float]](list)  # region -> seconds of its cases

    def measure(asked: tuple[str, str, Case]) -> str:
        key, name, case = asked
        begin = time.monotonic()
        steps, least = (args.long_run_steps,) * 2 if case.traffic else (args.steps, args.least_steps)
        found = engines[name].measure(
            case, steps=steps, least=least, seconds=args.case_seconds, until=begin + budget.left_s
        )
        if found:
            folder.add(*_rows(folder, key, name, case, found))
        else:
            say(f"{key}: no step of that composition was scheduled; skipped")
        took[case.region].append(time.monotonic() - begin)
        return key

    walk(todo, budget, measure, lambda asked: max(took[asked[2].region][-5:], default=0.0))


def _rows(folder: Folder, key: str, name: str, case: Case, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """One row for a composition; one a step for a long run, of which the last one has the case's own key.

    So a long run that was cut off while it was written is run again, after the rows that it left.
    """
    if not case.traffic:
        return [_row(key, name, case, steps)]
    left = sum(known.startswith(f"{key}/") for known in folder.cases)
    keys = [f"{key}/{left + number}" for number in range(len(steps) - 1)]
    return [_row(own, name, case, [step]) for own, step in zip([*keys, key], steps, strict=True)]


def _row(key: str, name: str, case: Case, steps: Sequence[Step]) -> dict[str, Any]:
    first = steps[0]
    return {
        "row": "step",
        "case": key,
        "model": name,
        "region": case.region,
        "chunks": [list(chunk) for chunk in first.chunks],
        "decodes": first.decodes,
        "decode_context": round(statistics.fmean(step.decode_context for step in steps)),
        "samples": first.samples,
        "times_s": [round(step.seconds or math.nan, 9) for step in steps],
    }


def _add_engine_row(folder: Folder, name: str, model: dict[str, Any], engine: Engine) -> None:
    """Say once a start which engine the rows after it are of; refuse another engine under the same name."""
    before = [row for row in folder.rows if row["row"] == "engine" and row["model"] == name]
    for row in before:
        other = [
            flag
            for flag in engine.flags
            if flag not in SAME_NOT and row["flags"].get(flag) != engine.flags[flag]
        ]
        other += ["config.json"] if row["config"] != model else []
        if other:
            raise MeasureError(
                f"has rows of a model {name!r} with another {', '.join(other)}",
                str(folder.path / FILE),
                "Give another --name or --out.",
            )
    folder.add(
        {
            "row": "engine",
            "case": f"{name}/engine/{len(before)}",
            "model": name,
            "config": model,
            "flags": engine.flags,
        }
    )


def model_config(model: Path) -> dict[str, Any]:
    """The config.json of a model's folder, or that file itself; MeasureError if there is none."""
    file = model if model.is_file() or model.suffix == ".json" else model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise MeasureError(
            f"cannot be read: {error.strerror}", str(file), "Give a folder with a model's config.json."
        ) from error
    except ValueError as error:
        raise MeasureError(
            f"cannot be read as a model's config ({error})", str(file), "Correct the file."
        ) from error
    return config


def _check(args: argparse.Namespace) -> None:
    for flag in ("passes", "steps", "least_steps", "case_seconds", "long_run_steps"):
        value = getattr(args, flag)
        if not value > 0:
            raise MeasureError(f"{value} is not above 0", "--" + flag.replace("_", "-"), "Give more.")
    names = [model.resolve().name for model in args.model]
    if len(set(names)) < len(names) or (args.name and len(names) > 1):
        fix = "Give folders that are named differently."
        raise MeasureError(f"{len(names)} models of the same name", "--model, --name", fix)


def _size(case: Case) -> int:
    tokens = sum(tokens + context for tokens, context in case.chunks) + sum(case.contexts)
    return max(tokens, sum(prompt for prompt, _ in case.traffic))
