"""How many KV blocks vLLM gets, line by line.

vLLM runs the model once at ``max_num_batched_tokens`` and gives the KV cache what is left of
``gpu_memory_utilization`` times the memory that CUDA reports: less weights, less what else CUDA allocates,
less the activation peak of that run, less an estimate of the CUDA graphs. ``profile_run`` says how the last
three are estimated, and how far they may be off. What a server's log states of the pool ("Available KV cache
memory", "GPU KV cache size") can be given instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from servecast.sim.engine.cache_layers import CacheLayer
from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.kv_groups import (
    CacheOptions,
    CacheSpec,
    KVGroup,
    block_bytes,
    blocks_per_sequence,
    groups_of,
    in_flight_tokens,
    longest_sequence,
    specs,
    tells,
)
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.encoder import EncoderRun
from servecast.sim.hardware.profile_run import (
    CompileCache,
    Estimate,
    activation_peak,
    adapter_slots,
    cuda_graphs,
    exchange_buffers,
    outside_torch,
    rotary_table,
)
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

Origin = Literal["device", "computed", "given", "assumed"]

_GIB = 1 << 30
CONTEXT_BYTES = _GIB // 2  # CUDA context and library handles, outside of vLLM's account


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One line of the account, bytes on one rank. What is taken from the pool is negative; ``more`` and
    ``less`` say how many bytes more or fewer it may take."""

    name: str
    bytes: int
    origin: Origin
    note: str
    more: int = 0
    less: int = 0


@dataclass(frozen=True, slots=True)
class KVMemory:
    """The KV pool of one rank and how it comes about.

    Attributes:
        num_gpu_blocks: blocks as vLLM counts them, the null block included.
        block_size: tokens a block, on all ranks that share them out. bytes_per_block: on one rank, all
            layers.
        max_model_len: the longest sequence, which vLLM may have fitted to the pool.
        groups: the KV cache groups. sequence_blocks: what one sequence of ``max_model_len`` takes.
        lines: the account. Unless the pool is given, they add up to the bytes that are left for it.
        memory_used_bytes: what a monitor shows as used on the card once the server is up: what vLLM
            accounts for, plus an assumed 0.5 GiB of CUDA context outside of it.
        warning: what the estimate leaves open; None if nothing that matters.
    """

    num_gpu_blocks: int
    block_size: int
    bytes_per_block: int
    max_model_len: int
    memory_used_bytes: int
    lines: tuple[MemoryLine, ...]
    sequence_blocks: int
    groups: tuple[KVGroup, ...] = ()
    warning: str | None = None

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit in sequences of ``max_model_len``: every block but the null block."""
        return int((self.num_gpu_blocks - 1) * self.tokens_per_block)

    @property
    def kv_groups(self) -> tuple[CacheSpec, ...]:
        """What each group keeps; none where that is every token of all layers alike."""
        return tuple(group.spec for group in self.groups) if tells(self.groups) else ()

    @property
    def tokens_per_block(self) -> float:
        """Tokens that a block more holds, in sequences of ``max_model_len``."""
        return self.max_model_len / self.sequence_blocks if tells(self.groups) else self.block_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool on one rank."""
        return self.num_gpu_blocks * self.bytes_per_block

    @property
    def max_concurrency(self) -> float:
        """How many sequences of ``max_model_len`` tokens fit, as vLLM logs it."""
        return self.num_gpu_blocks / self.sequence_blocks

    @property
    def logged_tokens(self) -> int:
        """What vLLM logs as "GPU KV cache size": its concurrency in tokens, the null block counted."""
        return int(self.max_concurrency * self.max_model_len)

    @property
    def range(self) -> tuple[int, int]:
        """Fewest and most tokens that the account allows, each uncertain line at its end."""
        if any(line.origin == "given" for line in self.lines):
            return self.logged_tokens, self.logged_tokens
        tokens = self.tokens_per_block / self.bytes_per_block
        more, less = (sum(getattr(line, way) for line in self.lines) for way in ("more", "less"))
        return (
            max(0, self.logged_tokens - int(more * tokens)),
            self.logged_tokens + int(less * tokens),
        )

    def facts(self) -> dict[str, Any]:
        """What vLLM logs of the pool, and the range that the account leaves open."""
        low, high = self.range
        several = {"groups": [group.title for group in self.groups]} if tells(self.groups) else {}
        return several | {
            "tokens": self.logged_tokens,
            "max_concurrency": self.max_concurrency,
            "max_model_len": self.max_model_len,
            "lowest_tokens": low,
            "highest_tokens": high,
        }


