"""A folder of measurements, as ``servecast calibrate measure`` leaves it, read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from servecast.calibrate.fit.rows import ENGINE_ROWS, KERNEL_ROWS, Kernel, Overhead, Step, kernel
from servecast.calibrate.measure.folder import SAME_MACHINE, read_facts, read_rows
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.vllm_server import RELEASES

KERNELS_FILE, ENGINE_FILE = "kernels.jsonl", "engine.jsonl"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Engine:
    """One start of an engine. flags: resolved by vLLM, by their names there."""

    model: ModelShape
    flags: Mapping[str, Any]

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.flags.get("tensor_parallel_size") or 1)

    def shard(self, gpu: GPU) -> Shard:
        """One rank of it, on such GPUs."""
        fp8 = str(self.flags.get("kv_cache_dtype", "auto")).startswith("fp8")
        return Shard(
            self.model,
            gpu,
            self.tensor_parallel_size,
            kv_dtype_bytes=1 if fp8 else self.model.dtype_bytes,
            cudagraph_sizes=self._cudagraph_sizes(gpu),
        )

    def step_time(self, gpu: GPU, efficiencies: Efficiencies) -> PhysicalStepTime:
        """The physical model of this engine's steps."""
        return PhysicalStepTime(self.shard(gpu), efficiencies)

    def _cudagraph_sizes(self, gpu: GPU) -> tuple[int, ...]:
        """As the engine said, or as its release has them by default. None on a CPU or with eager mode."""
        given = self.flags.get("cudagraph_capture_sizes")
        if given is not None:
            return tuple(sorted(given))
        if self.flags.get("enforce_eager") or gpu.name.lower() == "cpu":
            return ()
        needed = ("max_num_seqs", "max_num_batched_tokens", "version")
        if any(self.flags.get(name) is None for name in needed):
            return ()
        return cudagraph_capture_sizes(
            self.flags["max_num_seqs"],
            self.flags["max_num_batched_tokens"],
            version=str(self.flags["version"]),
            capability=gpu.capability,
        )


@dataclass(frozen=True, slots=True)
class Measurements:
    """What a folder holds.

    facts: of the machine. notes: what a reader of the fit should know (lines dropped, no rule set, ...).
    sha256: of the raw rows and facts.
    """

    folder: Path
    facts: Mapping[str, Any]
    kernels: tuple[Kernel, ...]
    engines: tuple[Engine, ...]
    steps: tuple[Step, ...]
    overheads: tuple[Overhead, ...]
    notes: tuple[str, ...]
    sha256: str

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that steps were measured with, in their order."""
        return tuple(dict.fromkeys(self.engines[step.engine].model.name for step in self.steps))

    @property
    def version(self) -> str | None:
        """vLLM's, None where only kernels were measured."""
        version = self.facts.get("vllm")
        return None if version is None else str(version)


def read_folder(folder: str | Path) -> Measurements:
    """Read a folder of measurements.

    A last line that was cut off while it was written is dropped, and ``notes`` says so.

    Raises:
        InputError: no facts, no rows, a broken line, a field that is missing or wrong, or rows of another
            machine or version than the facts name.
    """
    folder, notes = Path(folder), list[str]()
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), fix="Give one that calibrate measure wrote.")
    files = [path for name in (KERNELS_FILE, ENGINE_FILE) if (path := folder / name).exists()]
    facts = read_facts(folder)
    raw = {path.name: read_rows(path, warn=notes.append) for path in files}
    if not isinstance(facts.get("gpu"), str):
        raise InputError("gpu is missing", where=f"{folder / 'facts.json'}: gpu", fix="Measure again.")
    for name, rows in raw.items():
        _one_machine(facts, rows, folder / name)
    kernels = tuple(
        _checked(kernel, row, folder / KERNELS_FILE)
        for row in _known(raw.get(KERNELS_FILE, []), KERNEL_ROWS, KERNELS_FILE, notes)
    )
    engines, steps, overheads = _engine_rows(
        _known(raw.get(ENGINE_FILE, []), ENGINE_ROWS, ENGINE_FILE, notes), facts, folder / ENGINE_FILE
    )
    if not kernels and not steps:
        fix = "Run servecast calibrate measure kernels or engine into it."
        raise InputError("no measured rows", where=str(folder), fix=fix)
    digest = hashlib.sha256()
    for path in (folder / "facts.json", *files):
        digest.update(path.read_bytes())
    found = Measurements(folder, facts, kernels, engines, steps, overheads, tuple(notes), digest.hexdigest())
    return replace(found, notes=(*notes, *_version_notes(found.version)))


