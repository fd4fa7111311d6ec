"""vLLM's real scheduler and KV cache manager, driven without a model or a GPU.

Runs under the Python that has vLLM, and imports nothing but it, torch and the standard library (and the
loop beside this file). Reads scenarios as JSON lines on stdin and answers each with one JSON line on
stdout: its decisions, the last one ``{"raised": "..."}`` where it ended. The first line out says which
vLLM it is.

    python validate/parity/vllm_scheduler.py <scenarios.jsonl >decisions.jsonl
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

import inspect
import json
import math
import random
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from engine_core import decisions, draft_counts  # type: ignore[import-not-found]
from fake_store import FakeCopies  # type: ignore[import-not-found]
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import single_type_kv_cache_manager
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus, StructuredOutputRequest
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
except ImportError:  # older releases have none
    OffloadingWorkerMetadata = CPUOffloadingSpec = None

LONGEST_MODEL_LEN = 1 << 20
PAGE = getattr(CPUOffloadingSpec, "BLOCK_SIZE_ALIGNMENT", 1)  # bytes that a chunk fills
STOP_TOKEN = 7  # no other token is below FIRST_TOKEN
FIRST_TOKEN = 100
TOKENS_PER_REQUEST = 1 << 21  # prompt tokens in the lower half, output tokens in the upper
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": LONGEST_MODEL_LEN,
    "torch_dtype": "bfloat16",
}


@dataclass
class Step:
    """One scheduler step: vLLM's own output, and what was read from it."""

    output: Any
    admitted: list[int]
    resumed: list[int]
    preempted: list[int]
    cached_tokens: dict[int, int]
    samplers: frozenset[str]
    decode_context: int  # KV tokens that the step reads, prompt chunks included
    deferred: bool
    chunks: tuple[()] = ()
    finished: list[int] = field(default_factory=list)
    emitted: int = 0
    report: KVConnectorOutput | None = None

    @property
    def total_tokens(self) -> int:
        return int(self.output.total_num_scheduled_tokens)

    @property
    def drafts(self) -> int:
        return sum(map(len, self.output.scheduled_spec_decode_tokens.values()))

    @property
    def samples(self) -> int:
        return len(self.samplers) + self.drafts

    @property
    def encoder_inputs(self) -> dict[int, list[int]]:
        return {int(name): places for name, places in self.output.scheduled_encoder_inputs.items()}

    def scheduled(self) -> dict[int, int]:
        return {int(name): tokens for name, tokens in self.output.num_scheduled_tokens.items()}


