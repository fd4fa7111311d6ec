"""vLLM's own sizes of KV pools, on the CPU: cases as JSON lines on stdin, an answer a line.

Runs under the Python that has vLLM. A case has ``layers`` (CacheLayer's fields), ``ranks`` and
``context_ranks``, ``kv_bytes``, ``recurrent_bytes``, ``max_model_len``, ``budget``, ``asynchronous``,
``block_size`` (an attention block where no layer has a state), ``mode``, ``drafts`` and ``hybrid``, and
``available``, a list of bytes. The specs are made with vLLM's classes from the layers; block sizes beside
states come from vLLM's Platform, groups and blocks from get_kv_cache_configs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "validate" / "parity"))

import torch
import vllm
import vllm.config.vllm as settings
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core import kv_cache_utils
from vllm_scheduler import MODEL, _vllm_config  # type: ignore[import-not-found]

try:
    from vllm.v1.core import kv_cache_planning as planning  # since 0.33
except ImportError:
    planning = kv_cache_utils

BYTES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}
CACHE_DTYPE = {1: "fp8", 2: "auto"}


def config_of(case: dict[str, Any], model: str) -> Any:
    """A VllmConfig with the case's flags."""
    options = {
        "version": vllm.__version__,
        "max_num_seqs": 256,
        "max_num_batched_tokens": case["budget"],
        "max_model_len": case["max_model_len"],
        "enable_chunked_prefill": True,
        "enable_prefix_caching": case["mode"] != "none",
        "scheduling_policy": "fcfs",
        "async_scheduling": case["asynchronous"],
        "block_size": case["block_size"],
        "num_gpu_blocks": 2,
        "kv_groups": [],
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "scheduler_reserve_full_isl": True,
        "watermark": 0.0,
        "max_num_active_seqs": None,
        "prefill_schedule_interval": 1,
    }
    config = _vllm_config(options, model)
    config.parallel_config.decode_context_parallel_size = case["context_ranks"]
    config.cache_config.mamba_cache_mode = case["mode"]
    config.cache_config.num_gpu_blocks_override = None
    config.scheduler_config.disable_hybrid_kv_cache_manager = not case["hybrid"]
    if hasattr(config.cache_config, "kv_cache_layout"):
        config.cache_config.kv_cache_layout = "LBNHC"
    return config


def heads_of(layer: dict[str, Any], ranks: int) -> int:
    return max(1, layer["kv_heads"] // ranks)


def attention_spec(layer: dict[str, Any], case: dict[str, Any], block_size: int) -> Any:
    """The spec of an attention layer, as its model makes it."""
    each = layer["fixed_bytes"] or case["kv_bytes"]
    common = {"block_size": block_size, "head_size": layer["head_size"], "dtype": BYTES[each]}
    mode = inspect.signature(interface.AttentionSpec).parameters
    if each == 1 and "kv_quant_mode" in mode:
        common["kv_quant_mode"] = interface.get_kv_quant_mode("fp8")
    kind = layer["kind"]
    if kind == "indexer":
        width = layer["head_size"] + layer["head_size"] // 128 * 4  # a byte a number, a scale for 128
        return interface.MLAAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=width, dtype=torch.uint8
        )
    if kind == "sparse_mla" and each == 1:
        packed = "state_content_bytes" in mode
        options = {"state_content_bytes": 656} if packed else {}
        if not packed:
            common.pop("kv_quant_mode", None)
        return interface.MLAAttentionSpec(
            **common | {"dtype": torch.uint8}, num_kv_heads=1, cache_dtype_str="fp8_ds_mla", **options
        )
    if kind in ("mla", "sparse_mla"):
        return interface.MLAAttentionSpec(**common, num_kv_heads=1)
    common["num_kv_heads"] = heads_of(layer, case["ranks"])
    if layer["value_size"] is not None:
        common["head_size_v"] = layer["value_size"]
    if kind == "full":
        return interface.FullAttentionSpec(**common)
    if kind == "sliding":
        return interface.SlidingWindowSpec(**common, sliding_window=layer["window"])
    return interface.ChunkedLocalAttentionSpec(**common, attention_chunk_size=layer["window"])


def state_shapes(layer: dict[str, Any], ranks: int, drafts: int) -> tuple[tuple[int, ...], ...]:
    """By vLLM's calculators, from the sizes of the model that ``state`` names."""
    sizes = layer["sizes"] | ({"num_spec": drafts} if drafts else {})
    calculators = {
        "gdn": Shapes.gated_delta_net_state_shape,
        "kda": Shapes.kda_state_shape,
        "mamba2": Shapes.mamba2_state_shape,
        "linear": Shapes.linear_attention_state_shape,
        "short_conv": Shapes.short_conv_state_shape,
    }
    calculate = calculators[layer["state"]]
    name = "tp_size" if layer["state"] == "linear" else "tp_world_size"
    return calculate(**{name: ranks}, **sizes)


