"""The page of KV pools that vLLM logged, each beside the account of memory that was made without it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from accuracy_tables import table_lines

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.scenario import shipped_folder
from servecast.sim.scenario.servers import SERVERS

POOLS = Path(__file__).parents[1] / "tests" / "data" / "kv_logs" / "pools.csv"

INTRODUCTION = """# KV memory

How many tokens the KV cache holds decides how many requests run together. vLLM logs it ("GPU KV cache size:
N tokens, Maximum concurrency for M tokens per request: X"); `servecast simulate`, `plan` and their results
say it beforehand, with the account behind it (`provenance.memory` in JSON) and the range that the account
leaves open.

On each rank the pool gets `gpu_memory_utilization` times the memory that CUDA reports, less

- **weights**: the parameters, by their bytes. Exact.
- **the rotary table**: cosines and sines of every position of the model, loaded with the weights.
- **the activation peak** of vLLM's profile run, which computes `max_num_batched_tokens` tokens and samples
  `max_num_seqs` of them. It is PyTorch's, so it follows from the tensors that are alive together
  (`sim/hardware/profile_run.py`). On most models the sampler is the largest: 38 bytes a logit up to vLLM
  0.16, where it sorts; 14 and a buffer of one row of logits a multiprocessor from 0.17 on, where a Triton
  kernel filters; 6 on Model Runner V2, and 2 there from 0.32 on. With few sequences or a small vocabulary a
  layer is the largest: four hidden states and three MLP widths a token. Experts add both their workspaces,
  cuBLAS its own.
- **a cold compile cache** (`engine.compile_cache: cold`): the first start of a server compiles the model
  inside that run, and Inductor times a kernel on a table of random embeddings. Where that is larger than
  the rest, 1 GiB is missing from the pool until the server is started again. The default is warm; the range
  includes it.
- **what is outside of PyTorch**: constants from logs. One GPU: 0.13 GiB, 0.25 from 0.18 on where
  FlashAttention 3 or newer runs (H100, H200, B200, ...). Several ranks: 0.55 GiB, and 2.15 from 0.14 on
  with fused all-reduces, on the same GPUs. Logs of ranks exist for 0.11 and 0.19 only; where between them
  the step lies is assumed.
- **CUDA graphs**, as vLLM estimates them: from 0.21 on Model Runner V1; on V2 nothing before 0.32. 0.23
  runs dense unquantised Llama, Mistral and Qwen3 on V2, 0.32 everything. 200 KiB a layer and graph is
  assumed.

The pool is counted in blocks. Layers that keep the same form a group, each group has its own list of blocks
a sequence, and all take them from one pool, so a block has the bytes of the largest group; the groups are
vLLM's (`sim/engine/kv_groups.py`): full attention, sliding windows, chunks, states (Mamba, linear attention),
latents (MLA) and the keys of sparse attention. What vLLM logs is the number of sequences of `max_model_len`
that the pool holds, times that length: with windows it says little of short requests, and it falls with
`max_num_batched_tokens`, twice as much with async scheduling from 0.26 on, since a window keeps what is in
flight. Groups, blocks, tokens and concurrency of 26 models in three sizes of memory are those of vLLM's own
functions, in 0.23, 0.32 and 0.33 (`tests/sim/engine/test_kv_groups.py`).

A pool that is estimated too small for one sequence of `max_model_len`, but may be large enough by the
range, is a warning with the account; beyond the range it is refused, as vLLM refuses it. `--max-model-len
auto` (or -1) lowers the length to what the pool holds. A pool that a log states can be given:
`num_gpu_blocks_override`, or `kv_cache_memory_bytes` on each rank.

## Against pools that vLLM logged

Predictions use the flags alone, with a warm compile cache. The constants of what is outside of PyTorch come
from the memory parts of these same logs, all other terms from vLLM's and PyTorch's sources. A logged pool
may be off by 0.05 GiB where it was derived from rounded GiB (2 % of the 72B rows).
"""

REASONS = {
    "P6": "refused in a scenario, since step times of float32 are not modelled; the account is the same",
    "P16": "the same deployment as P15, which logged 2 % more",
    "X4": "beyond 8 %: by all signs the first start of that server",
    "X5": "not the first start of that server",
}


@dataclass(frozen=True, slots=True)
class Pool:
    """A logged pool and the account of it, with a warm and with a cold compile cache."""

    row: Mapping[str, str]
    warm: KVMemory
    cold: KVMemory

    @property
    def logged(self) -> int:
        """Tokens, as vLLM logged them."""
        return int(self.row["kv_tokens"])

    @property
    def error(self) -> float:
        """Relative, of the account with a warm compile cache."""
        return self.warm.logged_tokens / self.logged - 1

    @property
    def cold_error(self) -> float:
        """The same with a cold one."""
        return self.cold.logged_tokens / self.logged - 1


@cache
def pools() -> tuple[Pool, ...]:
    """Every logged pool."""
    with POOLS.open(encoding="utf-8") as file:
        return tuple(Pool(row, _memory(row, "warm"), _memory(row, "cold")) for row in csv.DictReader(file))


def _memory(row: Mapping[str, str], compile_cache: str) -> KVMemory:
    flags: dict[str, Any] = {
        "version": row["vllm"],
        "assume_rules": True,
        "gpu_memory_utilization": float(row["gpu_memory_utilization"]),
        "tensor_parallel_size": int(row["tensor_parallel_size"]),
        "max_model_len": int(row["max_model_len"]),
        "compile_cache": compile_cache,
    }
    flags |= [row["other"].split("=")] if row["other"] else []
    engine, server = EngineFlags(**flags), SERVERS["vllm"]
    model = ModelShape.from_config(shipped_folder() / "models" / f"{row['model']}.json")
    if engine.quantization == "fp8":
        model = replace(model, weight_bytes_each=1)
    if engine.dtype == "float32":
        model = replace(model, weight_bytes_each=4, dtype_bytes=4)
    gpu = find_gpu(row["gpu"])
    config = server.resolve(engine, gpu, model)
    shard = server.shard(engine, config, model, gpu)
    if engine.dtype == "float32":
        shard = replace(shard, kv_dtype_bytes=4)
    return server.memory(engine, config, shard)


def page() -> str:
    """The page."""
    found = pools()
    rows = []
    for pool in found:
        row, ranks = pool.row, pool.row["tensor_parallel_size"]
        cold = pool.cold.logged_tokens
        rows.append(
            [
                row["case"],
                row["model"],
                row["gpu"] + (f" x {ranks}" if ranks != "1" else ""),
                row["vllm"],
                " ".join(filter(None, [row["gpu_memory_utilization"], row["other"]])),
                f"{pool.logged:,}",
                f"{pool.warm.logged_tokens:,} ({pool.error:+.1%})",
                "the same" if cold == pool.warm.logged_tokens else f"{cold:,} ({pool.cold_error:+.1%})",
                REASONS.get(row["case"], ""),
            ]
        )
    header = ["", "model", "GPU", "vLLM", "utilization, flags", "logged", "warm", "cold", "note"]
    errors = [abs(pool.error) for pool in found]
    inside = sum(pool.warm.range[0] <= pool.logged <= pool.warm.range[1] for pool in found)
    return "\n".join(
        [
            INTRODUCTION,
            *table_lines([header, *rows]),
            "",
            f"Mean absolute error with a warm compile cache {fmean(errors):.1%}, largest {max(errors):.1%}; "
            f"{inside} of {len(found)} logged pools lie inside the range that is printed.",
            "",
            "Sources: llm-d-planner's accuracy sweep (April 2026), llm-d's config_explorer (late 2025; its "
            "release is not stated, 0.11 is assumed), lab notes of ThunderAgent (2026), a comment on vLLM's "
            "pull request 38479. The run of `scenarios/rtx4090-llama-3.1-8b.yaml` had 2,588 blocks; the "
            "account gives 2,830 warm and 2,574 cold.",
            "",
        ]
    )
