"""Parses a pasted ``vllm serve ...`` command, of the release that a scenario names.

Flags that the model of the engine has are taken. Of those that change time or memory in ways that it does not
model, the ones that ask for another way of serving are refused, and the ones that ask for other kernels,
graphs or processes widen the error bands, each by ``FLAG_BAND``. All others are listed as without effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.pasted_command import WHERE, find_serve
from servecast.sim.scenario.release_flags import Flag, read_flag

FLAG_BAND = 0.1  # assumed: what another kernel, graph mode or process layout changes


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """A parsed command.

    Attributes:
        model: the model's name; None without one.
        flags: those taken, as fields of EngineFlags.
        ignored: flags without effect here.
        widening: flags and variables that change time or memory in ways that only widen the error band.
        release: of vLLM, where a container image says it.
    """

    model: str | None
    flags: dict[str, Any]
    ignored: tuple[str, ...]
    widening: tuple[str, ...] = ()
    release: str | None = None


def _adapter(text: str) -> str:
    """The name in name=path, or in a JSON object."""
    return str(_mapping(text)["name"]) if text.startswith("{") else text.partition("=")[0]


def _human_int(text: str) -> int:
    """vLLM's human-readable integers: 1k is 1,000, 1K is 1,024, 25.6k is 25,600."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text)
    if match is None:
        return int(text)
    number, suffix = match.groups()
    power = "kmgt".index(suffix.lower()) + 1
    return int(float(number) * 1000**power) if suffix.islower() else int(number) * 1024**power