class VllmEngine:
    """vLLM's scheduler behind the interface that the loop drives.

    Args:
        config: the fields of servecast's EngineConfig.
        model: folder with a config.json.
        remote: the scenario's connector, or None.

    Raises:
        ValueError: this vLLM has no such option.
    """

    def __init__(self, config: dict[str, Any], model: str, remote: dict[str, Any] | None = None) -> None:
        vllm_config = _vllm_config(config, model, remote)
        ranks = config["decode_context_parallel_size"]  # each has its part of a block
        own = config["block_size"] // ranks
        groups = config["kv_groups"] or [{"kind": "full", "block_size": own}]
        hash_block = _hash_block(config, groups) * ranks
        kv_cache = KVCacheConfig(
            num_blocks=config["num_gpu_blocks"],
            kv_cache_tensors=_tensors(config, groups, remote),
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer{i}"], _spec(each), **_drafts_at(config, each))
                for i, each in enumerate(groups)
            ],
            **_retention(config),
        )
        scheduler_cls = AsyncScheduler if config["async_scheduling"] else Scheduler
        vllm_config.parallel_config.pipeline_parallel_size = config["pipeline_parallel_size"]
        vllm_config.parallel_config.decode_context_parallel_size = ranks
        vllm_config.cache_config.block_size = own
        if config["pipeline_parallel_size"] > 1:  # whether workers run Model Runner V2, which needs a GPU
            runner = property(lambda self: config["use_v2_model_runner"])
            vllm_config.__class__ = type("VllmConfig", (VllmConfig,), {"use_v2_model_runner": runner})
        if config["max_loras"]:
            vllm_config.lora_config = LoRAConfig(max_loras=config["max_loras"], max_cpu_loras=256)
        self.scheduler = scheduler_cls(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache,
            **_block_sizes(math.lcm(*(each["block_size"] for each in groups)) * ranks, hash_block),
            structured_output_manager=StructuredOutputManager(vllm_config),
            log_stats=True,
        )
        self.encodes = config["encoder_cache_size"] > 0
        if self.encodes:  # as MultiModalBudget has it of a model, which this one needs not be
            self.scheduler.max_num_encoder_input_tokens = config["max_num_encoder_input_tokens"]
            self.scheduler.encoder_cache_manager = EncoderCacheManager(config["encoder_cache_size"])
            self.scheduler.scheduler_config.disable_chunked_mm_input = config["disable_chunked_mm_input"]
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        caching = config["enable_prefix_caching"] or remote is not None
        ahead = getattr(vllm_config, "num_hash_lookahead_tokens", 0)
        options = {"num_hash_lookahead_tokens": ahead} if ahead else {}
        self.hasher = get_request_block_hasher(hash_block, hash_fn, **options) if caching else None
        self.speculation = config["speculation"]
        self.drafts: SimpleNamespace | None = None
        if self.speculation is not None:
            none = [0] * self.speculation["num_tokens"]
            self.drafts = SimpleNamespace(
                num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0, per_position=none
            )
        self.samplings: Counter[str] = Counter()  # of requests, delivered
        self.kv = self.scheduler.kv_cache_manager
        self.pool = self.kv.block_pool
        self.grouped, self.is_async = bool(config["kv_groups"]), config["async_scheduling"]
        self.victims: list[int] = []
        self.prefix_queries = 0  # tokens, as vLLM's counters have them: without preempted requests
        self.prefix_hits = 0
        self.external_queries = self.external_hits = 0
        self.outputs: dict[str, int] = {}  # request -> tokens that the model will produce
        self.preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._preempt_and_note
        self.copies: Any = None
        self.loading: dict[int, str] = {}
        if remote is not None and remote["offload"]:
            self.copies = FakeCopies(remote["offload"]["load_steps"], remote["offload"]["store_steps"])
            self.build = self.scheduler.connector.build_connector_meta
            self.scheduler.connector.build_connector_meta = self._build_in_order
        self.finish = self.scheduler.finish_requests
        self.scheduler.finish_requests = self._finish_in_order

    def _preempt_and_note(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # SchedulerOutput.preempted_req_ids is a set: the order of victims is seen here only
        self.victims.append(int(request.request_id))
        self.preempt(request, *args, **kwargs)

    def _build_in_order(self, output: Any) -> Any:
        output.finished_req_ids = sorted(
            output.finished_req_ids
        )  # a set, whose order differs from run to run
        return self.build(output)

    def _finish_in_order(self, names: Any, status: Any) -> Any:
        # those of a set end in the order of its hashes, which differs from run to run
        if not isinstance(names, set):
            return self.finish(names, status)
        return [ended for name in sorted(names) for ended in self.finish(name, status)]

    def add(self, asked: dict[str, Any], arrival: int) -> None:
        stops = asked["output_tokens"] < asked["max_tokens"]
        by_eos = asked["request_id"] % 2 == 0  # both ways to stop are the same to the scheduler
        params = SamplingParams(
            max_tokens=asked["max_tokens"],
            temperature=0.0,
            ignore_eos=not stops,
            stop_token_ids=[STOP_TOKEN] if stops and not by_eos else None,
        )
        params.update_from_generation_config({}, eos_token_id=STOP_TOKEN)
        request = Request(
            request_id=_name(asked["request_id"]),
            prompt_token_ids=_prompt(asked),
            sampling_params=params,
            pooling_params=None,
            arrival_time=float(arrival),
            priority=asked["priority"],
            block_hasher=self.hasher,
            lora_request=_lora(asked["adapter"]),
            mm_features=[_feature(*item) for item in asked["media"]],
        )
        if asked["grammar"]:
            _await_grammar(request)
        self.outputs[request.request_id] = asked["output_tokens"]
        self.scheduler.add_request(request)

    def abort(self, request_id: int) -> None:
        self.scheduler.finish_requests(_name(request_id), RequestStatus.FINISHED_ABORTED)

    def grammar_ready(self, request_id: int) -> None:
        request = self.scheduler.requests.get(_name(request_id))
        if request is not None and request.structured_output_request is not None:
            request.structured_output_request._grammar.set_result(_Anything())

    def schedule(self) -> Step:
        self.victims = []
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        cached = output.scheduled_cached_reqs
        resumed_ids = set(cached.resumed_req_ids)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, tokens in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in resumed_ids:
                computed[name] = tokens
        # model runner V2 reports resumed requests among the new ones: the request itself knows
        joined = [name for name in output.num_scheduled_tokens if name in computed]
        return Step(
            output=output,
            admitted=[int(name) for name in joined if requests[name].num_preemptions == 0],
            resumed=[int(name) for name in joined if requests[name].num_preemptions > 0],
            preempted=self.victims,
            cached_tokens={int(name): computed[name] for name in joined},
            samplers=frozenset(
                name for name in output.num_scheduled_tokens if not requests[name].is_prefill_chunk
            ),
            decode_context=sum(requests[name].num_computed_tokens for name in output.num_scheduled_tokens),
            deferred=bool(output.pending_structured_output_tokens),
        )

    def execute(self, step: Step) -> list[Any]:
        if self.copies is not None:
            return self._copy(step)
        report = self.scheduler.connector.store.step()
        step.report = KVConnectorOutput(
            finished_recving=[_name(request_id) for request_id in report["received"]],
            finished_sending=[_name(request_id) for request_id in report["sent"]],
            invalid_block_ids=set(report["invalid"]),
            **({"failed_recving": {_name(lost) for lost in report["lost"]}} if report["lost"] else {}),
        )
        return []

    def _copy(self, step: Step) -> list[Any]:
        meta = step.output.kv_connector_metadata
        loads, stores = (
            [[number, int(job.req_id), _chunks(job, reads=reads)] for number, job in jobs.items()]
            for reads, jobs in ((True, meta.load_jobs), (False, meta.store_jobs))
        )
        flush = set(meta.jobs_to_flush or ())
        self.loading.update({number: _name(request_id) for number, request_id, _ in loads})
        done = self.copies.step([job[0] for job in loads], [job[0] for job in stores], flush)
        step.report = KVConnectorOutput(
            finished_recving=[self.loading.pop(number) for number in done if number in self.loading],
            kv_connector_worker_meta=OffloadingWorkerMetadata(completed_jobs=dict.fromkeys(done, 1)),
        )
        return [loads, stores, sorted(flush)]

    def complete(self, step: Step) -> None:
        names = list(step.output.num_scheduled_tokens)
        model_output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[self._tokens(step, name) for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=step.report,
        )
        by_client = self.scheduler.update_from_output(step.output, model_output)
        outputs = [output for client in by_client.values() for output in client.outputs]
        for client in by_client.values():
            if client.scheduler_stats is not None:
                stats = client.scheduler_stats.prefix_cache_stats
                self.prefix_queries += stats.queries
                self.prefix_hits += stats.hits
                outside = client.scheduler_stats.connector_prefix_cache_stats
                if outside is not None:
                    self.external_queries += outside.queries
                    self.external_hits += outside.hits
                self._count(client.scheduler_stats.spec_decoding_stats)
        step.emitted = sum(len(output.new_token_ids) for output in outputs)
        ended = [output for output in outputs if output.finish_reason is not None]
        failed = sorted(int(o.request_id) for o in ended if o.finish_reason.name == "ERROR")  # from a set
        step.finished = [int(o.request_id) for o in ended if o.finish_reason.name != "ERROR"] + failed
        if self.speculation is not None and not self.is_async and names:
            k = getattr(step.output, "num_spec_tokens_to_schedule", self.speculation["num_tokens"])
            drafts = [[FIRST_TOKEN] * min(k, self._counts(name)[1]) for name in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def _count(self, stats: Any) -> None:
        if stats is None or self.drafts is None:
            return
        self.drafts.num_drafts += stats.num_drafts
        self.drafts.num_draft_tokens += stats.num_draft_tokens
        self.drafts.num_accepted_tokens += stats.num_accepted_tokens
        for at, count in enumerate(stats.num_accepted_tokens_per_pos):
            self.drafts.per_position[at] += count

    def _counts(self, name: str) -> tuple[int, int]:
        """Accepted and proposed drafts of a request's newest sampling step."""
        accepted, proposed = draft_counts(self.speculation, int(name))
        at = self.samplings[name] - 1
        return accepted[at % len(accepted)], proposed[at % len(proposed)]

    def _tokens(self, step: Step, name: str) -> list[int]:
        """What the model samples for a request in a step."""
        if name not in step.samplers:
            return []
        tokens = 1
        if self.speculation is not None and name in self.scheduler.requests:
            self.samplings[name] += 1
            drafts = len(step.output.scheduled_spec_decode_tokens.get(name, ()))
            tokens += min(self._counts(name)[0], drafts)
        return [self._token(name, further) for further in range(tokens)]

    def _token(self, name: str, further: int) -> int:
        """The next output token, or one ``further`` on: the stop token where the model stops, else one that
        occurs nowhere else."""
        request = self.scheduler.requests.get(name)
        if request is None:
            return FIRST_TOKEN  # aborted or stopped while in flight: vLLM throws it away
        index = int(request.num_output_tokens) + further
        if index + 1 == self.outputs[name]:
            return STOP_TOKEN
        return FIRST_TOKEN + int(name) * TOKENS_PER_REQUEST + TOKENS_PER_REQUEST // 2 + index

    @property
    def has_requests(self) -> bool:
        return bool(self.scheduler.has_requests())

    @property
    def running(self) -> list[int]:
        return [int(request.request_id) for request in self.scheduler.running]

    @property
    def waiting(self) -> list[int]:
        beside = ("kv_holding_waiting", "skipped_waiting")
        queues = [getattr(self.scheduler, name, ()) for name in (*beside, "waiting")]
        return [int(request.request_id) for queue in queues for request in queue]

    @property
    def encoder(self) -> SimpleNamespace | None:
        cache = self.scheduler.encoder_cache_manager
        if not self.encodes:
            return None
        order, cached = ([int(name) for name in names] for names in (cache.freeable, cache.cached))
        return SimpleNamespace(state=[cache.num_free_slots, cache.num_freeable_slots, order, sorted(cached)])

    @property
    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def free_list(self, limit: int) -> list[int]:
        queue = self.pool.free_block_queue
        block = queue.fake_free_list_head.next_free_block
        head: list[int] = []
        while block is not queue.fake_free_list_tail and len(head) < limit:
            head.append(block.block_id)
            block = block.next_free_block
        return head

    @property
    def cached_blocks(self) -> int:
        return len(self.pool.cached_block_hash_to_block)

    def block_ids(self, request_id: int) -> list[Any]:
        groups = [list(ids) for ids in self.kv.get_block_ids(_name(request_id))]
        return groups if self.grouped else groups[0]


class _Anything(StructuredOutputGrammar):  # type: ignore[misc]
    """A grammar that any token follows."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


_Anything.__abstractmethods__ = frozenset()  # what else a grammar can, the scheduler does not ask for


def _chunks(job: Any, *, reads: bool) -> int:
    """Chunks that a transfer of native offloading moves."""
    ends = job.transfer_spec if hasattr(job, "transfer_spec") else (job.src_spec, job.dst_spec)
    host = ends[not reads]
    return len(host.chunk_ids if hasattr(host, "chunk_ids") else host.block_ids)


def _await_grammar(request: Request) -> None:
    """As if a grammar were compiled for it in the background."""
    params = StructuredOutputsParams(regex="a*")
    request.sampling_params.structured_outputs = params
    names = StructuredOutputRequest.__dataclass_fields__
    request.structured_output_request = StructuredOutputRequest(
        **{"params": params} if "params" in names else {"sampling_params": request.sampling_params}
    )
    request.structured_output_request._grammar = Future()
    request.status = next(
        status for status in RequestStatus if "GRAMMAR" in status.name or "FSM" in status.name
    )


def _feature(
    content: int, offset: int, length: int, lead: int, tail: int, between: int, *_: int
) -> MultiModalFeatureSpec:
    mask = torch.ones(length, dtype=torch.bool)
    mask[:lead] = mask[length - tail :] = False
    mask[lead + 1 : lead + 1 + between] = False
    place = PlaceholderRange(offset, length, None if bool(mask.all()) else mask)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=str(content), mm_position=place)


def _lora(adapter: int) -> LoRARequest | None:
    if not adapter:
        return None
    return LoRARequest(lora_name=f"adapter{adapter}", lora_int_id=adapter, lora_path="/nowhere")


def _spec(group: dict[str, Any]) -> KVCacheSpec:
    """What one layer of a group keeps; sizes are arbitrary, for nothing is stored."""
    block_size = group["block_size"]
    attention = {
        "block_size": block_size,
        "num_kv_heads": 4,
        "head_size": 32,
        "dtype": torch.bfloat16,
    }
    if group["kind"] == "full":
        return FullAttentionSpec(**attention)
    if group["kind"] == "sliding":
        return SlidingWindowSpec(**attention, sliding_window=group["window"])
    if group["kind"] == "chunked":
        return ChunkedLocalAttentionSpec(**attention, attention_chunk_size=group["window"])
    options: dict[str, Any] = {}
    if group["checkpoint"]:
        options = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": group["checkpoint"]}
    return MambaSpec(
        block_size=block_size,
        shapes=((8, 8),),
        dtypes=(torch.float32,),
        page_size_padded=4096 * block_size,
        mamba_cache_mode=group["mode"],
        num_speculative_blocks=group["drafts"],
        **options,
    )


def _drafts_at(config: dict[str, Any], group: dict[str, Any]) -> dict[str, bool]:
    """Whether the drafter's layers are in a group, where vLLM knows."""
    kinds = (config["speculation"] or {}).get("drafter_kinds")
    return {"is_eagle_group": group["kind"] in kinds} if kinds else {}


def _hash_block(config: dict[str, Any], groups: list[dict[str, Any]]) -> int:
    """Tokens a hash (resolve_kv_cache_block_sizes)."""
    sizes = [group["block_size"] for group in groups]
    states = any(group["kind"] == "mamba" and group["mode"] != "align" for group in groups)
    if len(groups) == 1 or states or not config["enable_prefix_caching"]:
        return math.lcm(*sizes)
    return math.gcd(*sizes)


def _block_sizes(block_size: int, hash_block: int) -> dict[str, int]:
    known = inspect.signature(Scheduler).parameters
    return {"block_size": block_size} | (
        {"hash_block_size": hash_block} if "hash_block_size" in known else {}
    )


def _tensors(
    config: dict[str, Any], groups: list[dict[str, Any]], remote: dict[str, Any] | None
) -> list[KVCacheTensor]:
    """Older releases take the bytes of a block, of which host memory has so many, from the tensors."""
    if (
        remote is None
        or not remote["offload"]
        or "shared_by" not in inspect.signature(KVCacheTensor).parameters
    ):
        return []
    size = 2 * 4 * 32 * 2 * groups[0]["block_size"] * config["num_gpu_blocks"]
    return [KVCacheTensor(size=size, shared_by=[f"layer{i}" for i in range(len(groups))])]


def _retention(config: dict[str, Any]) -> dict[str, Any]:
    """The retention interval: older releases read it from the environment, and from some groups only."""
    interval = config["prefix_cache_retention_interval"]
    os.environ.pop("VLLM_PREFIX_CACHE_RETENTION_INTERVAL", None)
    if "prefix_cache_retention_interval" in inspect.signature(KVCacheConfig).parameters:
        return {"prefix_cache_retention_interval": interval}
    if interval is not None:
        os.environ["VLLM_PREFIX_CACHE_RETENTION_INTERVAL"] = str(interval)
    return {}


def _vllm_config(config: dict[str, Any], model: str, remote: dict[str, Any] | None = None) -> VllmConfig:
    options = {
        "max_num_seqs": config["max_num_seqs"],
        "max_num_batched_tokens": config["max_num_batched_tokens"],
        "max_model_len": config["max_model_len"],
        "enable_chunked_prefill": config["enable_chunked_prefill"],
        "is_encoder_decoder": False,
        "policy": config["scheduling_policy"],
        "async_scheduling": config["async_scheduling"],
    }
    known = inspect.signature(SchedulerConfig).parameters
    for name, off in (
        ("long_prefill_token_threshold", 0),
        ("long_prefill_token_threshold_adaptive", False),
        ("scheduler_reserve_full_isl", None),
        ("watermark", 0.0),
        ("max_num_active_seqs", None),
        ("prefill_schedule_interval", 1),
    ):
        if name in known:
            options[name] = config[name]
        elif config[name] != off:
            raise ValueError(f"vLLM {vllm.__version__} has no {name}")
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=model,
            tokenizer=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=config["max_model_len"],
            seed=0,
        ),
        scheduler_config=SchedulerConfig(**options),
        cache_config=CacheConfig(
            block_size=config["block_size"], enable_prefix_caching=config["enable_prefix_caching"]
        ),
        parallel_config=ParallelConfig(),
        **_connector(remote, config["block_size"]),
        device_config=DeviceConfig("cpu"),
    )
    vllm_config.cache_config.num_gpu_blocks = config["num_gpu_blocks"]
    # the CPU platform turns async scheduling off and chooses its own block size
    vllm_config.cache_config.block_size = config["block_size"]
    states = [group for group in config["kv_groups"] if group["kind"] == "mamba"]
    if states:
        vllm_config.cache_config.mamba_cache_mode = states[0]["mode"]
        vllm_config.cache_config.mamba_block_size = states[0]["block_size"]
    register = getattr(single_type_kv_cache_manager, "register_all_kvcache_specs", None)
    if register is not None:
        register(vllm_config)
    for name in options.keys() - {"max_model_len", "is_encoder_decoder"}:
        setattr(vllm_config.scheduler_config, name, options[name])
    if config.get("speculation") is not None:
        _speculate(vllm_config, config["speculation"])
    return vllm_config


