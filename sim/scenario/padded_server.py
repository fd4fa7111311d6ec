"""A server of padded batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.speculation import Speculation
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk, padded_memory
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.sim.scenario.engine_flags import EngineFlags

_REFUSED = (
    "tensor_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
    "kv_cache_dtype",
    "speculative_config",
    "kv_transfer_config",
    "kv_offloading_size",
)


@dataclass(frozen=True, slots=True)
class Padded:
    """A server of padded batches: no token budget, no second step in flight, no default batch, one GPU."""

    engine: Callable[[EngineConfig], Engine]
    step_times: Literal["physical", "padded"] = "padded"

    def title(self, version: str) -> str:
        return version

    def check(self, flags: EngineFlags) -> None:
        """Its version is its own, and flags that it does not know have no effect, but for those that would
        change what it computes or keeps."""
        for name in _REFUSED:
            given = getattr(flags, name)
            if given != EngineFlags.model_fields[name].default:
                said = f"{name} {given}" if isinstance(given, int | float | str) else name
                raise invalid(
                    f"{said} is not modelled for the policy {flags.policy!r}", "Remove it.", at=name
                )

    def notes(self, flags: EngineFlags) -> tuple[str, ...]:
        return ()

    def extra_error(self, flags: EngineFlags) -> float:
        return 0.0

    def resolve(
        self,
        flags: EngineFlags,
        gpu: GPU,
        model: ModelShape,
        *,
        where: str = "engine",
        speculation: Speculation | None = None,
    ) -> EngineConfig:
        if flags.fits_max_model_len:
            raise InputError(
                f"the policy {flags.policy!r} fits no length to its memory",
                where=f"{where}.max_model_len",
                fix="Give a number.",
            )
        max_model_len = flags.longest_context(model.max_position_embeddings, where)
        if flags.max_num_seqs is None:
            raise InputError(
                f"the policy {flags.policy!r} has no default batch",
                where=f"{where}.max_num_seqs",
                fix="Give the requests that may run together.",
            )
        return flags.config(
            version=flags.policy,
            max_model_len=max_model_len,
            max_num_batched_tokens=flags.max_num_seqs * max_model_len,
            gpu_memory_utilization=1.0,
            async_scheduling=False,
            scheduler_reserve_full_isl=False,
        )

    def shard(self, flags: EngineFlags, config: EngineConfig, model: ModelShape, gpu: GPU) -> Shard:
        return Shard(model, gpu, 1)

    def memory(
        self, flags: EngineFlags, config: EngineConfig, shard: Shard, drafter: Drafter | None = None
    ) -> KVMemory:
        return padded_memory(
            shard,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            num_gpu_blocks=flags.num_gpu_blocks_override,
        )

    def memory_risk(
        self, config: EngineConfig, shard: Shard, memory: KVMemory, longest_prompt: int
    ) -> MemoryRisk | None:
        tokens = longest_prompt
        if config.enable_chunked_prefill and config.long_prefill_token_threshold:
            tokens = min(tokens, config.long_prefill_token_threshold)
        return MemoryRisk.of(shard, memory, max_num_seqs=config.max_num_seqs, tokens=tokens)

    def waits_for_blocks(self, flags: EngineFlags) -> bool:
        """Each row has a slot's worth of blocks, unless it was given fewer."""
        return flags.num_gpu_blocks_override is not None