def kv_memory(
    shard: Shard,
    config: EngineConfig,
    *,
    version: str,
    cache: CacheOptions | None = None,
    fit_max_model_len: bool = False,
    compile_cache: CompileCache = "warm",
    kv_cache_memory_bytes: int | None = None,
    num_gpu_blocks_override: int | None = None,
    drafter: Drafter | None = None,
    encoder: EncoderRun | None = None,
) -> KVMemory:
    """The KV pool under vLLM's flags. The last two replace the pool's bytes, or its blocks.

    A pool that is estimated too small for one sequence, and may yet hold it, is taken to hold it, with a
    warning.

    Args:
        version: of vLLM. config: its flags, the number of blocks not known yet.
        cache: what decides about KV cache groups; None: vLLM's defaults. drafter: whose weights and KV share
            the memory; its activations are taken to fit where the target's were. encoder: a vision tower.
        fit_max_model_len: lower ``max_model_len`` to what the pool holds, as ``--max-model-len auto`` asks.

    Raises:
        InputError: the weights do not fit, or no sequence of ``max_model_len`` does.
    """
    if shard.pipeline:  # all stages have as many blocks as the one with the fewest
        given: dict[str, Any] = {
            "cache": cache,
            "fit_max_model_len": fit_max_model_len,
            "compile_cache": compile_cache,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "num_gpu_blocks_override": num_gpu_blocks_override,
        }
        stages = [
            kv_memory(stage, config, version=version, encoder=None if place else encoder, **given)
            for place, stage in enumerate(shard.stages)
        ]
        return min(stages, key=lambda memory: memory.num_gpu_blocks)
    gpu = shard.gpu
    chunked = any(layer.kind == "chunked" for layer in shard.model.cache_layers)
    cache = cache or CacheOptions(config.version, capability=gpu.capability, hybrid=not chunked)
    cache = replace(
        cache,
        ranks=shard.tensor_parallel_size,
        context_ranks=shard.context_ranks,
        kv_bytes=shard.kv_dtype_bytes,
        drafts=0 if config.speculation is None else config.speculation.num_tokens,
    )
    share, longest = config.gpu_memory_utilization, config.max_model_len
    if not 0.0 < share <= 1.0:
        raise InputError(
            f"{share} is not a share", where="gpu_memory_utilization", fix="Use a number in (0, 1]."
        )
    drafts = 0 if drafter is None else drafter.weight_bytes(shard)
    more_layers = () if drafter is None else drafter.cache_layers(shard)
    weights = shard.weight_bytes + drafts + (0 if encoder is None else encoder.weights)
    if weights >= gpu.memory_bytes:
        raise InputError(
            f"{weights / _GIB:.1f} GiB of weights, but one {gpu.name} has {gpu.memory_bytes / _GIB:.1f} GiB",
            where="gpu",
            fix="Use a larger GPU, more tensor_parallel_size, or quantised weights.",
        )
    layers = (*shard.model.cache_layers, *more_layers)
    groups = _groups(layers, cache, config.max_model_len)
    bytes_per_block, block_size = block_bytes(groups), min(group.spec.block_size for group in groups)
    requested = math.ceil(gpu.memory_bytes * share)
    peak = activation_peak(
        shard,
        version=version,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        compile_cache=compile_cache,
    )
    lines = [
        MemoryLine(
            "requested",
            requested,
            "computed",
            f"{share:g} of {gpu.memory_bytes / _GIB:.2f} GiB ({gpu.memory_source})",
        ),
        MemoryLine("weights", -shard.weight_bytes, "computed", _weights_note(shard)),
        *([MemoryLine("drafter", -drafts, "computed", "weights of its own")] if drafts else []),
        _line("rotary table", rotary_table(shard), "computed"),
        _line("not from torch", outside_torch(shard, version=version)),
        _line("activation peak", peak),
        *(_encoder_lines(encoder, peak.bytes) if encoder is not None else ()),
        *([_line("LoRA slots", adapter_slots(shard))] if shard.lora_slots else []),
        *([_line("all-to-all", buffers)] if (buffers := exchange_buffers(shard)).bytes else []),
        _line("CUDA graphs", cuda_graphs(shard, version=version, max_num_seqs=config.max_num_seqs)),
    ]
    available = sum(line.bytes for line in lines)
    slack = sum(line.less for line in lines)
    used = requested
    if kv_cache_memory_bytes is not None:
        used += kv_cache_memory_bytes - available
        available, slack = kv_cache_memory_bytes, 0
        lines.append(MemoryLine("--kv-cache-memory-bytes", available, "given", "instead of what is left"))
    blocks = available // bytes_per_block
    if num_gpu_blocks_override is not None:
        used += num_gpu_blocks_override * bytes_per_block - available
        blocks, slack = num_gpu_blocks_override, 0
        lines.append(
            MemoryLine("--num-gpu-blocks-override", blocks * bytes_per_block, "given", f"{blocks} blocks")
        )
    in_flight = in_flight_tokens(
        config.version, config.max_num_batched_tokens, async_scheduling=config.async_scheduling
    )
    if fit_max_model_len:
        fitting = longest_sequence(
            blocks - 1, longest, lambda tokens: blocks_per_sequence(groups, tokens, in_flight)
        )
        longest = max(block_size, fitting)
        groups = _groups(layers, cache, longest)
    sequence_blocks = blocks_per_sequence(groups, longest, in_flight)
    memory = KVMemory(
        num_gpu_blocks=blocks,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        max_model_len=longest,
        memory_used_bytes=min(gpu.memory_bytes, used + CONTEXT_BYTES),
        lines=tuple(lines),
        sequence_blocks=sequence_blocks,
        groups=groups,
    )
    needed = 1 + sequence_blocks  # one sequence, and the null block
    if blocks < needed:
        account = ", ".join(f"{line.name} {line.bytes / _GIB:+.2f} GiB" for line in lines if line.bytes)
        if needed * bytes_per_block > available + slack:
            _refuse(memory, account, given=kv_cache_memory_bytes is not None)
        warning = (
            f"the KV pool is estimated at {max(0, memory.kv_tokens):,} tokens, less than one sequence "
            f"of max_model_len {longest:,}, for which vLLM would not start. The account may be up to "
            f"{slack / _GIB:.2f} GiB too careful, so the sequence is taken to fit: {account}"
        )
        return replace(memory, num_gpu_blocks=needed, warning=warning)
    return memory


