"""A scenario made concrete: model, GPU, memory, engine configuration, profile and step-time model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version

from servecast.sim.engine.config import EngineConfig
from servecast.sim.hardware.error_band import Transfer, transfer
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.memory import KVMemory, kv_memory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk, padded_memory
from servecast.sim.hardware.profile import Profile, build_step_time
from servecast.sim.hardware.shard import Shard, cudagraph_capture_sizes
from servecast.sim.hardware.step_time.physical import StepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Limits
from servecast.sim.scenario.engine_flags import ResolvedEngine, resolve_defaults
from servecast.sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Deployment:
    """What one replica of a scenario is.

    Attributes:
        scenario: what it was made of. shard: its model on its GPUs, one rank of it.
        engine: vLLM's flags with defaults filled in.
        memory: the account of the KV pool. config: what the engine model takes.
        profile: efficiencies, overheads and noise; a typical one where the scenario names none.
        step_time: how long a step takes.
    """

    scenario: Scenario
    shard: Shard
    engine: ResolvedEngine
    memory: KVMemory
    config: EngineConfig
    profile: Profile
    step_time: StepTime

    @classmethod
    def of(cls, scenario: Scenario, profile: Profile | None = None) -> Deployment:
        """Make a scenario concrete.

        Args:
            profile: instead of the one that the scenario names.

        Raises:
            InputError: a name is unknown, vLLM would refuse the flags, or the model does not fit.
        """
        flags = scenario.engine
        model = _model(scenario)
        gpu = _gpu(scenario)
        engine = resolve_defaults(
            flags,
            gpu_name=gpu.name,
            gpu_memory_bytes=gpu.memory_bytes,
            max_position_embeddings=model.max_position_embeddings,
            where=f"{scenario.source}: engine",
        )
        sizes: tuple[int, ...] = ()
        if flags.policy == "vllm" and not flags.enforce_eager:
            sizes = cudagraph_capture_sizes(
                engine.max_num_seqs,
                engine.max_num_batched_tokens,
                version=flags.version,
                capability=gpu.capability,
                max_capture_size=flags.max_cudagraph_capture_size,
            )
        shard = Shard(
            model,
            gpu,
            flags.tensor_parallel_size,
            kv_dtype_bytes=1 if flags.kv_cache_dtype.startswith("fp8") else 2,
            cudagraph_sizes=sizes,
        )
        memory = _memory(shard, engine)
        if profile is None:
            profile = _profile(scenario, gpu, model)
        step_time = build_step_time(profile, shard)
        config = engine.config(memory.num_gpu_blocks)
        return cls(scenario, shard, engine, memory, config, profile, step_time)

    @property
    def model(self) -> ModelShape:
        """The whole model's sizes."""
        return self.shard.model

    @property
    def gpu(self) -> GPU:
        """One of its GPUs."""
        return self.shard.gpu

    @property
    def limits(self) -> Limits:
        """What could bind a run of this deployment. Another engine than vLLM has a slot's worth of blocks for
        each row, so that none is waited for, unless it was given fewer."""
        flags = self.engine.flags
        waits_for_blocks = flags.policy == "vllm" or flags.num_gpu_blocks_override is not None
        return Limits(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            num_gpu_blocks=self.config.num_gpu_blocks if waits_for_blocks else None,
            bound_by=self.step_time.binding,
            parts=self.step_time.breakdown,
        )

    def memory_risk(self, longest_prompt: int) -> MemoryRisk | None:
        """What a joint prefill of a full batch may need; None for vLLM, which measures it and sets it aside.

        Args:
            longest_prompt: of the traffic, in tokens.
        """
        config = self.config
        if config.policy == "vllm":
            return None
        tokens = longest_prompt
        if config.enable_chunked_prefill and config.long_prefill_token_threshold:
            tokens = min(tokens, config.long_prefill_token_threshold)
        return MemoryRisk.of(self.shard, self.memory, max_num_seqs=config.max_num_seqs, tokens=tokens)

    @property
    def error_band(self) -> float | None:
        """Relative error band of predictions for this model and GPU; None if not known."""
        return self.transfer.error_band

    @property
    def transfer(self) -> Transfer:
        """How far this is from what the profile's measurements were of."""
        return transfer(self.profile, self.shard)

    def provenance(self) -> dict[str, object]:
        """Where the numbers come from, for results and reports."""
        profile = self.profile
        return {
            "basis": self.transfer.basis,
            "distance": list(self.transfer.distance),
            "profile": f"{profile.model} on {profile.gpu}, {profile.server}",
            "error_band": self.error_band,
            "fitted_rows": list(profile.fitted_rows),
            "parameters": [entry.model_dump() for entry in profile.provenance],
            "gpu_source": self.gpu.source,
            "memory": [dataclasses.asdict(line) for line in self.memory.lines],
            "servecast_version": version("servecast"),
        }


def _memory(shard: Shard, engine: ResolvedEngine) -> KVMemory:
    flags = engine.flags
    if flags.policy != "vllm":
        return padded_memory(
            shard,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=engine.max_model_len,
            block_size=flags.block_size,
            num_gpu_blocks=flags.num_gpu_blocks_override,
        )
    return kv_memory(
        shard,
        version=flags.version,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        block_size=flags.block_size,
        kv_cache_memory_bytes=flags.kv_cache_memory_bytes,
        num_gpu_blocks_override=flags.num_gpu_blocks_override,
    )


def _model(scenario: Scenario) -> ModelShape:
    flags = scenario.engine
    model = ModelShape.from_config(scenario.config_file())
    if flags.dtype in ("float32", "float"):
        raise InputError(
            f"dtype {flags.dtype} is not modelled",
            where=f"{scenario.source}: engine.dtype",
            fix="Use bfloat16 or float16, as serving does.",
        )
    if flags.quantization == "fp8":
        return dataclasses.replace(model, weight_bytes_each=1)
    if flags.quantization is not None and model.weight_bytes_each != 1:
        raise InputError(
            f"quantization {flags.quantization!r} is not modelled for this model's config",
            where=f"{scenario.source}: engine.quantization",
            fix="Use fp8, or a config.json of fp8 weights with its quantization_config.",
        )
    return model


def _gpu(scenario: Scenario) -> GPU:
    if scenario.gpu.file is not None:
        return GPU.from_file(scenario.gpu.file)
    assert scenario.gpu.name is not None
    return find_gpu(scenario.gpu.name, where=f"{scenario.source}: gpu.name")


def _profile(scenario: Scenario, gpu: GPU, model: ModelShape) -> Profile:
    path = scenario.profile_file()
    if path is not None:
        return Profile.load(path)
    return Profile.typical(
        gpu.name,
        model.name,
        scenario.engine.version,
        servecast_version=version("servecast"),
        kind="physical" if scenario.engine.policy == "vllm" else "padded",
    )
