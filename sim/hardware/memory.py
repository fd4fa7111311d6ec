"""How many KV blocks vLLM gets, line by line.

vLLM runs the model once at ``max_num_batched_tokens`` and gives the KV cache what is left of
``gpu_memory_utilization`` times the memory that CUDA reports: less weights, less what else CUDA allocates,
less the activation peak of that run, less an estimate of the CUDA graphs. The last three are not derivable
from the configuration; the estimates below say where they come from. What a server's log states of the pool
("Available KV cache memory", "GPU KV cache size") can be given instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from servecast.sim.hardware.shard import Shard, release
from servecast.sim.inputs.errors import InputError

Origin = Literal["device", "computed", "given", "assumed"]

_MIB, _GIB = 1 << 20, 1 << 30
_BYTES_PER_LOGIT = 36  # sampler of the profiling run; see activation_peak_bytes
_NON_TORCH_BYTES = 60 * _MIB  # vLLM's logs on one GPU: 0.03 to 0.16 GiB
_GRAPH_BYTES_PER_LAYER = 200 * 1024  # logs: 0.2 to 0.3 MiB a layer and graph
CONTEXT_BYTES = _GIB // 2  # CUDA context and library handles, outside of vLLM's account


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One line of the account, bytes on one rank. What is taken from the pool is negative."""

    name: str
    bytes: int
    origin: Origin
    note: str


@dataclass(frozen=True, slots=True)
class KVMemory:
    """The KV pool of one rank and how it comes about.

    Attributes:
        num_gpu_blocks: blocks as vLLM counts them, the null block included.
        block_size: tokens a block. bytes_per_block: on one rank, all layers.
        lines: the account. Its first five lines add up to the bytes that are left for the pool.
        memory_used_bytes: what a monitor shows as used on the card once the server is up: what vLLM
            accounts for, plus an assumed 0.5 GiB of CUDA context outside of it.
    """

    num_gpu_blocks: int
    block_size: int
    bytes_per_block: int
    memory_used_bytes: int
    lines: tuple[MemoryLine, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit: every block but the null block."""
        return (self.num_gpu_blocks - 1) * self.block_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool on one rank."""
        return self.num_gpu_blocks * self.bytes_per_block


def activation_peak_bytes(shard: Shard, *, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Activation peak of vLLM's profiling run on one rank, an estimate: the larger of

    - the sampler: 36 bytes a logit of ``max_num_seqs`` rows over the vocabulary. Four logs give 36
      (Llama-3.1-8B, vLLM 0.19, RTX 4090: from its 2,588 blocks), 39 (Qwen2.5-7B), 40 (gemma-3-4b-it on a
      B200) and 41 (Llama-3-8B on an H100); the first is nearest to the versions modelled here
    - a layer: residual, hidden state and the MLP's gate, up and product of every batched token.
    """
    model = shard.model
    sampler = max_num_seqs * model.vocab_size * _BYTES_PER_LOGIT
    width = max(model.intermediate_size, model.experts_per_token * model.expert_intermediate_size)
    a_token = (4 * model.hidden_size + 3 * width // shard.tensor_parallel_size) * model.dtype_bytes
    return max(sampler, max_num_batched_tokens * a_token)


def kv_memory(
    shard: Shard,
    *,
    version: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    gpu_memory_utilization: float = 0.92,
    block_size: int = 16,
    kv_cache_memory_bytes: int | None = None,
    num_gpu_blocks_override: int | None = None,
) -> KVMemory:
    """The KV pool under vLLM's flags. The last two replace the pool's bytes, or its blocks.

    Sliding-window layers are given a full block like all others, so their pool is smaller than vLLM's.

    Raises:
        InputError: the weights do not fit, or no sequence of ``max_model_len`` does.
    """
    gpu = shard.gpu
    if not 0.0 < gpu_memory_utilization <= 1.0:
        raise InputError(
            f"{gpu_memory_utilization} is not a share",
            where="gpu_memory_utilization",
            fix="Use a number in (0, 1].",
        )
    weights = shard.weight_bytes
    if weights >= gpu.memory_bytes:
        raise InputError(
            f"{weights / _GIB:.1f} GiB of weights, but one {gpu.name} has {gpu.memory_bytes / _GIB:.1f} GiB",
            where="gpu",
            fix="Use a larger GPU, more tensor_parallel_size, or quantised weights.",
        )
    bytes_per_block = block_size * shard.kv_bytes_per_token
    requested = math.ceil(gpu.memory_bytes * gpu_memory_utilization)
    share = f"{gpu_memory_utilization:g} of {gpu.memory_bytes / _GIB:.2f} GiB ({gpu.memory_source})"
    lines = [
        MemoryLine("requested", requested, "computed", share),
        MemoryLine("weights", -weights, "computed", f"{shard.model.parameters / 1e9:.3f} B parameters"),
        MemoryLine("not from torch", -_NON_TORCH_BYTES, "assumed", "library workspaces"),
        MemoryLine(
            "activation peak",
            -activation_peak_bytes(
                shard, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
            ),
            "assumed",
            f"{_BYTES_PER_LOGIT} bytes a logit, or a layer if larger",
        ),
        _cudagraph_line(shard, max_num_seqs, version),
    ]
    available = sum(line.bytes for line in lines)
    used = requested
    if kv_cache_memory_bytes is not None:
        used += kv_cache_memory_bytes - available
        available = kv_cache_memory_bytes
        lines.append(MemoryLine("--kv-cache-memory-bytes", available, "given", "instead of what is left"))
    blocks = available // bytes_per_block
    if num_gpu_blocks_override is not None:
        used += num_gpu_blocks_override * bytes_per_block - available
        blocks = num_gpu_blocks_override
        lines.append(
            MemoryLine("--num-gpu-blocks-override", blocks * bytes_per_block, "given", f"{blocks} blocks")
        )
    if blocks < 1:
        account = ", ".join(f"{line.name} {line.bytes / _GIB:+.2f} GiB" for line in lines)
        raise InputError(
            f"no memory is left for KV blocks: {account}",
            where="gpu_memory_utilization",
            fix="Raise it, lower max_num_seqs or max_num_batched_tokens, or use a larger GPU.",
        )
    if (blocks - 1) * block_size < max_model_len:
        raise InputError(
            f"the KV pool holds {(blocks - 1) * block_size} tokens, a sequence up to {max_model_len}",
            where="max_model_len",
            fix="Lower max_model_len or give the KV cache more memory (gpu_memory_utilization).",
        )
    return KVMemory(
        num_gpu_blocks=blocks,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        memory_used_bytes=min(gpu.memory_bytes, used + CONTEXT_BYTES),
        lines=tuple(lines),
    )


def _cudagraph_line(shard: Shard, max_num_seqs: int, version: str) -> MemoryLine:
    """vLLM's own estimate of its CUDA graphs, which it takes from the pool from 0.21 on: 200 KiB a layer and
    graph, after logs of 0.2-0.3 MiB. Versions before that take nothing."""
    piecewise = len(shard.cudagraph_sizes)
    full = sum(size <= max_num_seqs for size in shard.cudagraph_sizes)  # those are for pure decode batches
    graphs = full + piecewise if release(version) >= (0, 21) else 0
    note = f"{full} full and {piecewise} piecewise graphs"
    return MemoryLine("CUDA graphs", -graphs * shard.model.layers * _GRAPH_BYTES_PER_LAYER, "assumed", note)
