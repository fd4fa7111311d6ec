"""vLLM as a server: its releases, their defaults, and its account of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.kv_groups import CacheMode, CacheOptions
from servecast.sim.engine.rules import OPTION_SINCE, RULES, has_option, minor_release
from servecast.sim.engine.rules import since as at_least
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.speculation import Speculation
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.memory import KVMemory, kv_memory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.shard import release as release_number
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import invalid, within
from servecast.sim.scenario import ranks
from servecast.sim.scenario.adapters import lora
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.hybrid_cache import by_kind
from servecast.sim.scenario.kv_pull import pull_settings
from servecast.sim.scenario.media import run_of
from servecast.sim.scenario.ranks import check_interleaving, context_ranks, data_parallel, expert_ranks
from servecast.sim.scenario.stages import asynchronous, pipeline, runs_on_v2
from servecast.sim.scenario.vllm_flags import FLAG_BAND

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Release:
    """How a vLLM release is modelled: its rule set and what its defaults differ in.

    large_gpu_defaults: EngineArgs.get_batch_defaults has a row for GPUs of 160 GiB.
    preparation_round: requests that its API server prepares together, at most: 32 with
    AsyncMicrobatchTokenizer, which 0.24 has no more; since then one thread prepares them in their order.
    """

    rules: str
    gpu_memory_utilization: float = 0.92
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    note: str = ""
    large_gpu_defaults: bool = False
    preparation_round: int = 32


def _number(release: str) -> float:
    major, _, minor = release.partition(".")
    return 1000 * int(major) + int(minor or 0)


RELEASES = {
    "0.10": Release(
        "0.23", 0.9, False, False, "vLLM 0.10 is run under the rules of 0.23, simplified to its age"
    ),
    "0.19": Release("0.23", 0.9, note="vLLM 0.19 is run under the rules of 0.23"),
    **{
        release: Release(
            release,
            large_gpu_defaults=_number(release) >= _number("0.28"),
            preparation_round=1 if _number(release) >= _number("0.24") else 32,
        )
        for release in RULES
    },
}
NEWEST = max(RELEASES, key=_number)
UNKNOWN_RELEASE_BAND = 0.1  # assumed: what a release without a rule set may have changed


def release_of(flags: EngineFlags) -> str:
    """The name of the release in ``RELEASES`` that a vLLM version is modelled as: its own, the newest for one
    to come, the nearest with ``assume_rules``. Raises as ``check``."""
    release = minor_release(flags.version)
    if release in RELEASES:
        return release
    try:
        if _number(release) > _number(NEWEST) or flags.assume_rules:
            return _nearest(release)
    except ValueError:
        raise invalid(f"{flags.version!r} is not a version", "Write it as 0.32.", at="version") from None
    raise invalid(
        f"no rule set for vLLM {flags.version!r}",
        f"Use 0.10, 0.19, or {min(RULES)} to {NEWEST}, or set assume_rules to run under the nearest of them.",
        at="version",
    )


def preparation_round(version: str | None) -> int:
    """See ``Release``, of the release nearest to a vLLM version; where none is known, of the newest."""
    try:
        name = _nearest(minor_release(version or ""))
    except ValueError:
        name = NEWEST
    return RELEASES[name].preparation_round


def _nearest(release: str) -> str:
    wanted, numbers = _number(release), {name: _number(name) for name in RELEASES}
    return min(numbers, key=lambda name: (abs(numbers[name] - wanted), -numbers[name]))


@dataclass(frozen=True, slots=True)
class Vllm:
    """``vllm serve``, in the releases of ``RELEASES``."""

    engine: Callable[[EngineConfig], Engine] = Scheduler
    step_times: Literal["physical", "padded"] = "physical"

    def title(self, version: str) -> str:
        return f"vLLM {version}"

    def check(self, flags: EngineFlags) -> None:
        release = RELEASES[release_of(flags)].rules
        if flags.speculative_config is not None:
            with within("speculative_config"):
                flags.speculative_config.check(release)
            asked, usual = flags.async_scheduling, RELEASES[release_of(flags)].async_scheduling
            flags.speculative_config.runs_async(release, asked, usual)
        transfer = flags.kv_transfer  # whose errors name the field themselves
        with within("kv_transfer_config"):
            pull_settings(transfer)
        for name, since in OPTION_SINCE.items():
            given = getattr(flags, name) != EngineFlags.model_fields[name].default
            if given and not has_option(release, name) and name != "prefill_schedule_interval":
                raise invalid(
                    f"vLLM {flags.version} has no {name}", f"Remove it, or use version {since}.", at=name
                )

    def notes(self, flags: EngineFlags) -> tuple[str, ...]:
        release, notes = release_of(flags), []
        if minor_release(flags.version) != release:
            notes.append(f"vLLM {flags.version} has no rule set; assumed to behave as {release}")
        notes += ranks.notes(flags)
        if (
            flags.prefill_schedule_interval > 1
            and flags.data_parallel_size == 1
            and not _keeps_prefills_apart(release)
        ):
            notes.append(
                f"prefill_schedule_interval has no effect in vLLM {release} without data parallelism"
            )
        if RELEASES[release].note:
            notes.append(RELEASES[release].note)
        command = flags.serve_command
        if command is not None and command.release and minor_release(command.release) != release:
            notes.append(
                f"the command's image is vLLM {command.release}, engine.version says {flags.version}"
            )
        if command is not None and command.widening:
            notes.append(
                f"not modelled, and {FLAG_BAND:.0%} more error for each: {', '.join(command.widening)}"
            )
        if command is not None and command.ignored:
            notes.append(f"flags without effect here: {', '.join(command.ignored)}")
        if flags.kv_transfer_note:
            notes.append(flags.kv_transfer_note)
        notes += [f"without effect here: {note}" for note in pull_settings(flags.kv_transfer).notes]
        if flags.stream_interval > 1:
            notes.append(
                f"stream_interval {flags.stream_interval} is not modelled: every token is streamed, so gaps "
                "between tokens are shorter, and the front end does more"
            )
        return tuple(notes)

    def extra_error(self, flags: EngineFlags) -> float:
        command = flags.serve_command
        unknown = minor_release(flags.version) not in RELEASES
        others = (len(command.widening) if command else 0) + flags.enable_lora
        others += flags.decode_context_parallel_size > 1
        return FLAG_BAND * others + UNKNOWN_RELEASE_BAND * unknown

    def resolve(
        self,
        flags: EngineFlags,
        gpu: GPU,
        model: ModelShape,
        *,
        where: str = "engine",
        speculation: Speculation | None = None,
    ) -> EngineConfig:
        if flags.dtype == "bfloat16" and (0, 0) < gpu.capability < (8, 0):
            raise InputError(
                f"vLLM refuses bfloat16 on a {gpu.name}, whose compute capability is below 8.0",
                where=f"{where}.dtype",
                fix="Use float16, which takes the same time, or leave it out.",
            )
        old, half = (0, 0) < gpu.capability < (8, 0), flags.dtype in ("float16", "half")
        if model.model_type in NO_FLOAT16 and (half or (old and flags.dtype == "auto")):
            raise InputError(
                f"vLLM refuses float16 of {model.model_type}"
                + ("" if half else f", and runs it in float32 on a {gpu.name}, which is not modelled"),
                where=f"{where}.dtype",
                fix="Use bfloat16" + (", on a GPU of compute capability 8.0 or more." if old else "."),
            )
        # EngineArgs.get_batch_defaults, and what follows it
        positions = model.longest_context(release_number(flags.version))
        max_model_len = flags.longest_context(positions, where, default=model.default_positions)
        release = RELEASES[release_of(flags)]
        world_size = flags.tensor_parallel_size * flags.pipeline_parallel_size
        tokens, seqs = _batch_defaults(gpu, release, world_size)
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
        if flags.speculative_config is not None:
            asked, usual = flags.async_scheduling, release.async_scheduling
            runs_async = flags.speculative_config.runs_async(release.rules, asked, usual)
            defaults["async_scheduling"] = runs_async
        if speculation is not None:
            _check_slots(speculation, release.rules, tokens, max_num_seqs, where)
        caching = flags.enable_prefix_caching
        if model.keeps_states and "enable_prefix_caching" not in flags.model_fields_set:
            caching = at_least(release.rules, "0.26")
        cores = data_parallel(flags, release.rules, model, where)
        overlaps = asynchronous(flags, model, release.rules, where)
        alone = cores is None or not cores.lockstep  # else it is theirs in common
        if flags.prefix_cache_retention_interval is None and at_least(release.rules, "0.29"):
            defaults["prefix_cache_retention_interval"] = 0
        return flags.config(
            version=release.rules,
            enable_prefix_caching=caching,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            preparation_round=release.preparation_round,
            speculation=speculation,
            data_parallel=cores,
            use_v2_model_runner=runs_on_v2(model, release.rules),
            max_loras=lora(flags, release.rules, model, where)[1],
            **defaults
            | ({} if overlaps is None else {"async_scheduling": overlaps})
            | ({} if alone and _keeps_prefills_apart(release.rules) else {"prefill_schedule_interval": 1}),
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
                drafts=_drafts(config.speculation),
            )
        rank, slots = lora(flags, config.version, model, "engine")
        asked = {"auto": model.kv_bytes_each, "bfloat16": 2, "float16": 2}
        return Shard(
            model,
            gpu,
            flags.tensor_parallel_size,
            kv_dtype_bytes=asked.get(flags.kv_cache_dtype, 1),
            experts=expert_ranks(flags, config.version, model, "engine"),
            context_ranks=context_ranks(flags, config.version, model, gpu, "engine"),
            context_backend=flags.dcp_comm_backend or "ag_rs",
            cudagraph_sizes=sizes,
            pipeline=pipeline(flags, model, "engine"),
            lora_rank=rank,
            lora_slots=slots,
        )

    def memory(
        self, flags: EngineFlags, config: EngineConfig, shard: Shard, drafter: Drafter | None = None
    ) -> KVMemory:
        memory = kv_memory(
            shard,
            config,
            version=flags.version,
            cache=cache_options(flags, config, shard),
            fit_max_model_len=flags.fits_max_model_len,
            compile_cache=flags.compile_cache,
            kv_cache_memory_bytes=flags.kv_cache_memory_bytes,
            num_gpu_blocks_override=flags.num_gpu_blocks_override,
            drafter=drafter,
            encoder=run_of(flags, config, shard),
        )
        check_interleaving(flags, memory.block_size, "engine")
        return memory

    def memory_risk(
        self, config: EngineConfig, shard: Shard, memory: KVMemory, longest_prompt: int
    ) -> MemoryRisk | None:
        return None

    def waits_for_blocks(self, flags: EngineFlags) -> bool:
        return True


NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # _FLOAT16_NOT_SUPPORTED_MODELS
KERNEL_BLOCK = 16  # tokens: what get_supported_kernel_block_sizes of each attention backend is a multiple of
_BYTES = {"auto": None, "float16": 2, "bfloat16": 2, "float32": 4}


def cache_options(flags: EngineFlags, config: EngineConfig, shard: Shard) -> CacheOptions:
    """What decides about KV cache groups.

    Raises:
        InputError: vLLM would refuse it, or its states are kept in a way that is not modelled.
    """
    if flags.block_size is not None and flags.block_size % KERNEL_BLOCK:
        raise InputError(
            f"blocks of {flags.block_size} tokens: no attention kernel of vLLM takes them",
            where="engine.block_size",
            fix=f"Give a multiple of {KERNEL_BLOCK}, or leave it out.",
        )
    kinds = {layer.kind for layer in shard.model.cache_layers}
    mode: CacheMode = "none"
    if config.enable_prefix_caching:
        mode = flags.mamba_cache_mode or "align"
        if mode == "none":
            mode = "align"  # MambaModelConfig.verify_and_update_config
    if "mamba" in kinds and mode == "all":
        if at_least(config.version, "0.32"):
            raise InputError(
                f"vLLM {flags.version} has no mamba_cache_mode all",
                where="engine.mamba_cache_mode",
                fix="Leave it out.",
            )
        if flags.mamba_block_size is None:
            raise InputError(
                "mamba_cache_mode all goes by the chunk of the model's scan, which is not known here",
                where="engine.mamba_block_size",
                fix="Give the model's chunk size, 256 for most.",
            )
    if flags.mamba_block_size is not None and not config.enable_prefix_caching:
        raise InputError(
            "mamba_block_size without prefix caching",
            where="engine.mamba_block_size",
            fix="Leave it out: vLLM refuses this.",
        )
    return CacheOptions(
        release=config.version,
        dtype_bytes=shard.model.dtype_bytes,
        block_size=flags.block_size,
        capability=shard.gpu.capability,
        mamba_mode=mode,
        mamba_block_size=flags.mamba_block_size,
        state_bytes=_BYTES[flags.mamba_cache_dtype],
        recurrent_bytes=_BYTES[flags.mamba_ssm_cache_dtype],
        hybrid=by_kind(flags, kinds, config.version),
    )


def _drafts(speculation: Speculation | None) -> tuple[int, ...]:
    """Numbers of drafts that decoding requests of a step may have."""
    if speculation is None:
        return (0,)
    return tuple(sorted({speculation.num_tokens, *(drafts for _, drafts in speculation.by_batch)}))


def _check_slots(speculation: Speculation, release: str, tokens: int, seqs: int, where: str) -> None:
    """Whether the drafter's input slots leave some of a step's tokens (_set_max_num_scheduled_tokens)."""
    slots = speculation.draft_slots
    taken = slots if has_option(release, "draft_slots_a_request") else slots * seqs
    if slots and tokens <= taken:
        raise InputError(
            f"the drafter's slots take {taken} of max_num_batched_tokens {tokens}",
            where=f"{where}.max_num_batched_tokens",
            fix="Raise it, or lower num_speculative_tokens: vLLM refuses this.",
        )


def _keeps_prefills_apart(release: str) -> bool:
    return has_option(RELEASES[release].rules, "prefill_schedule_interval")


def _batch_defaults(gpu: GPU, release: Release, world_size: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs of vLLM's API server. They go by the memory that the device
    reports: an "80 GB" A100 has 79 GiB."""
    if gpu.name.lower() == "cpu":
        return 2048 * world_size, 128 * world_size
    if gpu.memory_bytes >= 160 * GIB and release.large_gpu_defaults:
        return 16384, 1024
    if gpu.memory_bytes >= 70 * GIB and "a100" not in gpu.name.lower():
        return 8192, 1024
    return 2048, 256