def state_dtypes(layer: dict[str, Any], case: dict[str, Any], count: int) -> tuple[torch.dtype, ...]:
    recurrent = case["recurrent_bytes"] or layer["recurrent_bytes"] or 2
    both = (torch.bfloat16, BYTES[recurrent])
    return both[:count] if layer["state"] != "linear" else both[1:]


def specs_of(case: dict[str, Any], config: Any) -> dict[str, Any]:
    """A spec for every layer, in the order of the model's."""
    states = [layer for layer in case["layers"] if layer["kind"] == "mamba"]
    attention = [layer for layer in case["layers"] if layer["kind"] != "mamba"]
    block_size, padded = case["block_size"], None
    if states and attention:
        block_size, padded = aligned(case, config, states, attention[0])
    specs: dict[str, Any] = {}
    for layer in case["layers"]:
        for _ in range(layer["count"]):
            specs[f"layer.{len(specs)}"] = (
                state_spec(layer, case, config, padded)
                if layer["kind"] == "mamba"
                else attention_spec(layer, case, block_size)
            )
    return specs


def aligned(
    case: dict[str, Any], config: Any, states: list[dict[str, Any]], attention: dict[str, Any]
) -> tuple[int, int]:
    """Block size and page beside states, as the platform decides them."""
    shapes = [state_shapes(layer, case["ranks"], case["drafts"]) for layer in states]
    dtypes = [state_dtypes(layer, case, len(shape)) for layer, shape in zip(states, shapes, strict=True)]
    model_class = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda _: shapes[0],
        get_mamba_state_dtype_from_config=lambda _: dtypes[0],
    )
    sizes = SimpleNamespace(
        dtype=torch.bfloat16,
        use_mla=attention["kind"] == "mla",
        architecture="",
        get_num_kv_heads=lambda _: heads_of(attention, case["ranks"]),
        get_head_size=lambda: attention["head_size"],
        get_mamba_chunk_size=lambda: 256,
    )
    backend = SimpleNamespace(
        get_supported_kernel_block_sizes=lambda: [MultipleOf(16)],  # FlashAttention's
        customize_spec=lambda spec: spec,
    )
    config.cache_config.cache_dtype = CACHE_DTYPE[case["kv_bytes"]]
    config.cache_config.user_specified_mamba_block_size = False
    stand_in = SimpleNamespace(
        cache_config=config.cache_config,
        model_config=sizes,
        parallel_config=config.parallel_config,
        compilation_config=config.compilation_config,
    )
    resolve = ModelRegistry.resolve_model_cls
    ModelRegistry.resolve_model_cls = lambda *_, **__: (model_class, "")
    find = getattr(Platform, "_find_non_ssm_backends", None)
    if find is not None:
        Platform._find_non_ssm_backends = classmethod(lambda *_: [backend])
    use = settings.set_current_vllm_config
    settings.set_current_vllm_config = lambda _: _nothing()
    try:
        Platform._align_hybrid_block_size(stand_in, backend)
    finally:
        ModelRegistry.resolve_model_cls = resolve
        settings.set_current_vllm_config = use
        if find is not None:
            Platform._find_non_ssm_backends = find
    cache = config.cache_config
    return cache.block_size, cache.mamba_page_size_padded


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def state_spec(layer: dict[str, Any], case: dict[str, Any], config: Any, padded: int | None) -> Any:
    shapes = state_shapes(layer, case["ranks"], case["drafts"])
    block_size = config.cache_config.block_size if case["mode"] != "none" else case["max_model_len"]
    options: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(interface.MambaSpec)}
    if layer["state"] in ("mamba2", "kda") and case["mode"] == "align" and case["saves_inside"]:
        assert "num_prefill_checkpoint_blocks" in known
        options = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": 1}
    return interface.MambaSpec(
        block_size=block_size,
        shapes=shapes,
        dtypes=state_dtypes(layer, case, len(shapes)),
        page_size_padded=padded,
        mamba_cache_mode=case["mode"],
        num_speculative_blocks=case["drafts"],
        **options,
    )


def answer(case: dict[str, Any], model: str) -> list[Any]:
    """For each memory size the groups, the blocks, the logged tokens and the concurrency; or the refusal."""
    found: list[Any] = []
    for available in case["available"]:
        config = config_of(case, model)
        specs = specs_of(case, config)
        try:
            more = () if planning is kv_cache_utils else (planning.get_kv_cache_groups(config, specs),)
            pool = planning.get_kv_cache_configs(config, [specs], [available], *more)[0]
        except (ValueError, NotImplementedError) as error:
            found.append({"refused": str(error)[:200]})
            continue
        concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, pool)
        groups = [[len(group.layer_names), group.kv_cache_spec.block_size] for group in pool.kv_cache_groups]
        found.append(
            {
                "groups": groups,
                "blocks": pool.num_blocks,
                "tokens": int(concurrency * case["max_model_len"]),
                "concurrency": concurrency,
            }
        )
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as model:
        Path(model, "config.json").write_text(json.dumps(MODEL))
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), model)), flush=True)


if __name__ == "__main__":
    main()
