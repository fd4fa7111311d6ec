"""A scenario made concrete: model, GPU, memory, engine configuration, profile and step-time model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.group_rules import STATES_IN, WINDOWS_SINCE
from servecast.sim.engine.held_costs import MediaProcessor
from servecast.sim.engine.kv_groups import in_flight_tokens
from servecast.sim.engine.pipeline_rules import decode_stride
from servecast.sim.engine.remote_rules import refuse_groups
from servecast.sim.engine.rules import since
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.spec import GpuSpec
from servecast.sim.hardware.encoder import EncoderTime
from servecast.sim.hardware.error_band import Bands, Transfer, transfer
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk
from servecast.sim.hardware.profile import Profile, Provenance, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime, StepTime
from servecast.sim.hardware.step_time.speculative import SpeculativeStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Limits
from servecast.sim.routing.llmd.config import read_epp
from servecast.sim.scenario.adapters import adapter_cache, check_traffic, grammars
from servecast.sim.scenario.basis import Fitted, fitted_profiles, profile_of, why_typical
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.hybrid_cache import note as hybrid_note
from servecast.sim.scenario.kv_offload import Offloading, Shared, check_host_memory, offloading_of
from servecast.sim.scenario.kv_pull import WAYS
from servecast.sim.scenario.media import budget_of, check_limits, media_of, processor, tower_of
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.speculation import Speculating, speculating
from servecast.sim.scenario.stages import note as stages_note
from servecast.sim.scenario.stages import over_nodes
from servecast.sim.scenario.vllm_flags import FLAG_BAND
from servecast.sim.scenario.vllm_server import cache_options
from servecast.sim.traffic.spec import Workload


@dataclass(frozen=True, slots=True)
class Deployment:
    """What one replica of a scenario is.

    Attributes:
        scenario: what it was made of. shard: its model on its GPUs, one rank of it.
        memory: the account of the KV pool. config: the engine's flags, with all defaults filled in.
        profile: efficiencies, overheads and noise; from kernel timings, or typical, where the scenario names
            none.
        step_time: how long a step takes. speculating: how it drafts; None if it does not.
        offloading: what it keeps of its KV cache outside of the GPUs; None: nothing.
        encoder: the time of its vision tower, where prompts carry images; else None.
    """

    scenario: Scenario
    shard: Shard
    memory: KVMemory
    config: EngineConfig
    profile: Profile
    step_time: StepTime
    speculating: Speculating | None = None
    offloading: Offloading | None = None
    encoder: EncoderTime | None = None

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
        workload = scenario.stages()
        check_traffic(flags, workload, scenario.source)
        check_limits(flags, workload, scenario.source)
        _check_together(whole, workload)
        model = _model(scenario)
        gpu = _gpu(scenario, experts=model.moe_layers > 0)
        drafts = speculating(scenario, model)
        config = server.resolve(
            flags,
            gpu,
            model,
            where=f"{scenario.source}: engine",
            speculation=None if drafts is None else drafts.config,
        )
        shard = over_nodes(server.shard(flags, config, model, gpu), scenario.gpu)
        memory = server.memory(flags, config, shard, None if drafts is None else drafts.drafter)
        config = replace(
            config,
            num_gpu_blocks=memory.num_gpu_blocks,
            max_model_len=memory.max_model_len,
            block_size=memory.block_size,
            kv_groups=memory.kv_groups,
        )
        where = scenario.source
        if shard.pipeline and config.kv_groups:
            raise InputError(
                f"the KV cache groups of {model.name} over pipeline stages are not modelled",
                where=f"{where}: engine.pipeline_parallel_size",
                fix="Use tensor_parallel_size.",
            )
        if whole.fleet.prefill:
            refuse_groups(config)
        cores = config.data_parallel
        together = {
            "drafts in parallel or by batch size": (
                drafts is not None and not drafts.keeps_pace,
                "engine.speculative_config",
            ),
            "structured outputs": (_structured(workload), "workload.structured_outputs"),
            "images": (bool(media_of(workload)), "workload.media"),
        }
        for what, (asked, field) in together.items():
            if asked and cores is not None and cores.lockstep:
                raise InputError(
                    f"{what} with engine cores that step together are not modelled",
                    where=f"{where}: {field}",
                    fix="Use tensor_parallel_size.",
                )
        offloading = offloading_of(flags.kv_transfer, scenario.kv_offload, shard, memory, config, where=where)
        if offloading is not None:
            check_host_memory(offloading, gpu, scenario.fleet.size, scenario.gpu.per_node, where=where)
        profile = _with_link(profile or profile_of(scenario, shard, config), scenario.gpu)
        encoder = None
        if media_of(workload):
            config, encoder = _with_encoder(flags, config, shard, profile)
        step_time = build_step_time(profile, shard)
        if drafts is not None:
            step_time = _with_drafts(step_time, drafts, profile)
        return cls(whole, shard, memory, config, profile, step_time, drafts, offloading, encoder)

    def engine(self, replica: int, shared: Shared) -> Engine:
        """A fresh engine. replica: its number. shared: what the replicas of a run have in common."""
        if self.offloading is None:
            return self.scenario.server.engine(self.config)
        return Scheduler(self.config, self.offloading.connector(replica, shared))

    @property
    def compiles_grammars(self) -> bool:
        """Whether requests of its workload wait for grammars."""
        return _structured(self.scenario.stages())

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
            waits=self.config.data_parallel is not None and self.config.data_parallel.lockstep,
            loads=self.offloading is not None,
            passes_over=self.shard.lora_slots > 0 or self.compiles_grammars,
            encodes=self.encoder is not None,
            draft_length=None if self.speculating is None else self.speculating.length,
            stride=decode_stride(self.config)[0],
        )

    def memory_risk(self, longest_prompt: int) -> MemoryRisk | None:
        """See ``Server.memory_risk``."""
        return self.scenario.server.memory_risk(self.config, self.shard, self.memory, longest_prompt)

    def equip(self, loop: Any) -> None:
        """Give the loop of one of its engines what adapters and grammars cost."""
        flags = self.scenario.engine
        if flags.policy == "vllm":
            loop.adapter_cache, loop.grammars = adapter_cache(flags, self.shard), grammars(flags)
            if self.encoder is not None:
                loop.encode_seconds = self.encoder.seconds

    def processor(self) -> MediaProcessor | None:
        """What processes the images of a server's requests; None where there are none."""
        if self.encoder is None or self.model.tower is None:
            return None
        return processor(self.scenario.engine, self.model.tower)

    @property
    def error_band(self) -> float | None:
        """Relative error band of token times for this model, GPU and configuration; None if not known."""
        return self.bands.tpot

    @property
    def bands(self) -> Bands:
        """Relative error bands by metric. That of the KV pool is what its account leaves open; of a server
        other than vLLM it is not known."""
        flags, memory = self.scenario.engine, self.memory
        structured = FLAG_BAND * _structured(self.scenario.stages())
        more = 0.0 if self.speculating is None else self.speculating.band
        bands = self.transfer.bands.wider(self.scenario.server.extra_error(flags) + more + structured)
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
        plain = self.step_time.target if isinstance(self.step_time, SpeculativeStepTime) else self.step_time
        return fitted_profiles(self.shard, plain) if self.profile.of_kernel_timings else []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result should say about the configuration and what it rests on."""
        flags, workload, source = self.scenario.engine, self.scenario.stages(), self.scenario.source
        notes: list[str | None] = [
            *self.scenario.notes,
            self._other_model,
            *self.model.notes,
            *(() if self.speculating is None else self.speculating.notes),
            self.memory.warning,
            self._near_groups,
            self._hybrid_cache,
            self._blind_router,
            self._lone_connector,
            stages_note(self.shard, self.scenario.gpu),
            *check_traffic(flags, workload, source),
            *check_limits(flags, workload, source),
            *(each.note for each in self.fitted_profiles),
        ]
        if self.scenario.profile is None and self.transfer.basis == "physics only":
            notes.append(why_typical(self.shard) or "")
        return tuple(filter(None, notes))

    @property
    def _lone_connector(self) -> str | None:
        """Said where a server has a connector to pass KV cache on, and nobody to pass it to."""
        transfer, fleet = self.scenario.engine.kv_transfer, self.scenario.fleet
        if transfer is None or transfer.connector not in WAYS or fleet.prefill:
            return None
        return (
            f"{transfer.connector} is without effect here: there are no fleet.prefill and fleet.decode to "
            "exchange KV cache"
        )

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
    def _hybrid_cache(self) -> str | None:
        """Said where a KV connector is there, and layers have windows."""
        fleet = self.scenario.fleet
        flags = (self.scenario.of_replica(fleet.decode[0]) if fleet.decode else self.scenario).engine
        if flags.policy != "vllm" or (flags.kv_transfer is None and not fleet.prefill):
            return None
        config, shard = self.config, self.shard
        in_flight = in_flight_tokens(
            config.version, config.max_num_batched_tokens, async_scheduling=config.async_scheduling
        )
        drafter = None if self.speculating is None else self.speculating.drafter
        cache = replace(cache_options(flags, config, shard), hybrid=True)
        return hybrid_note(flags, self.memory, shard, drafter, cache, in_flight)

    @property
    def _blind_router(self) -> str | None:
        """Said where the router asks which blocks servers have, and some are outside of the GPUs."""
        fleet = self.scenario.fleet
        if self.offloading is None or fleet.epp is None:
            return None
        scorers = read_epp(fleet.epp, fleet.router_options.epp_release).scorers
        if not any(scorer.type.startswith("precise-prefix-cache") for scorer, _ in scorers):
            return None
        return (
            "the precise prefix scorer knows of blocks in GPUs only: llm-d's counts those in host memory, "
            "too, as 0.8 of a block"
        )

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
        config, own = self.scenario.model.config, self.model.name
        file = "" if own.endswith(config) else f" ({config})"
        return f"the command serves {served}, but what is simulated is the scenario's model, {own}{file}"

    @property
    def _of_images(self) -> tuple[Provenance, ...]:
        """Where the numbers of images come from."""
        if self.encoder is None:
            return ()
        flags = self.scenario.engine
        processing = Provenance(
            parameter="mm_processing", origin="assumed", note="unless engine.mm_item_s, mm_pixel_s are given"
        )
        if {"mm_item_s", "mm_pixel_s"} <= flags.model_fields_set:
            processing = Provenance(parameter="mm_processing", origin="given", note="in the scenario")
        return (
            Provenance(
                parameter="vision_tower",
                origin="computed",
                note="FLOPs and bytes of its config, by the efficiencies of the text model",
            ),
            processing,
        )

    @property
    def _of_drafts(self) -> tuple[Provenance, ...]:
        """Where the numbers of speculation come from."""
        if self.speculating is None:
            return ()
        law = self.speculating.law
        return (
            Provenance(parameter="acceptance", origin=law.origin, note=law.note),
            Provenance(parameter="drafting", origin="assumed", note="by the efficiencies of the target"),
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
            "parameters": [
                entry.model_dump() for entry in (*profile.provenance, *self._of_drafts, *self._of_images)
            ],
            "gpu_source": self.gpu.source,
            "memory": [asdict(line) for line in self.memory.lines],
            "servecast_version": version("servecast"),
        }


def _structured(workload: Workload) -> bool:
    """Whether outputs of the workload follow grammars."""
    streams = [stream for stage in workload.stages for stream in stage.streams]
    return any(stream.structured_outputs for stream in streams)


def _check_together(scenario: Scenario, workload: Workload) -> None:
    """Refuses stages, adapters, grammars and images where they are modelled only alone."""
    fleet, flags = scenario.fleet, scenario.engine
    servers = [scenario.of_replica(each).engine for each in (*fleet.prefill, *fleet.decode)] or [flags]
    structured, images = _structured(workload), bool(media_of(workload))
    for engine in servers:
        if fleet.prefill and engine.kv_transfer is not None and engine.kv_transfer.connector not in WAYS:
            raise InputError(
                f"{engine.kv_transfer.connector} on prefill and decode servers is not modelled",
                where=f"{scenario.source}: engine.kv_transfer_config",
                fix="Leave it and kv_offloading_size out, or fleet.prefill.",
            )
        stages = engine.pipeline_parallel_size > 1
        others = {
            "prefill and decode servers": bool(fleet.prefill),
            "KV connectors": engine.kv_transfer is not None,
            "drafts": engine.speculative_config is not None,
            f"the policy {engine.policy!r}": engine.policy != "vllm",
        }
        ranks, one = "Use tensor_parallel_size.", "Use one of the two."
        alone = (  # what, whether it is asked for, where, what to do, and beside what it is refused
            ("images", images, "workload.media", ranks, {"pipeline stages": stages}),
            ("pipeline stages", stages, "engine.pipeline_parallel_size", ranks, others),
            ("LoRA adapters", engine.enable_lora, "engine.enable_lora", one, others),
            ("structured outputs", structured, "workload.structured_outputs", one, others),
            ("images", images, "workload.media", "Remove it.", others),
        )
        for what, wanted, where, fix, refused in alone:
            for other, there in refused.items():
                if wanted and there:
                    raise InputError(
                        f"{what} with {other} are not modelled", where=f"{scenario.source}: {where}", fix=fix
                    )


def _with_encoder(
    flags: EngineFlags, config: EngineConfig, shard: Shard, profile: Profile
) -> tuple[EngineConfig, EncoderTime]:
    """The engine's flags with its encoder's budget and cache, and the time of its vision tower."""
    tower, budget = tower_of(shard.model, flags), budget_of(flags, config, shard.model)
    assert budget is not None
    if profile.kind != "physical":
        raise InputError(
            f"a profile of kind {profile.kind} has no times of a vision tower",
            where="profile",
            fix="Use a profile of kind physical, or none.",
        )
    config = replace(config, max_num_encoder_input_tokens=budget.budget, encoder_cache_size=budget.budget)
    return config, EncoderTime(tower, shard, profile, whole=flags.mm_encoder_tp_mode == "data")


def _with_drafts(step_time: StepTime, drafts: Speculating, profile: Profile) -> SpeculativeStepTime:
    if not isinstance(step_time, PhysicalStepTime):
        raise InputError(
            f"a profile of kind {profile.kind} has no times of drafts",
            where="profile",
            fix="Use a profile of kind physical, or none.",
        )
    return SpeculativeStepTime(step_time, drafts.drafter, profile.efficiencies, skips=drafts.skips)


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
