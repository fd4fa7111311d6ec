"""A scenario made concrete: model, GPU, memory, engine configuration, profile and step-time model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine_loop import EngineLoop
from servecast.sim.engine.group_rules import STATES_IN, WINDOWS_SINCE
from servecast.sim.engine.kv_groups import since
from servecast.sim.engine.pipeline_rules import decode_stride
from servecast.sim.fleet.spec import GpuSpec
from servecast.sim.hardware.error_band import Bands, Transfer, transfer
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk
from servecast.sim.hardware.profile import Profile, Provenance, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import StepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Limits
from servecast.sim.scenario.adapters import adapter_cache, check_traffic, grammars
from servecast.sim.scenario.basis import Fitted, fitted_profiles, profile_of, why_typical
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.stages import note as stages_note
from servecast.sim.scenario.stages import over_nodes
from servecast.sim.scenario.vllm_flags import FLAG_BAND


@dataclass(frozen=True, slots=True)
class Deployment:
    """What one replica of a scenario is.

    Attributes:
        scenario: what it was made of. shard: its model on its GPUs, one rank of it.
        memory: the account of the KV pool. config: the engine's flags, with all defaults filled in.
        profile: efficiencies, overheads and noise; from kernel timings, or typical, where the scenario names
            none.
        step_time: how long a step takes.
    """

    scenario: Scenario
    shard: Shard
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
            InputError: a name is unknown, the server would refuse the flags, or the model does not fit.
        """
        whole = scenario  # with pools, a deployment is that of the first server that decodes
        if scenario.fleet.decode:
            scenario = scenario.of_replica(scenario.fleet.decode[0])
        flags, server = scenario.engine, scenario.server
        check_traffic(flags, scenario.stages(), scenario.source)
        model = _model(scenario)
        gpu = _gpu(scenario, experts=model.moe_layers > 0)
        config = server.resolve(flags, gpu, model, where=f"{scenario.source}: engine")
        shard = over_nodes(server.shard(flags, config, model, gpu), scenario.gpu)
        memory = server.memory(flags, config, shard)
        config = replace(
            config,
            num_gpu_blocks=memory.num_gpu_blocks,
            max_model_len=memory.max_model_len,
            block_size=memory.block_size,
            kv_groups=memory.kv_groups,
        )
        if shard.pipeline and config.kv_groups:
            raise InputError(
                f"the KV cache groups of {model.name} over pipeline stages are not modelled",
                where=f"{scenario.source}: engine.pipeline_parallel_size",
                fix="Use tensor_parallel_size.",
            )
        profile = _with_link(profile or profile_of(scenario, shard, config), scenario.gpu)
        return cls(whole, shard, memory, config, profile, build_step_time(profile, shard))

    @property
    def model(self) -> ModelShape:
        """The whole model's sizes."""
        return self.shard.model

    @property
    def served_name(self) -> str:
        """What the model is called where it is served: by a pasted command, or by its config."""
        command = self.scenario.engine.serve_command
        return self.model.name if command is None or command.model is None else command.model

    @property
    def gpu(self) -> GPU:
        """One of its GPUs."""
        return self.shard.gpu

    @property
    def endpoints(self) -> int:
        """What the router sees of one server: one, or a group of cores each with API servers of its own."""
        cores = self.config.data_parallel
        return 1 if cores is None else cores.groups

    @property
    def front_end(self) -> FrontEndCosts:
        """What stands in front of the engine, for the scenario's prompts and its network."""
        scenario = self.scenario
        costs = self.profile.front_end.of_prompts(scenario.prompts)
        return costs.over_network(scenario.network_round_trip_s)

    @property
    def limits(self) -> Limits:
        """What could bind a run of this deployment; with pools, of the first server of each."""
        fleet, own = self.scenario.fleet, self._own_limits
        if not fleet.prefill:
            return own
        pools = []
        for name, pool in (("prefill", fleet.prefill), ("decode", fleet.decode)):
            its = own if name == "decode" else Deployment.of(self.scenario.of_replica(pool[0]))._own_limits
            numbers = tuple(number for number, role in enumerate(fleet.roles) if role == name)
            pools.append((name, numbers, its))
        return replace(own, pools=tuple(pools))

    @property
    def _own_limits(self) -> Limits:
        waits_for_blocks = self.scenario.server.waits_for_blocks(self.scenario.engine)
        return Limits(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            num_gpu_blocks=self.config.num_gpu_blocks if waits_for_blocks else None,
            bound_by=self.step_time.binding,
            parts=self.step_time.breakdown,
            stride=decode_stride(self.config)[0],
        )

    def memory_risk(self, longest_prompt: int) -> MemoryRisk | None:
        """See ``Server.memory_risk``."""
        return self.scenario.server.memory_risk(self.config, self.shard, self.memory, longest_prompt)

    def equip(self, loop: Any) -> None:
        """Give the loop of one of its engines what adapters and grammars cost."""
        flags = self.scenario.engine
        if isinstance(loop, EngineLoop):
            loop.adapter_cache, loop.grammars = adapter_cache(flags, self.shard), grammars(flags)

    @property
    def error_band(self) -> float | None:
        """Relative error band of token times for this model, GPU and configuration; None if not known."""
        return self.bands.tpot

    @property
    def bands(self) -> Bands:
        """Relative error bands by metric. That of the KV pool is what its account leaves open; of a server
        other than vLLM it is not known."""
        flags, memory = self.scenario.engine, self.memory
        streams = [stream for stage in self.scenario.stages().stages for stream in stage.streams]
        structured = FLAG_BAND * any(stream.structured_outputs for stream in streams)
        bands = self.transfer.bands.wider(self.scenario.server.extra_error(flags) + structured)
        if flags.policy != "vllm":
            return replace(bands, kv_tokens=None)
        low, high = memory.range
        tokens = memory.logged_tokens
        return replace(bands, kv_tokens=round(max(1 - low / tokens, high / tokens - 1), 3))

    @property
    def transfer(self) -> Transfer:
        """How far this is from what the profile's measurements were of."""
        return transfer(self.profile, self.shard)

    @property
    def fitted_profiles(self) -> list[Fitted]:
        """Where step times rest on timings of kernels: those that were fitted to servers on this GPU."""
        return fitted_profiles(self.shard, self.step_time) if self.profile.of_kernel_timings else []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result should say about the configuration and what it rests on."""
        notes: list[str | None] = [
            *self.scenario.notes,
            self._other_model,
            *self.model.notes,
            self.memory.warning,
            self._near_groups,
            stages_note(self.shard, self.scenario.gpu),
            *check_traffic(self.scenario.engine, self.scenario.stages(), self.scenario.source),
            *(each.note for each in self.fitted_profiles),
        ]
        if self.scenario.profile is None and self.transfer.basis == "physics only":
            notes.append(why_typical(self.shard) or "")
        return tuple(filter(None, notes))

    @property
    def _near_groups(self) -> str | None:
        """Said where the release's KV cache groups are not step-exact, or the layers are managed as full."""
        kinds, version = {spec.kind for spec in self.config.kv_groups}, self.config.version
        if self.scenario.server.waits_for_blocks(self.scenario.engine):
            if "mamba" in kinds and version not in STATES_IN:
                exact = ", ".join(STATES_IN)
                return f"the cache of states is step-exact in vLLM {exact}, in {version} only near"
            if kinds and not since(version, WINDOWS_SINCE):
                return f"KV cache groups are step-exact from vLLM {WINDOWS_SINCE} on, in {version} only near"
        return None

    @property
    def _other_model(self) -> str | None:
        """Said where a pasted command serves a model of another name than the scenario's."""
        command = self.scenario.engine.serve_command
        served = None if command is None else command.model
        if served is None or served.startswith(("/", ".", "$", "~", "s3:")):
            return None
        names = (served.rpartition("/")[2], self.model.name.rpartition("/")[2])
        plain = [re.sub(r"-(instruct|chat|it|hf|base)\b|[^a-z0-9]", "", name.lower()) for name in names]
        if plain[0] == plain[1]:
            return None
        return (
            f"the command serves {served}, but what is simulated is the scenario's model, {self.model.name}"
        )

    def provenance(self) -> dict[str, object]:
        """Where the numbers come from, for results and reports."""
        profile = self.profile
        return {
            "basis": self.transfer.basis,
            "distance": list(self.transfer.distance),
            "profile": profile.title,
            "error_band": self.error_band,
            "error_bands": asdict(self.bands),
            "fitted_rows": list(profile.fitted_rows),
            "parameters": [entry.model_dump() for entry in profile.provenance],
            "gpu_source": self.gpu.source,
            "memory": [asdict(line) for line in self.memory.lines],
            "servecast_version": version("servecast"),
        }


