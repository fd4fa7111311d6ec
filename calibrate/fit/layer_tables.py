"""Layer timing tables, as LLMServingSim's profiler writes them, read and checked.

A folder has ``meta.yaml`` (what was measured on what), ``dense.csv`` (layer, tokens, time_us),
``per_sequence.csv`` (layer, sequences, time_us) and ``attention.csv`` (prefill_chunk, kv_prefill or
prefill_key, n_decode, kv_decode, time_us), and of a mixture of experts ``moe.csv`` (tokens,
activated_experts, time_us). Kernel times of one layer on one rank, without the host; where several degrees of
tensor parallelism were measured, the tables are in folders tp1, tp2, ... beside ``meta.yaml``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.step_time.layers import LayerTables
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import read_text
from servecast.sim.inputs.yaml_file import read_yaml

FILES = ("meta.yaml", "dense.csv", "per_sequence.csv", "attention.csv")
MOE_FILE = "moe.csv"
_LINEAR = {"qkv_proj": 1, "o_proj": 1}  # kernel: times a layer runs it
_ELEMENTWISE = {"layernorm": 2, "rotary_emb": 1}
_MLP, _MLP_ELEMENTWISE = ("gate_up_proj", "down_proj"), "act_fn"
_ONCE = {"embedding": 1, "final_layernorm": 1}
_ATTENTION_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_KEYS = "prefill_key"  # in place of kv_prefill: the chunk is counted too
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
    return any((each / name).is_file() for each in (folder, *folder.glob("tp*")) for name in FILES[1:])


def read_layer_tables(
    folder: Path, model: ModelShape, gpu: GPU | None = None, *, tensor_parallel_size: int = 1
) -> LayerFolder:
    """Read a folder of layer timing tables.

    Args:
        folder: with the files of ``FILES``.
        model: the sizes of the model that was measured, whole.
        gpu: that the tables are of, where a file describes it; otherwise the catalogue knows it.
        tensor_parallel_size: whose tables to read.

    Raises:
        InputError: a file, a column, a kernel or a point of a grid is missing, a value is no time, or the
            folder was measured on another GPU or a model of other sizes.
    """
    degrees = sorted(int(each.name[2:]) for each in folder.glob("tp*") if each.name[2:].isdigit())
    inside = folder / f"tp{tensor_parallel_size}" if tensor_parallel_size in degrees else folder
    tables_of = (*FILES[1:], MOE_FILE) if model.moe_layers else FILES[1:]
    files = [folder / FILES[0], *(inside / name for name in tables_of)]
    meta: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            fix = f"Give a folder of layer timing tables: {', '.join(each.name for each in files)}."
            raise InputError(f"there is no {file.name}", where=str(file.parent), fix=fix)
        meta = meta or _meta(file, model, tensor_parallel_size, degrees)
    dense_share = (model.layers - model.moe_layers) / model.layers
    linear: dict[str, float] = {**_LINEAR}
    elementwise: dict[str, float] = {**_ELEMENTWISE}
    if dense_share:
        linear |= dict.fromkeys(_MLP, dense_share)
        elementwise[_MLP_ELEMENTWISE] = dense_share
    if model.qk_norm:
        elementwise["qk_norm"] = 1
    dense = _by_kernel(inside / "dense.csv", "tokens", (*linear, *elementwise, *_ONCE))
    rows = _by_kernel(inside / "per_sequence.csv", "sequences", ("lm_head", "sampler"))
    tokens, sequences = tuple(sorted(dense["o_proj"])), tuple(sorted(rows["lm_head"]))
    axes, attention, keys = _attention(inside / "attention.csv")

    def summed(kernels: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(sum(n * dense[kernel][at] for kernel, n in kernels.items()) for at in tokens)

    tables = LayerTables(
        gpu=_gpu_of(str(meta["gpu"]), gpu, f"{folder / FILES[0]}: gpu"),
        shape=model,
        tensor_parallel_size=tensor_parallel_size,
        tokens=tokens,
        linear=summed(linear),
        elementwise=summed(elementwise),
        once=summed(_ONCE),
        sequences=sequences,
        lm_head=tuple(rows["lm_head"][at] for at in sequences),
        sampler=tuple(rows["sampler"][at] for at in sequences),
        chunk=axes[0],
        context=axes[1],
        decodes=axes[2],
        decode_context=axes[3],
        attention=attention,
        keys=keys,
        **(_experts(inside / MOE_FILE) if model.moe_layers else {}),
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return LayerFolder(
        tables=tables,
        model=str(meta["model"]),
        engine_version=str(meta["vllm_version"]),
        sha256=digest.hexdigest(),
    )


def _gpu_of(measured: str, given: GPU | None, where: str) -> str:
    """The name of the GPU that was measured: the catalogue's, or that of a file, which it lacks."""
    try:
        return find_gpu(measured, where=where).name
    except InputError:
        if given is None:
            raise
        return given.name