def _known(
    rows: Sequence[Mapping[str, Any]], known: set[str], file: str, notes: list[str]
) -> list[Mapping[str, Any]]:
    unknown = [str(row["row"]) for row in rows if row["row"] not in known]
    if unknown:
        kinds = ", ".join(dict.fromkeys(unknown))
        notes.append(f"{file}: {len(unknown)} rows of kinds that this version does not use: {kinds}")
    return [row for row in rows if row["row"] in known]


def _one_machine(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Rows may repeat what machine they come from; the version of vLLM stands in an engine's flags."""
    for row in rows:
        told = {name: row[name] for name in SAME_MACHINE if row.get(name) is not None}
        if row["row"] == "engine" and isinstance(row.get("flags"), Mapping) and "version" in row["flags"]:
            told["vllm"] = row["flags"]["version"]
        for name, value in told.items():
            if _plain(value) != _plain(facts.get(name)):
                raise InputError(
                    f"measured with {name} {value!r}, but facts.json says {facts.get(name)!r}",
                    where=f"{file}: case {row['case']}",
                    fix="Keep one folder for each machine and version: their rows cannot be fitted together.",
                )


def _plain(version: object) -> str:
    """Without the build's own suffix ("0.32.0+cpu")."""
    return str(version).split("+")[0]


def _checked(parse: Callable[[Mapping[str, Any]], T], row: Mapping[str, Any], file: Path) -> T:
    try:
        return parse(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            first["msg"].removeprefix("Value error, "),
            where=f"{file}: case {row['case']}" + (f": {field}" if field else ""),
            fix="Remove that line, or measure again.",
        ) from error


def _engine_rows(
    rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], file: Path
) -> tuple[tuple[Engine, ...], tuple[Step, ...], tuple[Overhead, ...]]:
    """A step belongs to the newest engine of its model before it: a resumed run starts one again."""
    engines: list[Engine] = []
    newest: dict[str, int] = {}
    steps: list[Step] = []
    overheads: list[Overhead] = []
    for row in rows:
        if row["row"] == "engine":
            engine = _engine(row, facts, file)
            if engine not in engines:
                engines.append(engine)
            newest[str(row["model"])] = engines.index(engine)
        elif row["row"] == "overhead":
            overheads.append(_checked(Overhead.model_validate, row, file))
        elif row.get("model") not in newest:
            raise InputError(
                f"step of {row.get('model')!r}, but no engine row of that model stands before it",
                where=f"{file}: case {row['case']}",
                fix="Measure again: the engine row says the model's sizes and the flags.",
            )
        else:
            steps.append(_checked(Step.model_validate, {**row, "engine": newest[row["model"]]}, file))
    return tuple(engines), tuple(steps), tuple(overheads)


def _engine(row: Mapping[str, Any], facts: Mapping[str, Any], file: Path) -> Engine:
    where = f"{file}: case {row['case']}"
    for name in ("config", "flags"):
        if not isinstance(row.get(name), Mapping):
            raise InputError(f"{name} is missing", where=f"{where}: {name}", fix="Measure again.")
    try:
        own = row["config"].get("_name_or_path") or row.get("model")  # as a scenario's config is named
        model = ModelShape.from_config(row["config"], str(own))
    except InputError as error:
        raise InputError(error.what, where=f"{where}: {error.where}", fix=error.fix) from error
    flags = {"version": facts.get("vllm"), **row["flags"]}
    if str(flags.get("dtype", "auto")).removeprefix("torch.") in ("float32", "float"):
        model = replace(model, dtype_bytes=4, weight_bytes_each=4)
    elif flags.get("quantization") == "fp8":
        model = replace(model, weight_bytes_each=1)
    return Engine(model, flags)


def _version_notes(version: str | None) -> tuple[str, ...]:
    release = ".".join((version or "").split(".")[:2])
    if version is None or release in RELEASES:
        return ()
    return (
        f"vLLM {version} has no rule set ({', '.join(RELEASES)} have): its step times can be fitted, "
        "but a simulation needs engine.assume_rules",
    )