def _encoder_lines(encoder: EncoderRun, activations: int) -> tuple[MemoryLine, ...]:
    """The tower, and what the profile run of the largest items takes beyond that of the text model: its
    outputs, which stay meanwhile, or its own peak."""
    more = max(encoder.outputs, encoder.peak - activations)
    slack = max(encoder.peak - encoder.outputs, 0) // 2
    return (
        MemoryLine("vision tower", -encoder.weights, "computed", "weights"),
        *(
            [
                MemoryLine(
                    "encoding", -more, "assumed", encoder.note, slack, min(slack, more - encoder.outputs)
                )
            ]
            if more
            else []
        ),
    )


def _weights_note(shard: Shard) -> str:
    place, stages = shard.stage
    if stages > 1:
        return f"{shard.model.layers} layers of pipeline stage {place + 1} of {stages}"
    return f"{shard.model.parameters / 1e9:.3f} B parameters"


def _groups(layers: Sequence[CacheLayer], cache: CacheOptions, longest: int) -> tuple[KVGroup, ...]:
    cache = replace(cache, max_model_len=longest)
    return groups_of(specs(layers, cache), cache.release, hybrid=cache.hybrid)


def _line(name: str, found: Estimate, origin: Origin = "assumed") -> MemoryLine:
    return MemoryLine(name, -found.bytes, origin, found.note, found.more, found.less)


def _refuse(memory: KVMemory, account: str, *, given: bool) -> NoReturn:
    """Say that no sequence fits, not even with all that the account leaves open; ``given``: by the user."""
    blocks = memory.num_gpu_blocks
    if blocks < 2 and given:
        raise InputError(
            "no memory is left for KV blocks", where="kv_cache_memory_bytes", fix="Raise it, or leave it out."
        )
    if blocks < 2:
        raise InputError(
            f"no memory is left for KV blocks: {account}",
            where="gpu_memory_utilization",
            fix="Raise it, lower max_num_seqs or max_num_batched_tokens, or use a larger GPU.",
        )
    raise InputError(
        f"the KV pool holds {memory.kv_tokens} tokens, a sequence up to {memory.max_model_len}: {account}",
        where="max_model_len",
        fix="Lower max_model_len (auto fits it to the pool), or give the KV cache more memory "
        "(gpu_memory_utilization).",
    )