def _model(scenario: Scenario) -> ModelShape:
    flags, where = scenario.engine, f"{scenario.source}: engine.quantization"
    if flags.dtype in ("float32", "float"):
        raise InputError(
            f"dtype {flags.dtype} is not modelled",
            where=f"{scenario.source}: engine.dtype",
            fix="Use bfloat16 or float16, as serving does.",
        )
    file, overrides, asked = scenario.config_file(), flags.hf_overrides, flags.quantization
    model = ModelShape.from_config(file, overrides=overrides)
    plain = model.quantised == "bf16" and not model.expert_format
    if asked in ("fp8", "bitsandbytes") and plain:
        online = {"quant_method": asked, "load_in_4bit": True}
        model = ModelShape.from_config(file, overrides={**(overrides or {}), "quantization_config": online})
    elif asked is not None and plain:
        raise InputError(
            f"quantization {asked!r} quantises no weights by itself, and the model's config has no "
            "quantization_config",
            where=where,
            fix="Use fp8 or bitsandbytes, or the config.json of quantised weights.",
        )
    elif asked is not None and model.quant_method and _method(asked) != _method(model.quant_method):
        raise InputError(
            f"quantization {asked!r} is not what the model's config says, {model.quant_method!r}",
            where=where,
            fix="Leave it out: vLLM refuses the two together.",
        )
    skew, loads = scenario.model.expert_skew, scenario.model.expert_loads
    if (skew or loads) and not model.moe_layers:
        raise InputError(
            f"{model.name} has no routed experts",
            where=f"{scenario.source}: model.{'expert_skew' if skew else 'expert_loads'}",
            fix="Leave it out.",
        )
    if loads and (
        skew or len(loads) != model.experts or sum(load > 0 for load in loads) < model.experts_per_token
    ):
        raise InputError(
            f"{len(loads)} loads of {model.experts} experts"
            if not skew
            else "both loads and a skew of experts",
            where=f"{scenario.source}: model.expert_loads",
            fix=f"Give one for each, at least {model.experts_per_token} above 0, and no expert_skew.",
        )
    return replace(model, expert_skew=skew, expert_loads=loads)


