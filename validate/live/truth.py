"""What a server is, read from itself before anything is predicted of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.validate.live.target import Target, answers, list_models, without
from servecast.validate.live.telemetry import cache_config, get

_SAID = {  # part of vLLM's configuration -> its fields that are fields of EngineFlags
    "scheduler_config": (
        "policy",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_chunked_prefill",
        "async_scheduling",
        "scheduler_reserve_full_isl",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "watermark",
        "max_num_active_seqs",
        "stream_interval",
    ),
    "cache_config": ("enable_prefix_caching", "cache_dtype"),
    "parallel_config": ("tensor_parallel_size",),
    "model_config": ("enforce_eager", "dtype"),
}
_RENAMED = {"policy": "scheduling_policy", "cache_dtype": "kv_cache_dtype"}  # -> the field of EngineFlags


@dataclass(frozen=True, slots=True)
class Truth:
    """What a server says of itself; None, and a flag that is absent, is not said.

    flags: fields of EngineFlags. gpu: name by the driver, where it runs on this machine ("cpu" without
    one). served_model: the engine's own name of the model, which a proxy may call otherwise.
    not_modelled: flags that a scenario has not, where they are not what vLLM does without them. drafts: its
    method and number of draft tokens, empty if it does not speculate, None where it does not say it.
    """

    version: str | None
    num_gpu_blocks: int | None
    flags: Mapping[str, Any]
    gpu: str | None
    served_model: str | None
    not_modelled: Mapping[str, Any] = field(default_factory=dict)
    drafts: Mapping[str, Any] | None = None

    def overrides(self) -> dict[str, Any]:
        """The fields of a scenario that the server's own word replaces."""
        found = {f"engine.{name}": value for name, value in self.flags.items()}
        if self.version is not None:
            found["engine.version"] = ".".join(self.version.split(".")[:2])
        if self.num_gpu_blocks is not None:
            found["engine.num_gpu_blocks_override"] = self.num_gpu_blocks
        return found


def read_truth(target: Target, facts: Mapping[str, Any]) -> Truth:
    """Ask a server what it is.

    Args:
        facts: of this machine (see calibrate.measure.facts.collect).

    Raises:
        InputError: the server does not answer, or does not serve that model.
    """
    try:
        served = list_models(target.base_url, target.key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"does not answer as a server of models ({without(target.key, str(error))})",
            where=f"{target.base_url}/v1/models",
            fix="Is the server up, is the URL its own, and is the key right?",
        ) from None
    if target.model not in served:
        raise InputError(
            f"serves {', '.join(map(str, served)) or 'no model'}, not {target.model!r}",
            where=target.base_url,
            fix="Give one of them with --model.",
        )
    if target.engine_url is not None:
        if not answers(target):
            raise InputError("does not answer", where=target.engine_url, fix="Is it up, and the URL its own?")
        served = _ask(lambda: list_models(target.engine, None), {})
    one = target.model if target.model in served else next(iter(served), None)
    labels = _ask(lambda: cache_config(get(f"{target.engine}/metrics")), {})
    about = f"{target.engine}/server_info?config_format=json"  # it also lists packages and asks the driver
    info = _ask(lambda: json.loads(get(about, timeout_s=60))["vllm_config"], {})
    version = _ask(lambda: str(json.loads(get(f"{target.engine}/version"))["version"]).split("+")[0], None)
    flags = _flags(info)
    if one is not None and served[one].get("max_model_len"):
        flags["max_model_len"] = int(served[one]["max_model_len"])
    if labels.get("block_size", "").isdecimal():
        flags["block_size"] = int(labels["block_size"])
    if labels.get("enable_prefix_caching") in ("True", "False"):
        flags["enable_prefix_caching"] = labels["enable_prefix_caching"] == "True"
    blocks = labels.get("num_gpu_blocks", "")
    known = target.own or (target.here and facts["gpu"] != "cpu")  # a port may be forwarded
    return Truth(
        version=version,
        num_gpu_blocks=int(blocks) if blocks.isdecimal() else None,
        flags=flags,
        gpu=str(facts["gpu"]) if known else None,
        served_model=one,
        not_modelled=_not_modelled(info),
        drafts=_drafts(info) if info else None,
    )


def _flags(info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of EngineFlags in vLLM's configuration."""
    flags = {
        _RENAMED.get(name, name): value
        for part, names in _SAID.items()
        for name in names
        if (value := info.get(part, {}).get(name)) is not None
    }
    if "dtype" in flags:
        flags["dtype"] = str(flags["dtype"]).removeprefix("torch.")
    model = info.get("model_config", {})
    if "quantization" in model:
        flags["quantization"] = model["quantization"]  # None says that the weights are as they are
    return flags


def _not_modelled(info: Mapping[str, Any]) -> dict[str, Any]:
    """Truth.not_modelled in vLLM's configuration."""
    sizes = ("pipeline_parallel_size", "data_parallel_size")
    parallel = info.get("parallel_config", {})
    return {name: size for name in sizes if (size := parallel.get(name, 1)) != 1}


def _drafts(info: Mapping[str, Any]) -> dict[str, Any]:
    """Truth.drafts in vLLM's configuration."""
    said = info.get("speculative_config") or {}
    return {name: said[name] for name in ("method", "num_speculative_tokens") if name in said}


def _ask(question: Any, otherwise: Any) -> Any:
    """What the server says, or ``otherwise``: not every release and proxy answers each question."""
    try:
        return question()
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise
