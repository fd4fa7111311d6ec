"""``vllm serve``'s flags of LoRA adapters and structured outputs, and what vLLM refuses of them."""

from __future__ import annotations

from servecast.sim.engine.held_costs import AdapterCache, GrammarCosts, Grammars
from servecast.sim.engine.pipeline_rules import loras_of_all_running
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.traffic.spec import Workload

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
DISK, COPY = 1e9, 20e9  # bytes/s; assumed
OPEN_S, TENSOR_S = 0.02, 10e-6  # opening an adapter's files, and copying one of its tensors; assumed


def lora(flags: EngineFlags, release: str, model: ModelShape, where: str) -> tuple[int, int]:
    """Rank and number of the slots of adapters, (0, 0) without. release: of ``RELEASES``.

    Raises:
        InputError: vLLM refuses the flags, or they are not modelled.
    """
    if not flags.enable_lora:
        for name in ("lora_modules", "max_loras", "max_cpu_loras", "max_lora_rank"):
            if getattr(flags, name) is not None:
                raise InputError(
                    f"{name} without enable_lora",
                    where=f"{where}.{name}",
                    fix="Set enable_lora, or leave it out.",
                )
        return 0, 0
    slots, rank = flags.max_loras or 1, flags.max_lora_rank or 16
    if rank not in _RANKS:
        raise InputError(
            f"max_lora_rank {rank}",
            where=f"{where}.max_lora_rank",
            fix=f"Use one of {', '.join(map(str, _RANKS))}: vLLM refuses this.",
        )
    if (flags.max_cpu_loras or slots) < slots:
        raise InputError(
            f"max_cpu_loras {flags.max_cpu_loras} below max_loras {slots}",
            where=f"{where}.max_cpu_loras",
            fix="Raise it: vLLM refuses this.",
        )
    if model.moe_layers or model.keeps_states:
        what = "experts" if model.moe_layers else "states"
        raise InputError(
            f"LoRA adapters of {model.name}, whose layers have {what}, are not modelled",
            where=f"{where}.enable_lora",
            fix="Use a dense model.",
        )
    staged = flags.pipeline_parallel_size > 1 and not loras_of_all_running(release)
    if staged and (flags.lora_modules is None or len(flags.lora_modules) > slots):
        raise InputError(
            f"with pipeline stages vLLM {release} may put more adapters into a step than max_loras {slots}, "
            "and ends",
            where=f"{where}.max_loras",
            fix="Give lora_modules and a slot for each, or use 0.33.",
        )
    return rank, slots


def adapter_cache(flags: EngineFlags, shard: Shard) -> AdapterCache | tuple[AdapterCache, ...] | None:
    """A server's adapters, None where it serves none; of each pipeline stage, which reads all of a file and
    keeps its layers. Those of ``lora_modules`` are loaded when it starts; where they are more than
    ``max_cpu_loras``, what is missing comes from disk."""
    if not shard.lora_slots:
        return None
    caches = tuple(_adapter_cache(flags, stage, shard.whole.lora_numbers) for stage in shard.stages)
    return caches if shard.pipeline else caches[0]


def _adapter_cache(flags: EngineFlags, shard: Shard, numbers: int) -> AdapterCache:
    """Of a rank, whose file has so many numbers."""
    slots = shard.lora_slots
    host_slots = flags.max_cpu_loras or slots
    tensors = 2 * sum(count for count, _ in shard.model.linears())
    size = shard.model.dtype_bytes
    known = flags.lora_modules is not None and len(flags.lora_modules) <= host_slots
    disk_s = 0.0 if known else OPEN_S + numbers * size / DISK
    copy_s = tensors * TENSOR_S + shard.lora_numbers * size / COPY
    return AdapterCache(slots, host_slots, disk_s, copy_s)


def grammars(flags: EngineFlags) -> Grammars:
    """A server's compiler of grammars: half of the host's cores (StructuredOutputManager)."""
    threads = max(1, (flags.host_cores + 1) // 2)
    return Grammars(GrammarCosts(flags.grammar_compile_s, flags.grammar_mask_s, threads))


def check_traffic(flags: EngineFlags, workload: Workload, source: str) -> tuple[str, ...]:
    """What a result should say of the workload's adapters and grammars.

    Raises:
        InputError: requests use adapters that the server does not have.
    """
    streams = [stream for stage in workload.stages for stream in stage.streams]
    names = list(dict.fromkeys(name for stream in streams for name in stream.lora_traffic_split or {}))
    notes = []
    if names and not flags.enable_lora:
        raise InputError(
            f"requests use LoRA adapters ({', '.join(names[:3])}), and the server has none",
            where=f"{source}: workload.lora_traffic_split",
            fix="Set engine.enable_lora.",
        )
    missing = [name for name in names if flags.lora_modules is not None and name not in flags.lora_modules]
    if missing:
        raise InputError(
            f"{missing[0]!r} is not among the server's lora_modules",
            where=f"{source}: workload.lora_traffic_split",
            fix=f"Add it there, or use one of: {', '.join(flags.lora_modules or ()) or '(there is none)'}.",
        )
    if flags.enable_lora:
        notes.append(
            f"LoRA: an adapter is read from disk at {DISK / 1e9:g} GB/s and copied to the GPU at "
            f"{COPY / 1e9:g} GB/s; both are assumed, as is the time of its kernels"
        )
    if any(stream.structured_outputs for stream in streams):
        notes.append(
            f"structured outputs: {flags.grammar_compile_s * 1e3:g} ms to compile a grammar and "
            f"{flags.grammar_mask_s * 1e6:g} us for a request's mask of tokens, unless given, are assumed"
        )
    return tuple(notes)
