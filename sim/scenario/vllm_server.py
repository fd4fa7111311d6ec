"""vLLM as a server: its releases, their defaults, and its account of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.vllm_scheduler import VllmScheduler
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.memory import KVMemory, kv_memory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid
from servecast.sim.scenario.engine_flags import EngineFlags

GIB = 1 << 30
_ONLY_032 = {"long_prefill_token_threshold_adaptive": False, "watermark": 0.0, "max_num_active_seqs": None}


@dataclass(frozen=True, slots=True)
class Release:
    """How a vLLM release is modelled: its rule set and what its defaults differ in."""

    rules: str
    gpu_memory_utilization: float = 0.92
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    note: str = ""


RELEASES = {
    "0.10": Release(
        "0.23", 0.9, False, False, "vLLM 0.10 is run under the rules of 0.23, simplified to its age"
    ),
    "0.19": Release("0.23", 0.9, note="vLLM 0.19 is run under the rules of 0.23"),
    "0.23": Release("0.23"),
    "0.32": Release("0.32"),
}


def release_of(flags: EngineFlags) -> str:
    """The name of the release in ``RELEASES`` that a vLLM version is modelled as. Raises as ``check``."""
    release = ".".join(flags.version.split(".")[:2])
    if release in RELEASES:
        return release
    if not flags.assume_rules:
        raise invalid(
            f"no rule set for vLLM {flags.version!r}",
            f"Use one of {', '.join(RELEASES)}, or set assume_rules to run under the nearest one.",
            at="version",
        )
    numbers = {name: _number(name) for name in RELEASES}
    try:
        wanted = _number(release)
    except ValueError:
        raise invalid(f"{flags.version!r} is not a version", "Write it as 0.32.", at="version") from None
    return min(numbers, key=lambda name: (abs(numbers[name] - wanted), -numbers[name]))


def _number(release: str) -> float:
    major, _, minor = release.partition(".")
    return 1000 * int(major) + int(minor or 0)


@dataclass(frozen=True, slots=True)
class Vllm:
    """``vllm serve``, in the releases of ``RELEASES``."""

    engine: Callable[[EngineConfig], Engine] = VllmScheduler
    step_times: Literal["physical", "padded"] = "physical"

    def title(self, version: str) -> str:
        return f"vLLM {version}"

    def check(self, flags: EngineFlags) -> None:
        if RELEASES[release_of(flags)].rules == "0.23":
            for name, default in _ONLY_032.items():
                if getattr(flags, name) != default:
                    raise invalid(
                        f"vLLM {flags.version} has no {name}", "Remove it, or use version 0.32.", at=name
                    )

    def notes(self, flags: EngineFlags) -> tuple[str, ...]:
        release, notes = release_of(flags), []
        if ".".join(flags.version.split(".")[:2]) != release:
            notes.append(f"vLLM {flags.version} has no rule set; assumed to behave as {release}")
        if RELEASES[release].note:
            notes.append(RELEASES[release].note)
        if flags.serve_command is not None and flags.serve_command.ignored:
            notes.append(f"flags without effect here: {', '.join(flags.serve_command.ignored)}")
        return tuple(notes)

    def resolve(
        self, flags: EngineFlags, gpu: GPU, max_position_embeddings: int | None, *, where: str = "engine"
    ) -> EngineConfig:
        # EngineArgs.get_batch_defaults, and what follows it
        max_model_len = flags.longest_context(max_position_embeddings, where)
        release = RELEASES[release_of(flags)]
        tokens, seqs = _batch_defaults(gpu, release.rules, flags.tensor_parallel_size)
        if flags.performance_mode == "throughput":
            tokens, seqs = 2 * tokens, 2 * seqs
        max_num_seqs = flags.max_num_seqs or seqs
        if flags.max_num_batched_tokens is not None:
            tokens = flags.max_num_batched_tokens
        else:
            if not flags.enable_chunked_prefill:
                tokens = max(tokens, max_model_len)
            tokens = min(tokens, max_num_seqs * max_model_len)
        if flags.max_num_seqs is None:
            max_num_seqs = min(max_num_seqs, tokens)
        if tokens < max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens {tokens} is below max_num_seqs {max_num_seqs}",
                where=f"{where}.max_num_batched_tokens",
                fix="Raise it, or lower max_num_seqs: vLLM refuses this.",
            )
        if tokens < max_model_len and not flags.enable_chunked_prefill:
            raise InputError(
                f"max_num_batched_tokens {tokens} is below max_model_len {max_model_len} "
                "without chunked prefill",
                where=f"{where}.max_num_batched_tokens",
                fix="Raise it, lower max_model_len, or enable chunked prefill: vLLM refuses this.",
            )
        if flags.max_num_active_seqs is not None and flags.max_num_active_seqs > max_num_seqs:
            raise InputError(
                f"max_num_active_seqs {flags.max_num_active_seqs} is above max_num_seqs {max_num_seqs}",
                where=f"{where}.max_num_active_seqs",
                fix="Lower it: vLLM refuses this.",
            )
        defaults = {
            name: getattr(release, name)
            for name in ("gpu_memory_utilization", "async_scheduling", "scheduler_reserve_full_isl")
            if getattr(flags, name) is None
        }
        return flags.config(
            version=release.rules,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            **defaults,
        )

    def shard(self, flags: EngineFlags, config: EngineConfig, model: ModelShape, gpu: GPU) -> Shard:
        sizes: tuple[int, ...] = ()
        if not flags.enforce_eager:
            sizes = cudagraph_capture_sizes(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                version=flags.version,
                capability=gpu.capability,
                max_capture_size=flags.max_cudagraph_capture_size,
            )
        kv_dtype_bytes = 1 if flags.kv_cache_dtype.startswith("fp8") else 2
        return Shard(
            model, gpu, flags.tensor_parallel_size, kv_dtype_bytes=kv_dtype_bytes, cudagraph_sizes=sizes
        )

    def memory(self, flags: EngineFlags, config: EngineConfig, shard: Shard) -> KVMemory:
        return kv_memory(
            shard,
            version=flags.version,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            gpu_memory_utilization=config.gpu_memory_utilization,
            block_size=config.block_size,
            kv_cache_memory_bytes=flags.kv_cache_memory_bytes,
            num_gpu_blocks_override=flags.num_gpu_blocks_override,
        )

    def memory_risk(
        self, config: EngineConfig, shard: Shard, memory: KVMemory, longest_prompt: int
    ) -> MemoryRisk | None:
        return None

    def waits_for_blocks(self, flags: EngineFlags) -> bool:
        return True


def _batch_defaults(gpu: GPU, rules: str, world_size: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs of vLLM's API server. They go by the memory that the device
    reports: an "80 GB" A100 has 79 GiB."""
    if gpu.name.lower() == "cpu":
        return 2048 * world_size, 128 * world_size
    if gpu.memory_bytes >= 160 * GIB and rules == "0.32":
        return 16384, 1024
    if gpu.memory_bytes >= 70 * GIB and "a100" not in gpu.name.lower():
        return 8192, 1024
    return 2048, 256