def _mapping(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


TAKEN: dict[str, Callable[[str], Any]] = {
    "dtype": str,
    "quantization": str,
    "kv_cache_dtype": str,
    "tensor_parallel_size": int,
    "decode_context_parallel_size": int,
    "dcp_kv_cache_interleave_size": int,
    "cp_kv_cache_interleave_size": int,
    "dcp_comm_backend": str,
    "pipeline_parallel_size": int,
    "enable_lora": bool,
    "max_loras": int,
    "max_cpu_loras": int,
    "max_lora_rank": int,
    "lora_modules": str,
    "data_parallel_size": int,
    "data_parallel_size_local": int,
    "data_parallel_rank": int,
    "data_parallel_start_rank": int,
    "data_parallel_external_lb": bool,
    "data_parallel_multi_port_external_lb": bool,
    "data_parallel_hybrid_lb": bool,
    "data_parallel_backend": str,
    "api_server_count": int,
    "dp_sync_interval": int,
    "enable_expert_parallel": bool,
    "moe_backend": str,
    "all2all_backend": str,
    "enable_eplb": bool,
    "eplb_config": _mapping,
    "hf_overrides": _mapping,
    "limit_mm_per_prompt": _mapping,
    "language_model_only": bool,
    "mm_processor_kwargs": _mapping,
    "mm_processor_cache_gb": float,
    "disable_chunked_mm_input": bool,
    "mm_encoder_tp_mode": str,
    "skip_mm_profiling": bool,
    "max_model_len": lambda text: "auto" if text.lower() in ("auto", "-1") else _human_int(text),
    "max_num_seqs": int,
    "max_num_batched_tokens": _human_int,
    "block_size": int,
    "disable_hybrid_kv_cache_manager": bool,
    "mamba_cache_mode": str,
    "mamba_block_size": int,
    "mamba_cache_dtype": str,
    "mamba_ssm_cache_dtype": str,
    "prefix_cache_retention_interval": int,
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
    "speculative_config": _mapping,
    "enforce_eager": bool,
    "max_cudagraph_capture_size": int,
    "stream_interval": int,
    "kv_offloading_size": float,
    "kv_offloading_backend": str,
    "kv_transfer_config": _mapping,
}
_DRAFTS = {  # flag -> its field of speculative_config (EngineArgs.create_speculative_config)
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
_REFUSED = {  # flag -> what to do instead
    "prefill_context_parallel_size": "Context parallelism of prompts is not modelled.",
    "max_num_scheduled_tokens": "Give max_num_batched_tokens.",
    "max_num_partial_prefills": "Give long_prefill_token_threshold.",
    "cpu_offload_gb": "Offloading of weights is not modelled.",
    "offload_group_size": "Offloading of weights is not modelled.",
    "ec_transfer_config": "Disaggregated encoders are not modelled: paste it without.",
    "enable_dbo": "Dual batch overlap is not modelled.",
    "quantization_config": "Give a model config whose quantization_config has it.",
    "scheduler_cls": "Another scheduler is not modelled.",
    "diffusion_config": "Diffusion models are not modelled.",
    "mm_encoder_only": "Disaggregated encoders are not modelled.",
    "headless": "Paste the command of the first node.",
    "config": "Paste the flags of the file.",
}
_WIDENING = frozenset(
    (  # other kernels, graphs and processes than those of the defaults
        "additional_config",
        "attention_backend",
        "attention_config",
        "compilation_config",
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "dcp_q_replicate",
        "disable_custom_all_reduce",
        "disable_frontend_multiprocessing",
        "distributed_executor_backend",
        "enable_batch_sharded_sampling",
        "enable_bf16x3_router_gemm",
        "enable_flashinfer_autotune",
        "enable_multimodal_encoder_data_parallel",
        "enable_prompt_embeds",
        "enable_return_routed_experts",
        "expert_placement_strategy",
        "ir_op_priority",
        "kernel_config",
        "kv_cache_dtype_skip_layers",
        "kv_sharing_fast_prefill",
        "linear_backend",
        "logits_processors",
        "max_seq_len_to_capture",
        "model_class_overrides",
        "model_impl",
        "monokernel",
        "nnodes",
        "num_redundant_experts",
        "optimization_level",
        "override_attention_dtype",
        "prefix_match_unit",
        "renderer_num_workers",
        "use_fp64_gumbel",
        "watermark_config",
        "worker_cls",
    )
)
_MOE_BACKENDS = ("auto", "triton", "deep_gemm", "flashinfer_cutlass", "marlin")  # others widen the band
_NOTHING = ("no", "0", "0.0", "", "none", "None", "null", "auto", "False", "false", "{}")
_DEFAULTS = {  # further values that ask for nothing
    "optimization_level": "2",
    "distributed_executor_backend": "mp",
    **dict.fromkeys(("nnodes", "renderer_num_workers", "max_num_partial_prefills"), "1"),
    **dict.fromkeys((flag for flag in _REFUSED if "parallel_size" in flag), "1"),
}
_POOLING = {"task": ("auto", "generate"), "runner": ("auto", "generate"), "convert": ("auto", "none")}
PARTITION = "VLLM_PP_LAYER_PARTITION"
_DEFAULT_VARIABLES = {  # what vllm/envs.py has without them, 0.20 to 0.33
    "VLLM_USE_DEEP_GEMM": "1",
    "VLLM_SKIP_P2P_CHECK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ROCM_USE_AITER": "0",
}
_HARMLESS_VARIABLES = re.compile(
    r"VLLM_(LOG\w*|CONFIGURE_LOGGING|API_KEY|\w*CACHE_ROOT|\w*CACHE_DIR|\w*PORT|HOST_IP|NO_USAGE_STATS|PLUGINS|"
    r"DO_NOT_TRACK|USAGE\w*|WORKER_MULTIPROC_METHOD|ALLOW_\w+|\w*TIMEOUT\w*|USE_MODELSCOPE|SERVER_DEV_MODE)"
)


def parse_serve_command(
    command: str | list[Any] | dict[str, Any], *, version: str | None = None
) -> ServeCommand:
    """Parse ``vllm serve MODEL --flag value --flag=value --no-flag --flag.key value`` as vLLM's parser does.
    See ``find_serve`` for what may stand around it.

    With the ``version`` of a release whose flags are known, flags that it does not have are refused.

    Raises:
        InputError: no such command, an unknown flag, one that is not modelled, or a value that does not fit.
    """
    pasted = find_serve(command)
    words = list(pasted.words)
    model: str | None = None
    flags: dict[str, Any] = {}
    ignored: list[str] = []
    widening = [f"{name}={value}" for name, value in pasted.variables.items() if _widens(name, value)]
    for word, flag, value, taken in _read(words, version):
        if flag is None:
            if model is not None:
                raise InputError(
                    f"{word!r} follows no flag, and the model is {model!r}",
                    where=WHERE,
                    fix="Check the line.",
                )
            model = word
            continue
        name, shown = flag.name, word.split("=", 1)[0]
        if name == "model":
            model = value
        elif name in _REFUSED:
            if flag.key or not _asks_nothing(name, value):
                raise InputError(f"{word} cannot be simulated", where=WHERE, fix=_REFUSED[name])
        elif name in _POOLING and value not in _POOLING[name]:
            raise InputError(
                f"{shown} {value} cannot be simulated", where=WHERE, fix="Only generation is modelled."
            )
        elif name == "moe_backend" and value not in _MOE_BACKENDS:
            widening.append(shown)
        elif name == "lora_modules":
            flags[name] = [_adapter(each) for each in (taken or [value or ""])]
        elif name in TAKEN and flag.key:
            if not isinstance(flags.setdefault(name, {}), dict) or TAKEN[name] is not _mapping:
                raise InputError(f"{shown} takes no keys", where=WHERE, fix="Give its value as a whole.")
            _put(flags[name], flag.key, value or "")
        elif name in TAKEN and not (TAKEN[name] is _mapping and _asks_nothing(name, value)):
            flags[name] = _value(word, TAKEN[name], value)
        elif name in _DRAFTS:
            drafts = flags.setdefault("speculative_config", {})
            if _DRAFTS[name] in drafts:
                fix = "Give one of the two: vLLM refuses both."
                what = f"{shown} and --speculative-config say {_DRAFTS[name]}"
                raise InputError(what, where=WHERE, fix=fix)
            drafts[_DRAFTS[name]] = _value(word, int if name == "spec_tokens" else str, value)
        elif name in _WIDENING and (flag.key or not _asks_nothing(name, value)):
            widening.append(shown)
        else:
            ignored.append(shown)
    _take_variables(pasted.variables, flags)
    return ServeCommand(model, flags, tuple(ignored), tuple(widening), pasted.release)


def _take_variables(variables: Mapping[str, str], flags: dict[str, Any]) -> None:
    """LMCACHE_..., as if they stood in the extra config of the connector, which wins, and the layers of
    stages."""
    if (layers := variables.get(PARTITION)) is not None:
        try:
            flags["pp_layer_partition"] = [int(each) for each in layers.split(",")]
        except ValueError:
            fix = f"Give the layers of each stage, as {PARTITION}=10,14."
            raise InputError(f"{PARTITION} is {layers!r}", where=WHERE, fix=fix) from None
    settings = {
        f"lmcache.{name.removeprefix('LMCACHE_').lower()}": value
        for name, value in variables.items()
        if name.startswith("LMCACHE_")
    }
    if settings:
        config = flags.setdefault("kv_transfer_config", {})
        config["kv_connector_extra_config"] = settings | dict(config.get("kv_connector_extra_config") or {})


def _read(words: list[str], version: str | None) -> Iterator[tuple[str, Flag | None, str | None, list[str]]]:
    """A command word by word: a flag with its value and the words that it takes, or None for one that is no
    flag. Empties the list."""
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            yield word, None, None, []
            continue
        flag, taken = read_flag(word, version), list[str]()
        value = flag.value
        if flag.takes == "values":
            while words and not words[0].startswith("-"):
                taken.append(words.pop(0))
        elif flag.takes == "optional":
            if value is None and words and not words[0].startswith("-"):
                taken.append(words.pop(0))
        elif flag.takes == "value" and value is None:
            if not words:
                raise InputError(f"{word} has no value", where=WHERE, fix="Give its value after it.")
            taken.append(value := words.pop(0))
        yield word, flag, value, taken


def other_flags(command: str, *, version: str | None = None) -> dict[str, list[str]]:
    """The flags of a command that are not taken, by their names: their words, with the values in them."""
    found: dict[str, list[str]] = {}
    for word, flag, _, taken in _read(list(find_serve(command).words), version):
        if flag is not None and flag.name not in (*TAKEN, *_DRAFTS, "model"):
            found.setdefault(flag.name, []).extend([*word.split("=", 1), *taken])
    return found


def _asks_nothing(name: str, value: str | None) -> bool:
    return value in _NOTHING or (value is not None and value == _DEFAULTS.get(name))


def _widens(variable: str, value: str) -> bool:
    if variable == "VLLM_USE_V1" and value == "0":
        raise InputError(
            "VLLM_USE_V1=0 cannot be simulated", where=WHERE, fix="Only the V1 engine is modelled."
        )
    if variable == "VLLM_USE_SIMPLE_KV_OFFLOAD" and value not in ("0", ""):
        raise InputError(
            "VLLM_USE_SIMPLE_KV_OFFLOAD cannot be simulated",
            where=WHERE,
            fix="The native OffloadingConnector is modelled: paste it without.",
        )
    widens = variable.startswith("VLLM_") and variable not in ("VLLM_USE_V1", PARTITION)
    widens = widens and value != _DEFAULT_VARIABLES.get(variable)
    return widens and _HARMLESS_VARIABLES.fullmatch(variable) is None


def _put(into: dict[str, Any], path: str, text: str) -> None:
    """``--flag.a.b value``: JSON where it can be read as such, else text."""
    *outer, last = path.split(".")
    for key in outer:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key} is {inner!r} and has keys", where=WHERE, fix="Give one of them.")
        into = inner
    try:
        into[last] = json.loads(text)
    except ValueError:
        into[last] = text


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
