"""The engine's configuration in ``vllm serve``'s flags, as users give it, and vLLM's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engines import ENGINES
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import (
    Amount,
    Count,
    Flag,
    Model,
    NonNegative,
    Positive,
    did_you_mean,
    invalid,
)
from servecast.sim.scenario.vllm_flags import ServeCommand, parse_serve_command

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


def _policy(name: str) -> str:
    if name not in ENGINES:
        fix = did_you_mean(name, ENGINES) or f"Known: {', '.join(ENGINES)}."
        raise invalid(f"there is no engine policy {name!r}", fix)
    return name


class EngineFlags(Model):
    """``vllm serve``'s flags that matter here, by their names; None is vLLM's default."""

    version: str
    """vLLM release, in quotes. It picks the rule set and the defaults."""
    policy: Annotated[str, AfterValidator(_policy)] = "vllm"
    """The engine, ``vllm`` or another one (see [Adding an engine](adding-an-engine.md)). For another,
    ``version`` is that server's own, and flags it does not know have no effect."""
    assume_rules: Flag = False
    """Run a release without a rule set under the nearest one."""
    command: str | None = None
    """A pasted ``vllm serve ...`` line. Fields beside it win."""
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"
    """As ``--dtype``."""
    quantization: str | None = None
    """As ``--quantization``. fp8 weights count one byte, all others two."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """As ``--kv-cache-dtype``. fp8 counts one byte an element."""
    tensor_parallel_size: Count = 1
    """GPUs of one replica."""
    max_model_len: Count | None = None
    """Longest prompt and output together. Default, the model's own limit."""
    max_num_seqs: Count | None = None
    """Most requests that run together. Default, as vLLM picks it for the GPU."""
    max_num_batched_tokens: Count | None = None
    """Token budget of a step. Default, as vLLM picks it for the GPU."""
    block_size: Count = 16
    """Tokens of a KV block."""
    gpu_memory_utilization: Annotated[Positive, Field(le=1)] | None = None
    """Share of the GPU's memory that vLLM may use. Default, the release's."""
    kv_cache_memory_bytes: Count | None = None
    """Size of the KV pool on one rank, instead of the account of memory."""
    num_gpu_blocks_override: Count | None = None
    """Number of KV blocks, instead of the account of memory."""
    enable_prefix_caching: Flag = True
    """Find the KV blocks of known prefixes again."""
    enable_chunked_prefill: Flag = True
    """Split prompts over steps."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of the waiting queue and of preemption."""
    async_scheduling: Flag | None = None
    """Decide a step while the one before runs. Default, the release's."""
    scheduler_reserve_full_isl: Flag | None = None
    """Admit a request only if its whole prompt fits. Default, the release's."""
    long_prefill_token_threshold: Amount = 0
    """Most prompt tokens of one request in a step; 0 is no limit."""
    long_prefill_token_threshold_adaptive: Flag = False
    """Raise that threshold while few requests are there (0.32)."""
    watermark: Annotated[NonNegative, Field(lt=1)] = 0.0
    """Share of the KV blocks that admission leaves free (0.32)."""
    max_num_active_seqs: Count | None = None
    """A further bound on running requests (0.32)."""
    performance_mode: Literal["balanced", "interactivity", "throughput"] = "balanced"
    """As ``--performance-mode``; ``throughput`` doubles the batch defaults."""
    enforce_eager: Flag = False
    """No CUDA graphs, hence no padding to their sizes."""
    max_cudagraph_capture_size: Count | None = None
    """Largest batch with a CUDA graph. Default, as vLLM picks it."""
    stream_interval: Count = 1
    """As ``--stream-interval``. Accepted; every token is streamed."""
    batch_wait_s: NonNegative = 0.05
    """How long static batching waits for a batch to fill."""

    @model_validator(mode="before")
    @classmethod
    def _from_command(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("command"), str):
            return data
        try:
            command = parse_serve_command(data["command"], version=str(data.get("version")))
        except InputError as error:
            raise invalid(error.what, error.fix, at="command") from None
        return {**command.flags, **data}

    @model_validator(mode="after")
    def _fits_release(self) -> EngineFlags:
        if self.policy != "vllm":
            return self
        release = self._release()
        if RELEASES[release].rules == "0.23":
            for name, default in _ONLY_032.items():
                if getattr(self, name) != default:
                    raise invalid(
                        f"vLLM {self.version} has no {name}", "Remove it, or use version 0.32.", at=name
                    )
        return self

    def _release(self) -> str:
        release = ".".join(self.version.split(".")[:2])
        if release in RELEASES:
            return release
        if not self.assume_rules:
            raise invalid(
                f"no rule set for vLLM {self.version!r}",
                f"Use one of {', '.join(RELEASES)}, or set assume_rules to run under the nearest one.",
                at="version",
            )
        numbers = {name: _number(name) for name in RELEASES}
        try:
            wanted = _number(release)
        except ValueError:
            raise invalid(f"{self.version!r} is not a version", "Write it as 0.32.", at="version") from None
        return min(numbers, key=lambda name: (abs(numbers[name] - wanted), -numbers[name]))

    @property
    def release(self) -> Release:
        """How this version is modelled."""
        return RELEASES[self._release()]

    @property
    def serve_command(self) -> ServeCommand | None:
        """The pasted command, parsed, with the model's name and the flags that were ignored."""
        return None if self.command is None else parse_serve_command(self.command)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result should say about this configuration: an assumed rule set, ignored flags."""
        if self.policy != "vllm":
            return ()
        release, notes = self._release(), []
        if ".".join(self.version.split(".")[:2]) != release:
            notes.append(f"vLLM {self.version} has no rule set; assumed to behave as {release}")
        if RELEASES[release].note:
            notes.append(RELEASES[release].note)
        if self.serve_command is not None and self.serve_command.ignored:
            notes.append(f"flags without effect here: {', '.join(self.serve_command.ignored)}")
        return tuple(notes)


def _number(release: str) -> float:
    major, _, minor = release.partition(".")
    return 1000 * int(major) + int(minor or 0)


@dataclass(frozen=True, slots=True)
class ResolvedEngine:
    """Engine flags with vLLM's defaults filled in. ``rules`` is the rule set's name."""

    flags: EngineFlags
    rules: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    async_scheduling: bool
    scheduler_reserve_full_isl: bool

    def config(self, num_gpu_blocks: int) -> EngineConfig:
        """What the engine model takes, with this many KV blocks (the null block included)."""
        flags = self.flags
        return EngineConfig(
            version=self.rules,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_gpu_blocks=num_gpu_blocks,
            block_size=flags.block_size,
            enable_prefix_caching=flags.enable_prefix_caching,
            enable_chunked_prefill=flags.enable_chunked_prefill,
            scheduling_policy=flags.scheduling_policy,
            async_scheduling=self.async_scheduling,
            scheduler_reserve_full_isl=self.scheduler_reserve_full_isl,
            long_prefill_token_threshold=flags.long_prefill_token_threshold,
            long_prefill_token_threshold_adaptive=flags.long_prefill_token_threshold_adaptive,
            watermark=flags.watermark,
            max_num_active_seqs=flags.max_num_active_seqs,
            policy=flags.policy,
            batch_wait_s=flags.batch_wait_s,
        )


def resolve_defaults(
    flags: EngineFlags,
    *,
    gpu_name: str,
    gpu_memory_bytes: int,
    max_position_embeddings: int | None,
    where: str = "engine",
) -> ResolvedEngine:
    """Fill in the defaults of ``vllm serve`` (EngineArgs.get_batch_defaults and what follows it).

    Args:
        gpu_name: "cpu" for the CPU build.
        gpu_memory_bytes: total memory as the device reports it (an "80 GB" A100 has 79 GiB).
        max_position_embeddings: the longest context of the model's config.

    Raises:
        InputError: vLLM would refuse the combination, or nothing says the longest context.
    """
    max_model_len = flags.max_model_len or max_position_embeddings
    if max_model_len is None:
        raise InputError(
            "the model's config has no max_position_embeddings",
            where=f"{where}.max_model_len",
            fix="Give max_model_len.",
        )
    if max_position_embeddings is not None and max_model_len > max_position_embeddings:
        raise InputError(
            f"max_model_len {max_model_len} is beyond the model's {max_position_embeddings} positions",
            where=f"{where}.max_model_len",
            fix=f"Lower it to at most {max_position_embeddings}.",
        )
    if flags.policy != "vllm":
        return _another_server(flags, max_model_len, where)
    release = flags.release
    tokens, seqs = _batch_defaults(gpu_name, gpu_memory_bytes, release.rules, flags.tensor_parallel_size)
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
            f"max_num_batched_tokens {tokens} is below max_model_len {max_model_len} without chunked prefill",
            where=f"{where}.max_num_batched_tokens",
            fix="Raise it, lower max_model_len, or enable chunked prefill: vLLM refuses this.",
        )
    if flags.max_num_active_seqs is not None and flags.max_num_active_seqs > max_num_seqs:
        raise InputError(
            f"max_num_active_seqs {flags.max_num_active_seqs} is above max_num_seqs {max_num_seqs}",
            where=f"{where}.max_num_active_seqs",
            fix="Lower it: vLLM refuses this.",
        )
    return ResolvedEngine(
        flags=flags,
        rules=release.rules,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=flags.gpu_memory_utilization or release.gpu_memory_utilization,
        async_scheduling=release.async_scheduling
        if flags.async_scheduling is None
        else flags.async_scheduling,
        scheduler_reserve_full_isl=(
            release.scheduler_reserve_full_isl
            if flags.scheduler_reserve_full_isl is None
            else flags.scheduler_reserve_full_isl
        ),
    )


def _another_server(flags: EngineFlags, max_model_len: int, where: str) -> ResolvedEngine:
    """A server of padded batches: no token budget, no second step in flight, no default batch."""
    if flags.max_num_seqs is None:
        raise InputError(
            f"the policy {flags.policy!r} has no default batch",
            where=f"{where}.max_num_seqs",
            fix="Give the requests that may run together.",
        )
    for name, known in (("tensor_parallel_size", 1), ("kv_cache_dtype", "auto")):
        if getattr(flags, name) != known:
            raise InputError(
                f"{name} {getattr(flags, name)} is not modelled for the policy {flags.policy!r}",
                where=f"{where}.{name}",
                fix="Remove it.",
            )
    return ResolvedEngine(
        flags=flags,
        rules=flags.policy,
        max_model_len=max_model_len,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_seqs * max_model_len,
        gpu_memory_utilization=1.0,
        async_scheduling=False,
        scheduler_reserve_full_isl=False,
    )


def _batch_defaults(gpu_name: str, memory_bytes: int, rules: str, world_size: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs of the API server."""
    if gpu_name.lower() == "cpu":
        return 2048 * world_size, 128 * world_size
    if memory_bytes >= 160 * GIB and rules == "0.32":
        return 16384, 1024
    if memory_bytes >= 70 * GIB and "a100" not in gpu_name.lower():
        return 8192, 1024
    return 2048, 256
