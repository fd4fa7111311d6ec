"""Layer timing tables, as LLMServingSim's profiler writes them, read and checked.

A folder has ``meta.yaml`` (what was measured on what), ``dense.csv`` (layer, tokens, time_us),
``per_sequence.csv`` (layer, sequences, time_us) and ``attention.csv`` (prefill_chunk, kv_prefill, n_decode,
kv_decode, time_us). Kernel times of one layer, without the host.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.step_time.layers import LayerTables
from servecast.sim.inputs.errors import InputError

FILES = ("meta.yaml", "dense.csv", "per_sequence.csv", "attention.csv")
_LINEAR = {"qkv_proj": 1, "o_proj": 1, "gate_up_proj": 1, "down_proj": 1}  # kernel: times a layer runs it
_ELEMENTWISE = {"layernorm": 2, "rotary_emb": 1, "act_fn": 1}
_ONCE = {"embedding": 1, "final_layernorm": 1}
_ATTENTION_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_SIZES = {  # ours: config.json's
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True, slots=True)
class LayerFolder:
    """What a folder holds. model: the name that was given to the profiler. sha256: of the files."""

    tables: LayerTables
    model: str
    engine_version: str
    sha256: str


def is_layer_folder(folder: Path) -> bool:
    """Whether a folder holds layer timing tables, by the names of its files."""
    return (folder / "dense.csv").is_file() or (folder / "attention.csv").is_file()


def read_layer_tables(folder: Path, model: ModelShape) -> LayerFolder:
    """Read a folder of layer timing tables.

    Args:
        folder: with the files of ``FILES``.
        model: the sizes of the model that was measured.

    Raises:
        InputError: a file, a column, a kernel or a point of a grid is missing, a value is no time, or the
            folder was measured on a model of other sizes.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(
                f"there is no {name}",
                where=str(folder),
                fix=f"Give a folder of layer timing tables: {', '.join(FILES)}.",
            )
    meta = _meta(folder / "meta.yaml", model)
    dense = _by_kernel(folder / "dense.csv", "tokens", (*_LINEAR, *_ELEMENTWISE, *_ONCE))
    rows = _by_kernel(folder / "per_sequence.csv", "sequences", ("lm_head", "sampler"))
    tokens, sequences = tuple(sorted(dense["o_proj"])), tuple(sorted(rows["lm_head"]))
    axes, attention = _attention(folder / "attention.csv")

    def summed(kernels: Mapping[str, int]) -> tuple[float, ...]:
        return tuple(sum(n * dense[kernel][at] for kernel, n in kernels.items()) for at in tokens)

    tables = LayerTables(
        gpu=find_gpu(str(meta["gpu"]), where=f"{folder / 'meta.yaml'}: gpu").name,
        shape=model,
        tokens=tokens,
        linear=summed(_LINEAR),
        elementwise=summed(_ELEMENTWISE),
        once=summed(_ONCE),
        sequences=sequences,
        lm_head=tuple(rows["lm_head"][at] for at in sequences),
        sampler=tuple(rows["sampler"][at] for at in sequences),
        chunk=axes[0],
        context=axes[1],
        decodes=axes[2],
        decode_context=axes[3],
        attention=attention,
    )
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return LayerFolder(
        tables=tables,
        model=str(meta["model"]),
        engine_version=str(meta["vllm_version"]),
        sha256=digest.hexdigest(),
    )


def _meta(path: Path, model: ModelShape) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path), fix="Copy the folder again.") from None
    for name in ("gpu", "model", "vllm_version", "tp_degrees"):
        if not isinstance(meta, dict) or meta.get(name) is None:
            raise InputError(f"{name} is missing", where=str(path), fix="Say what was measured on what.")
    if meta["tp_degrees"] != [1]:
        raise InputError(
            f"tables of tensor parallel degrees {meta['tp_degrees']}",
            where=f"{path}: tp_degrees",
            fix="Give tables of degree 1 alone; a physical profile carries over to others.",
        )
    engine = meta.get("engine_effective") or {}
    sizes = engine.get("hf_overrides") or {}
    for ours, theirs in _SIZES.items():
        if sizes.get(theirs, getattr(model, ours)) != getattr(model, ours):
            raise InputError(
                f"{theirs} is {sizes[theirs]}, that of {model.name} is {getattr(model, ours)}",
                where=f"{path}: engine_effective.hf_overrides",
                fix="Name the config of the model that was measured.",
            )
    return meta


def _lines(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table, each with its place for messages."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read ({error})", where=str(path), fix="Copy the folder again.") from None
    for column in columns:
        if column not in header:
            raise InputError(
                f"there is no column {column!r}",
                where=str(path),
                fix=f"Its columns should be {', '.join(columns)}.",
            )
    if not rows:
        raise InputError("has no rows", where=str(path), fix="Measure again.")
    return [(f"{path}, line {number}", row) for number, row in enumerate(rows, start=2)]


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise InputError(
            f"{column} is {row[column]!r}, not a number of 0 or more",
            where=where,
            fix="Is the file cut off? Remove the line or measure again.",
        )
    return value


def _count(row: Mapping[str, str], column: str, where: str) -> int:
    value = _number(row, column, where)
    if not value.is_integer():
        raise InputError(f"{column} is {row[column]!r}, not a whole number", where=where, fix="Correct it.")
    return int(value)


def _by_kernel(path: Path, size: str, kernels: Sequence[str]) -> dict[str, dict[int, float]]:
    """Kernel -> tokens (or sequences) -> seconds; every kernel at every point, from 1 on."""
    found: dict[str, dict[int, float]] = {kernel: {} for kernel in kernels}
    for where, row in _lines(path, ("layer", size, "time_us")):
        if row["layer"] not in found:
            raise InputError(
                f"unknown kernel {row['layer']!r}", where=where, fix=f"Known are {', '.join(kernels)}."
            )
        at = _count(row, size, where)
        if at in found[row["layer"]]:
            raise InputError(f"{row['layer']} at {at} {size} again", where=where, fix="Keep one of them.")
        found[row["layer"]][at] = 1e-6 * _number(row, "time_us", where)
    points = sorted({at for times in found.values() for at in times})
    for kernel, times in found.items():
        missing = [at for at in (1, *points) if at not in times]
        if missing:
            raise InputError(
                f"{kernel} was not measured at {missing[0]} {size}",
                where=str(path),
                fix="Measure every kernel at the same points, from 1 on.",
            )
    return found


def _attention(path: Path) -> tuple[list[tuple[int, ...]], tuple[float | None, ...]]:
    """Axes, and the times at their points, None where not measured."""
    times: dict[tuple[int, ...], float] = {}
    for where, row in _lines(path, (*_ATTENTION_AXES, "time_us")):
        point = tuple(_count(row, axis, where) for axis in _ATTENTION_AXES)
        if point in times:
            raise InputError("a point for the second time", where=where, fix="Keep one of them.")
        times[point] = 1e-6 * _number(row, "time_us", where)
    axes = [tuple(sorted({0, *values})) for values in zip(*times, strict=True)]
    for axis, name in zip(axes, _ATTENTION_AXES, strict=True):
        if len(axis) < 2:
            raise InputError(f"{name} is always 0", where=str(path), fix="Measure prompts and decodes.")
    return axes, tuple(times.get(point) for point in itertools.product(*axes))