def _method(name: str) -> str:
    """Without the kernels that vLLM chooses itself."""
    return (
        "modelopt" if name.startswith("modelopt") else name.removesuffix("_marlin").removeprefix("gpt_oss_")
    )


def _gpu(scenario: Scenario, *, experts: bool) -> GPU:
    spec, ranks = scenario.gpu, scenario.engine.tensor_parallel_size
    together, name, what = ranks, "tensor_parallel_size", "all-reduces"
    if experts and scenario.engine.data_parallel_size > 1:
        together, name = ranks * scenario.engine.data_parallel_size, "data_parallel_size"
        what = "exchanges of tokens"
    if together > spec.per_node:
        raise InputError(
            f"{together} ranks are more than the {spec.per_node} GPUs that are linked with each other, "
            f"and {what} between nodes are not modelled",
            where=f"{scenario.source}: engine.{name}",
            fix=f"Use at most {spec.per_node}, or set gpu.per_node where more share one NVLink.",
        )
    if spec.file is not None:
        gpu = GPU.from_file(spec.file)
    else:
        assert spec.name is not None
        gpu = find_gpu(spec.name, where=f"{scenario.source}: gpu.name")
    return gpu if spec.peer_to_peer is None else replace(gpu, peer_to_peer=spec.peer_to_peer)


def _with_link(profile: Profile, spec: GpuSpec) -> Profile:
    """The profile, with what a scenario says of the link between its GPUs."""
    given: dict[str, Any] = {}
    if spec.link_share is not None:
        given["link"] = spec.link_share
    if spec.allreduce_latency_us is not None:
        given["allreduce_s"] = spec.allreduce_latency_us * 1e-6
    if not given:
        return profile
    names = {f"efficiencies.{name}" for name in given}
    if (costs := profile.efficiencies.by_kernel) is not None:  # what was given stands for what was timed
        given["by_kernel"] = replace(costs, all_reduce=())
    return profile.model_copy(
        update={
            "efficiencies": replace(profile.efficiencies, **given),
            "provenance": (
                *(entry for entry in profile.provenance if entry.parameter not in names),
                *(
                    Provenance(parameter=name, origin="given", note="in the scenario")
                    for name in sorted(names)
                ),
            ),
        }
    )
