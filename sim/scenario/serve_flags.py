"""A deployment's flags as words of a ``vllm serve`` command."""

from __future__ import annotations

import json

from servecast.sim.inputs.schema import Model
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.vllm_flags import PARTITION, TAKEN

_RESOLVED = (  # are told in any case, as resolved
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "block_size",
)
_SWITCHES = ("enable_prefix_caching", "enable_chunked_prefill", "async_scheduling")


def set_flags(flags: EngineFlags, without: tuple[str, ...] = ()) -> list[str]:
    """The words of the flags that are set to something other than vLLM's default."""
    words = list[str]()
    for name in TAKEN:
        value = getattr(flags, name)
        if name in without or value == EngineFlags.model_fields[name].default:
            continue
        if isinstance(value, bool):
            words.append(_switch(name, value))
        elif name == "lora_modules":
            words += [_flag(name), *(f"{adapter}=PATH" for adapter in value)]
        else:
            given = value.model_dump(exclude_unset=True) if isinstance(value, Model) else value
            words += [_flag(name), json.dumps(given) if isinstance(given, dict) else str(given)]
    return words


def partition(flags: EngineFlags) -> str:
    """The value of the variable that says the layers of each pipeline stage; empty where it is not set."""
    return ",".join(map(str, flags.pp_layer_partition or ()))


def resolved_flags(deployment: Deployment) -> list[str]:
    """Those that matter most as they were resolved, and all others that are set."""
    flags, config = deployment.scenario.engine, deployment.config
    told = flags.model_dump() | {name: getattr(config, name, None) for name in (*_RESOLVED, *_SWITCHES)}
    told |= {"tensor_parallel_size": flags.tensor_parallel_size, "kv_cache_dtype": kv_cache_dtype(deployment)}
    told["block_size"] //= flags.decode_context_parallel_size  # of one rank
    layers = partition(flags)
    return [
        *([f"{PARTITION}={layers}"] if layers else []),
        *(word for name in _RESOLVED for word in (_flag(name), str(told[name]))),
        *set_flags(flags, (*_RESOLVED, *_SWITCHES)),
        *(_switch(name, told[name]) for name in _SWITCHES),
    ]


def kv_cache_dtype(deployment: Deployment) -> str:
    """What the flag says, or the checkpoint where that is auto."""
    asked = deployment.scenario.engine.kv_cache_dtype
    return "fp8" if asked == "auto" and deployment.shard.kv_dtype_bytes == 1 else asked


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _switch(name: str, on: bool) -> str:
    return _flag(name if on else f"no_{name}")
