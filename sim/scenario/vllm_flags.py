"""Parses a pasted ``vllm serve ...`` line.

The flags that vLLM knows are listed in vllm_flags.json. Those that the model of the engine has are taken,
those that change timing in ways it does not model are refused, all others are accepted and listed as ignored.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean

WHERE = "vllm serve"


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """A parsed command: the model's name, the flags taken (as fields of EngineFlags), those ignored."""

    model: str | None
    flags: dict[str, Any]
    ignored: tuple[str, ...]


def _human_int(text: str) -> int:
    """vLLM's human-readable integers: 1k is 1,000, 1K is 1,024, 25.6k is 25,600."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text)
    if match is None:
        return int(text)
    number, suffix = match.groups()
    power = "kmgt".index(suffix.lower()) + 1
    return int(float(number) * 1000**power) if suffix.islower() else int(number) * 1024**power


def _length(text: str) -> int | str:
    return "auto" if text.lower() in ("auto", "-1") else _human_int(text)


def _mapping(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


_TAKEN: dict[str, Callable[[str], Any]] = {
    "dtype": str,
    "quantization": str,
    "kv_cache_dtype": str,
    "tensor_parallel_size": int,
    "enable_expert_parallel": bool,
    "hf_overrides": _mapping,
    "max_model_len": _length,
    "max_num_seqs": int,
    "max_num_batched_tokens": _human_int,
    "block_size": int,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": _human_int,
    "num_gpu_blocks_override": int,
    "enable_prefix_caching": bool,
    "enable_chunked_prefill": bool,
    "scheduling_policy": str,
    "async_scheduling": bool,
    "scheduler_reserve_full_isl": bool,
    "long_prefill_token_threshold": int,
    "long_prefill_token_threshold_adaptive": bool,
    "watermark": float,
    "max_num_active_seqs": int,
    "prefill_schedule_interval": int,
    "performance_mode": str,
    "enforce_eager": bool,
    "max_cudagraph_capture_size": int,
    "stream_interval": int,
}
_SAME_AS = {"device_memory_utilization": "gpu_memory_utilization"}
_REFUSED = {  # flag -> what to do instead; "1" and --no-... ask for nothing
    "pipeline_parallel_size": "Pipeline parallelism is not modelled: use tensor_parallel_size.",
    "data_parallel_size": "Give the number of replicas as fleet.replicas.",
    "decode_context_parallel_size": "Context parallelism is not modelled.",
    "prefill_context_parallel_size": "Context parallelism is not modelled.",
    "speculative_config": "Speculative decoding is not modelled.",
    "spec_method": "Speculative decoding is not modelled.",
    "spec_model": "Speculative decoding is not modelled.",
    "spec_tokens": "Speculative decoding is not modelled.",
    "max_num_scheduled_tokens": "Give max_num_batched_tokens.",
    "max_num_partial_prefills": "Give long_prefill_token_threshold.",
    "cpu_offload_gb": "Offloading is not modelled.",
    "kv_offloading_size": "Offloading is not modelled.",
    "enable_dbo": "Dual batch overlap is not modelled.",
    "config": "Paste the flags of the file.",
}


@dataclass(frozen=True, slots=True)
class _Known:
    """vLLM's flags: what each takes ("switch", "value", "values"), the long form of short ones, and the
    release of those that only one release has."""

    takes: dict[str, str]
    short: dict[str, str]
    only_in: dict[str, str]


@functools.cache
def _known() -> _Known:
    text = resources.files("servecast.sim.scenario").joinpath("vllm_flags.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return _Known(
        {flag.replace("-", "_"): kind for kind in ("switch", "value", "values") for flag in data[kind]},
        {short: flag.replace("-", "_") for short, flag in data["short"].items()},
        {flag.replace("-", "_"): release for release, flags in data["only_in"].items() for flag in flags},
    )


def parse_serve_command(command: str, *, version: str | None = None) -> ServeCommand:
    """Parse ``vllm serve MODEL --flag value --flag=value --no-flag ...``; dashes or underscores.

    With the ``version`` of a release whose flags are known, flags that it does not have are refused.

    Raises:
        InputError: an unknown flag, one that is not modelled, or a value that does not fit.
    """
    try:
        words = shlex.split(command.replace("\\\n", " "))
    except ValueError as error:
        raise InputError(
            f"cannot be split into words: {error}", where=WHERE, fix="Check the quotes."
        ) from None
    if words[:2] != ["vllm", "serve"]:
        raise InputError(
            f"{command.strip()[:40]!r} is not a vllm serve command",
            where=WHERE,
            fix="Paste it from 'vllm serve' on.",
        )
    words = words[2:]
    model: str | None = None
    flags: dict[str, Any] = {}
    ignored: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            if model is not None:
                raise InputError(
                    f"{word!r} follows no flag, and the model is {model!r}",
                    where=WHERE,
                    fix="Check the line.",
                )
            model = word
            continue
        name, takes, value = _flag(word)
        _check_release(word, name, version)
        if takes == "values":
            while words and not words[0].startswith("-"):
                words.pop(0)
        elif takes == "value" and value is None:
            if not words:
                raise InputError(f"{word} has no value", where=WHERE, fix="Give its value after it.")
            value = words.pop(0)
        if name == "model":
            model = value
        elif name in _REFUSED:
            if value not in ("1", "no"):
                raise InputError(f"{word} cannot be simulated", where=WHERE, fix=_REFUSED[name])
        elif name in _TAKEN:
            flags[name] = _value(word, _TAKEN[name], value)
        else:
            ignored.append(word.split("=", 1)[0])
    return ServeCommand(model, flags, tuple(ignored))


def _check_release(word: str, name: str, version: str | None) -> None:
    release = ".".join((version or "").split(".")[:2])
    only_in = _known().only_in
    if release in set(only_in.values()) and only_in.get(name, release) != release:
        raise InputError(
            f"vLLM {version} has no {word.split('=', 1)[0]}",
            where=WHERE,
            fix=f"Remove it, or use version {only_in[name]}.",
        )


def _flag(word: str) -> tuple[str, str, str | None]:
    """Name, what it takes, and the value that the word itself holds ("no" for --no-...)."""
    takes, short = _known().takes, _known().short
    head, equals, value = word.partition("=")
    name = head.lstrip("-").replace("-", "_").split(".", 1)[0]
    if not head.startswith("--"):
        name = short.get(head[1:], "optimization_level" if head.startswith("-O") else "")
        if head.startswith("-O") and head != "-O":
            return name, "switch", head[2:]
    name = _SAME_AS.get(name, name)
    if name in takes:
        return name, takes[name], value if equals else None
    if name.startswith("no_") and takes.get(name[3:]) == "switch":
        return name[3:], "switch", "no"
    known = [f"--{flag.replace('_', '-')}" for flag in takes]
    raise InputError(
        f"vllm serve has no flag {head}",
        where=WHERE,
        fix=did_you_mean(head.replace("_", "-"), known) or "Remove it.",
    )


def _value(word: str, convert: Callable[[str], Any], value: str | None) -> Any:
    if convert is bool:
        return value != "no"
    assert value is not None
    try:
        return convert(value)
    except ValueError:
        what = "a JSON object" if convert is _mapping else "a number"
        raise InputError(
            f"{word.split('=', 1)[0]} takes {what}, not {value!r}", where=WHERE, fix="Correct the value."
        ) from None