def _offloading(asked: dict[str, Any], block_size: int) -> KVTransferConfig:
    chunk = 2 * 4 * 32 * 2 * block_size * asked["blocks_per_chunk"]  # bytes, as in ``_spec``
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "cpu_bytes_to_use": asked["chunks"] * -(-chunk // PAGE) * PAGE,
            "block_size": block_size * asked["blocks_per_chunk"],
            "eviction_policy": asked["policy"],
            "store_threshold": asked["store_threshold"],
            "offload_prompt_only": asked["prompt_only"],
        },
    )


def _connector(remote: dict[str, Any] | None, block_size: int) -> dict[str, Any]:
    if remote is None:
        return {}
    if remote["offload"]:
        return {"kv_transfer_config": _offloading(remote["offload"], block_size)}
    connector = KVTransferConfig(
        kv_connector="FakeConnector",
        kv_connector_module_path="vllm_connector",
        kv_role=remote["role"],
        kv_load_failure_policy=remote["policy"],
        kv_connector_extra_config={"plans": remote["plans"]},
    )
    return {"kv_transfer_config": connector}


def _speculate(vllm_config: VllmConfig, asked: dict[str, Any]) -> None:
    """The scheduler asks a method's properties only: an n-gram drafter, which needs no model, is renamed."""
    speculative = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=asked["num_tokens"],
        prompt_lookup_max=2,
        prompt_lookup_min=1,
        target_model_config=vllm_config.model_config,
        target_parallel_config=vllm_config.parallel_config,
    )
    speculative.method = asked["method"]
    if asked["method"] in ("dflash", "dspark"):
        speculative.parallel_drafting = True
    layers = max(1, asked["prompt_lookahead"])
    drafter = SimpleNamespace(hf_config=SimpleNamespace(num_nextn_predict_layers=layers), architectures=())
    speculative.draft_model_config = drafter
    if asked["by_batch"]:
        firsts = [*(first for first, _ in asked["by_batch"]), 1 << 20]
        speculative.num_speculative_tokens_per_batch_size = [
            (first, following - 1, most)
            for (first, most), following in zip(asked["by_batch"], firsts[1:], strict=True)
        ]
    takes_hidden_states = asked["lookahead"] and asked["method"] != "draft_model"
    if takes_hidden_states and not (asked["drops_block"] or asked["hash_lookahead"]):
        speculative.disable_eagle_block_drop = True
    vllm_config.speculative_config = speculative
    vllm_config._set_max_num_scheduled_tokens()


