"""The engine's configuration in ``vllm serve``'s flags, as users give it. See servers.py for what follows."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.rules import minor_release
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, Count, Flag, Model, NonNegative, Positive, invalid
from servecast.sim.scenario.kv_transfer import KVTransfer, kv_transfer_of
from servecast.sim.scenario.pasted_command import find_serve
from servecast.sim.scenario.speculative_flags import SpeculativeConfig
from servecast.sim.scenario.vllm_flags import ServeCommand, parse_serve_command


class EngineFlags(Model):
    """``vllm serve``'s flags that matter here, by their names; None is vLLM's default."""

    version: str
    """vLLM release, in quotes. It picks the rule set and the defaults; one that is newer than all known ones
    runs as the newest."""
    policy: str = "vllm"
    """The engine, ``vllm`` or another one (see [Adding an engine](adding-an-engine.md)). For another,
    ``version`` is that server's own, and flags it does not know have no effect."""
    assume_rules: Flag = False
    """Run a release without a rule set under the nearest one."""
    command: str | None = None
    """A pasted ``vllm serve``, ``python -m vllm.entrypoints.openai.api_server`` or ``docker run`` command,
    or a container's list of ``args``. Fields beside it win."""
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"
    """As ``--dtype``."""
    quantization: str | None = None
    """As ``--quantization``: fp8 or bitsandbytes of plain weights, or the method that the config names."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """As ``--kv-cache-dtype``. fp8 counts one byte an element."""
    tensor_parallel_size: Count = 1
    """GPUs of one engine core."""
    pipeline_parallel_size: Count = 1
    """Pipeline stages of one engine core, each with some of the layers and ``tensor_parallel_size`` GPUs."""
    pp_layer_partition: tuple[Count, ...] | None = None
    """Layers of each stage, as the variable VLLM_PP_LAYER_PARTITION. Default, even."""
    decode_context_parallel_size: Count = 1
    """Of a core's GPUs those that share the tokens of a sequence's KV out, where all would hold a copy: of
    latents (MLA), and of fewer KV heads than GPUs."""
    dcp_comm_backend: Literal["ag_rs", "a2a"] | None = None
    """How they put attention's outputs together: gathered log-sum-exps and a reduce-scatter, the default, or
    one all-to-all."""
    dcp_kv_cache_interleave_size: Count = 1
    """The older name of ``cp_kv_cache_interleave_size``, which wins if it is above 1."""
    cp_kv_cache_interleave_size: Count = 1
    """Tokens in a row on one of them. It has to divide the block; beyond that it is without effect here."""
    data_parallel_size: Count = 1
    """Engine cores of one server, each with a scheduler and a cache; with experts they step together. A
    replica has as many times ``tensor_parallel_size`` GPUs."""
    data_parallel_size_local: Count | None = None
    """Of those, the ones of a node, for hybrid balancing."""
    data_parallel_rank: Amount | None = None
    """External balancing, as of one rank's command; all ranks are simulated, as replicas to the router."""
    data_parallel_start_rank: Amount | None = None
    """Hybrid balancing, as of one node's command; all nodes are simulated, as replicas to the router."""
    data_parallel_external_lb: Flag = False
    """External balancing: the router picks the rank. Of models with experts only."""
    data_parallel_multi_port_external_lb: Flag = False
    """The same, with a port for each rank."""
    data_parallel_hybrid_lb: Flag = False
    """The router picks the node, its API servers the rank."""
    data_parallel_backend: Literal["mp", "ray"] = "mp"
    """As ``--data-parallel-backend``; simulated as mp."""
    api_server_count: Count | None = None
    """API servers in front of the engine cores, among which the kernel spreads connections. Default, one a
    core. Several in front of one core are not modelled."""
    dp_sync_interval: Count | None = None
    """Steps between two agreements of cores with experts on whether any has work. Default, 16; 32 before
    0.30."""
    enable_expert_parallel: Flag = False
    """Whole experts on each GPU, instead of a part of each. The fullest of them is waited for."""
    moe_backend: Literal["auto", "triton", "deep_gemm", "flashinfer_cutlass", "marlin"] = "auto"
    """What multiplies routed experts, as ``--moe-backend``, or as older releases' variables have it:
    ``VLLM_MXFP4_USE_MARLIN=1`` is ``marlin``, ``VLLM_USE_DEEP_GEMM=0`` ``triton``. There is a choice for fp8
    with scales of blocks on Hopper, and of Marlin everywhere; else experts take what was timed."""
    all2all_backend: str = "allgather_reducescatter"
    """How tokens go to experts of other engine cores and back: ``allgather_reducescatter``,
    ``deepep_high_throughput`` or ``deepep_low_latency``; the times of others are not known."""
    enable_eplb: Flag = False
    """Place experts by their load (``model.expert_skew``, ``model.expert_loads``), again and again."""
    eplb_config: dict[str, Any] | None = None
    """As ``--eplb-config``: ``num_redundant_experts``, ``step_interval`` and ``use_async`` count."""
    enable_lora: Flag = False
    """Serve LoRA adapters of a dense model; ``workload.lora_traffic_split`` says who uses them."""
    max_loras: Count | None = None
    """Adapters of one step, at most, and their slots on the GPU. Default, 1."""
    max_cpu_loras: Count | None = None
    """Adapters in host memory; others are read from disk. Default, as ``max_loras``."""
    max_lora_rank: Count | None = None
    """Rank of the slots, and of all adapters. Default, 16."""
    lora_modules: tuple[str, ...] | None = None
    """Names of the adapters that the server loads when it starts."""
    host_cores: Count = 16
    """Cores of the server's host, half of which compile grammars."""
    grammar_compile_s: NonNegative = 0.1
    """Seconds to compile the grammar of a structured output. Assumed; measure yours."""
    grammar_mask_s: NonNegative = 30e-6
    """Seconds to fill the token mask of one such request in a step. Assumed."""
    limit_mm_per_prompt: dict[str, Any] | None = None
    """Images and videos in one prompt, at most, as ``--limit-mm-per-prompt``; 0 of a kind needs no room for
    it. Default, the model's, which are large."""
    language_model_only: Flag = False
    """No vision tower is loaded."""
    mm_processor_kwargs: dict[str, Any] | None = None
    """As ``--mm-processor-kwargs``: ``min_pixels`` and ``max_pixels`` of an image."""
    mm_processor_cache_gb: NonNegative = 4.0
    """GiB of processed items that the API server keeps."""
    disable_chunked_mm_input: Flag = False
    """Never split an item over two steps."""
    mm_encoder_tp_mode: Literal["weights", "data"] = "weights"
    """Whether each GPU has a part of the vision tower, or all of it, and encodes some of the items."""
    skip_mm_profiling: Flag = False
    """Give the KV cache what encoding would take."""
    mm_item_s: NonNegative = 2e-3
    """Seconds of the API server to process an item. Assumed; measure yours."""
    mm_pixel_s: NonNegative = 30e-9
    """The same for each pixel of an item. Assumed."""
    hf_overrides: dict[str, Any] | None = None
    """Fields in place of those of the model's config.json, as ``--hf-overrides``."""
    max_model_len: Count | Literal["auto", -1] | None = None
    """Longest prompt and output together. Default, the model's own limit; ``auto`` or -1 lowers that to what
    the KV pool holds."""
    max_num_seqs: Count | None = None
    """Most requests that run together. Default, as vLLM picks it for the GPU."""
    max_num_batched_tokens: Count | None = None
    """Token budget of a step. Default, as vLLM picks it for the GPU."""
    block_size: Count | None = None
    """Tokens of a KV block. Default, what the attention backend prefers: 16, of latents (MLA) 16 to 64.
    Beside layers with states it is raised until a block holds a state, as vLLM does."""
    disable_hybrid_kv_cache_manager: Flag | None = None
    """Manage sliding-window layers as full ones, as vLLM does with chunked ones in any case. Default,
    beside a KV connector that takes layers of one kind only, until 0.22 beside any."""
    mamba_cache_mode: Literal["none", "align", "all"] | None = None
    """When layers with states (Mamba, linear attention) keep them for others; ``all`` until 0.31. Default,
    ``align`` with prefix caching, else ``none``."""
    mamba_block_size: Count | None = None
    """As ``--mamba-block-size``: tokens of a chunk with ``mamba_cache_mode`` ``all``; else without effect."""
    mamba_cache_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of states. Default, the model's."""
    mamba_ssm_cache_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of recurrent states. Default, as ``mamba_cache_dtype`` or the model says."""
    prefix_cache_retention_interval: Amount | None = None
    """Tokens between what sliding windows and states keep for other requests; 0 is only what the prompt's end
    needs. Default, 0 from 0.29 on; before, all is kept."""
    gpu_memory_utilization: Annotated[Positive, Field(le=1)] | None = None
    """Share of the GPU's memory that vLLM may use. Default, the release's."""
    kv_cache_memory_bytes: Count | None = None
    """Size of the KV pool on one rank, instead of the account of memory."""
    num_gpu_blocks_override: Count | None = None
    """Number of KV blocks, instead of the account of memory."""
    compile_cache: Literal["warm", "cold"] = "warm"
    """Whether vLLM finds its compiled model of an earlier start. A first start, cold, may take 1 GiB more for
    compiling, which then is missing from the KV pool for as long as the server runs."""
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
    """Raise that threshold while few requests are there (from 0.31 on)."""
    watermark: Annotated[NonNegative, Field(lt=1)] = 0.0
    """Share of the KV blocks that admission leaves free (from 0.24 on)."""
    max_num_active_seqs: Count | None = None
    """A further bound on running requests (from 0.31 on)."""
    prefill_schedule_interval: Count = 1
    """Steps from one with prompt work to the next while others decode (from 0.33 on; of engine cores with
    experts from 0.24 on)."""
    speculative_config: SpeculativeConfig | None = None
    """As ``--speculative-config``: drafts, of which ``acceptance`` says how many are accepted."""
    performance_mode: Literal["balanced", "interactivity", "throughput"] = "balanced"
    """As ``--performance-mode``; ``throughput`` doubles the batch defaults."""
    enforce_eager: Flag = False
    """No CUDA graphs, hence no padding to their sizes."""
    max_cudagraph_capture_size: Count | None = None
    """Largest batch with a CUDA graph. Default, as vLLM picks it."""
    stream_interval: Count = 1
    """As ``--stream-interval``. Every token is streamed all the same, which a note says."""
    kv_offloading_size: Annotated[NonNegative | None, AfterValidator(lambda size: size or None)] = None
    """As ``--kv-offloading-size``: GiB of host memory for KV cache, of all GPUs of a replica together; 0 is
    none (see [Offloading](offloading.md))."""
    kv_offloading_backend: Literal["native", "lmcache"] = "native"
    """As ``--kv-offloading-backend``."""
    kv_transfer_config: dict[str, Any] | None = None
    """As ``--kv-transfer-config``, vLLM's JSON: the OffloadingConnector, LMCache's, and several as one; in a
    fleet of prefill and decode servers NixlConnector, the default there, what works alike, and
    ExampleConnector."""
    batch_wait_s: NonNegative = 0.05
    """How long static batching waits for a batch to fill."""

    @model_validator(mode="before")
    @classmethod
    def _from_command(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("command"), str | list | dict):
            return data
        pasted = data["command"]
        try:
            command = parse_serve_command(pasted, version=str(data.get("version")))
            if not isinstance(pasted, str):
                pasted = shlex.join(["vllm", "serve", *find_serve(pasted).words])
        except InputError as error:
            raise invalid(error.what, error.fix, at="command") from None
        merged = {**command.flags, **data, "command": pasted}
        said, own = (each.get("speculative_config") for each in (command.flags, data))
        if isinstance(said, dict) and isinstance(own, dict):
            merged["speculative_config"] = said | own
        return merged

    @property
    def serve_command(self) -> ServeCommand | None:
        """The pasted command, parsed, with the model's name and the flags that were ignored."""
        return None if self.command is None else parse_serve_command(self.command, version=self.version)

    @property
    def gpus(self) -> int:
        """GPUs of one server."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def kv_transfer(self) -> KVTransfer | None:
        """The KV connector that they ask for."""
        return self._kv_transfer[0]

    @property
    def kv_transfer_note(self) -> str:
        """What a result should say of it."""
        return self._kv_transfer[1]

    @property
    def _kv_transfer(self) -> tuple[KVTransfer | None, str]:
        if self.kv_transfer_config is None and self.kv_offloading_size is None:
            return None, ""
        return kv_transfer_of(
            self.kv_transfer_config,
            self.kv_offloading_size,
            self.kv_offloading_backend,
            minor_release(self.version),
            self.tensor_parallel_size,
        )

    @property
    def fits_max_model_len(self) -> bool:
        """Whether ``max_model_len`` is lowered to what the KV pool holds."""
        return self.max_model_len in ("auto", -1)

    def config(self, **resolved: Any) -> EngineConfig:
        """The flags that an engine reads, with ``resolved`` in place of what was given."""
        shared = {field.name for field in fields(EngineConfig)} & set(EngineFlags.model_fields)
        given = {name: value for name, value in self.model_dump(include=shared).items() if value is not None}
        return EngineConfig(**given | resolved)

    def longest_context(
        self, max_position_embeddings: int | None, where: str, *, default: int | None = None
    ) -> int:
        """``max_model_len``, by default ``default`` or the longest context of the model's config.

        Raises:
            InputError: beyond that, or neither says it. ``where`` is what messages call the flags.
        """
        given = self.max_model_len if isinstance(self.max_model_len, int) and self.max_model_len > 0 else None
        longest = given or default or max_position_embeddings
        if longest is None:
            raise InputError(
                "the model's config has no max_position_embeddings",
                where=f"{where}.max_model_len",
                fix="Give max_model_len.",
            )
        if max_position_embeddings is not None and longest > max_position_embeddings:
            raise InputError(
                f"max_model_len {longest} is beyond the model's {max_position_embeddings} positions",
                where=f"{where}.max_model_len",
                fix=f"Lower it to at most {max_position_embeddings}, or stretch them with hf_overrides.",
            )
        return longest