def _meta(path: Path, model: ModelShape, ranks: int, degrees: Sequence[int]) -> dict[str, Any]:
    meta = read_yaml(path)
    for name in ("gpu", "model", "vllm_version", "tp_degrees"):
        if meta.get(name) is None:
            raise InputError(f"{name} is missing", where=str(path), fix="Say what was measured on what.")
    measured = meta["tp_degrees"]
    if ranks not in measured if ranks in degrees else measured != [ranks]:
        raise InputError(
            f"tables of tensor parallel degrees {measured}, the scenario's is {ranks}",
            where=f"{path}: tp_degrees",
            fix="Give tables of that degree, in a folder tpN where there are others; or fit kind physical, "
            "which carries over.",
        )
    engine = meta.get("engine_effective") or {}
    sizes = engine.get("hf_overrides") or {}
    for ours, theirs in _SIZES.items():
        whole = getattr(model, ours)  # the profiler writes a rank's sizes
        if sizes.get(theirs, whole) not in {whole // n for n in (1, *measured)}:
            raise InputError(
                f"{theirs} is {sizes[theirs]}, that of {model.name} is {getattr(model, ours)}",
                where=f"{path}: engine_effective.hf_overrides",
                fix="Name the config of the model that was measured.",
            )
    return meta


def _lines(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table, each with its place for messages."""
    text = read_text(path, fix="Copy the folder again.")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        header, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise InputError(f"cannot be read ({error})", where=str(path), fix="Copy the folder again.") from None
    for column in columns:
        if column not in header:
            fix = f"Its columns should be {', '.join(columns)}."
            raise InputError(f"there is no column {column!r}", where=str(path), fix=fix)
    if not rows:
        raise InputError("has no rows", where=str(path), fix="Measure again.")
    return [(f"{path}, line {number}", row) for number, row in enumerate(rows, start=2)]


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value < math.inf:
        fix = "Is the file cut off? Remove the line or measure again."
        raise InputError(f"{column} is {row[column]!r}, not a number of 0 or more", where=where, fix=fix)
    return value


def _count(row: Mapping[str, str], column: str, where: str) -> int:
    if not (value := _number(row, column, where)).is_integer():
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
            fix = "Measure every kernel at the same points, from 1 on."
            raise InputError(f"{kernel} was not measured at {missing[0]} {size}", where=str(path), fix=fix)
    return found


def _attention(path: Path) -> tuple[list[tuple[int, ...]], tuple[float | None, ...], bool]:
    """Axes, the times at their points, None where not measured, and whether the second axis counts keys."""
    times: dict[tuple[int, ...], float] = {}
    with path.open(encoding="utf-8", newline="") as file:
        keys = _KEYS in next(csv.reader(file), [])
    names = [_KEYS if keys and name == "kv_prefill" else name for name in _ATTENTION_AXES]
    kinds: set[str | None] = set()
    for where, row in _lines(path, (*names, "time_us")):
        if row.get("decode_q_len", "1") != "1":
            continue  # speculation
        kinds.add(row.get("layer"))
        point = tuple(_count(row, axis, where) for axis in names)
        if point in times:
            raise InputError("a point for the second time", where=where, fix="Keep one of them.")
        times[point] = 1e-6 * _number(row, "time_us", where)
    if len(kinds) > 1:
        raise InputError(
            f"attention of several kinds: {', '.join(sorted(map(str, kinds)))}",
            where=str(path),
            fix="Keep the rows of one: a model of several kinds is not put together from tables.",
        )
    axes = [tuple(sorted({0, *values})) for values in zip(*times, strict=True)]
    for axis, name in zip(axes, names, strict=True):
        if len(axis) < 2:
            raise InputError(f"{name} is always 0", where=str(path), fix="Measure prompts and decodes.")
    return axes, tuple(times.get(point) for point in itertools.product(*axes)), keys


def _experts(path: Path) -> dict[str, Any]:
    """The experts of one layer by tokens and activated experts, all on one rank's share."""
    times: dict[tuple[int, int], float] = {}
    for where, row in _lines(path, ("tokens", "activated_experts", "time_us")):
        if row.get("ep", "1") == "1":
            point = _count(row, "tokens", where), _count(row, "activated_experts", where)
            times[point] = 1e-6 * _number(row, "time_us", where)
    if not times:
        raise InputError("has no rows of ep 1", where=str(path), fix="Measure without expert parallelism.")
    axes = [tuple(sorted(set(values))) for values in zip(*times, strict=True)]
    return {
        "expert_tokens": axes[0],
        "experts": axes[1],
        "expert_times": tuple(times.get(point) for point in itertools.product(*axes)),
    }