def _name(request_id: int) -> str:
    return f"{request_id:09d}"  # vLLM breaks ties of priority and arrival by the id as a string


def _prompt(request: dict[str, Any]) -> list[int]:
    """Token ids: equal where the shared parts are, and nowhere else."""
    tokens: list[int] = []
    ids: list[int] = []
    for content_id, end in request["content"]:
        ids.append(content_id)
        part = random.Random(repr(ids))
        tokens += [-1 - part.getrandbits(30) for _ in range(end - len(tokens))]
    private = FIRST_TOKEN + request["request_id"] * TOKENS_PER_REQUEST
    return tokens + list(range(private + len(tokens), private + request["prompt_tokens"]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints shall not end up between the answers
    print(json.dumps({"vllm": vllm.__version__}), file=answers)
    with tempfile.TemporaryDirectory() as model:
        Path(model, "config.json").write_text(json.dumps(MODEL))
        for line in sys.stdin:
            scenario = json.loads(line)
            made: list[dict[str, Any]] = []
            try:
                made.extend(decisions(VllmEngine(scenario["config"], model, scenario["remote"]), scenario))
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                made.append({"raised": f"{type(error).__name__}: {error} ({at.name}: {at.line})"})
            print(json.dumps(made, separators=(",", ":")), file=answers)


if __name__ == "__main__":
    main()
