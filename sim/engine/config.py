"""The engine's configuration, in the names of ``vllm serve``'s flags."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.engine.data_parallel import DataParallel
from servecast.sim.engine.kv_groups import CacheSpec
from servecast.sim.engine.speculation import Speculation


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine needs to know, all defaults filled in. Counts are tokens, blocks or requests.

    ``version`` picks the rule set of vLLM's scheduler ("0.20" to "0.33", rules.py). ``num_gpu_blocks``
    includes the null block 0, as vLLM counts it, so num_gpu_blocks - 1 are usable; it is 0 until the account
    of memory says it, which reads ``gpu_memory_utilization``. ``batch_wait_s`` is static batching's.
    ``kv_groups``: what the layers of each KV cache group keep; none is one group of full attention, with
    blocks of ``block_size``. ``prefix_cache_retention_interval`` is about groups that forget: tokens between
    what they keep for others; 0: what the prompt's end needs, None: all.
    ``data_parallel``: of a server with several engine cores, how they belong together.
    ``speculation``: how drafts are proposed and accepted; None: one token a step.
    ``max_loras``: LoRA adapters of one step, at most; 0: none are served.
    ``pipeline_parallel_size``: stages that a step passes one after the other; ``use_v2_model_runner``:
    whether vLLM's workers run Model Runner V2, which decides how asynchronous scheduling goes with stages.
    ``decode_context_parallel_size``: ranks that a sequence's KV is shared out over; a block has its tokens on
    all of them, and ``block_size`` counts those together.
    ``max_num_encoder_input_tokens``, ``encoder_cache_size``: embeddings that a step may encode, and that are
    kept; 0: requests carry text alone. ``disable_chunked_mm_input``: no chunk ends within an item.
    ``preparation_round``: requests that the API server in front of the engine prepares together, at most.
    """

    version: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_gpu_blocks: int = 0
    block_size: int = 16
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"  # or "priority"
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    watermark: float = 0.0
    max_num_active_seqs: int | None = None
    prefill_schedule_interval: int = 1
    gpu_memory_utilization: float = 1.0
    batch_wait_s: float = 0.0
    preparation_round: int = 32
    kv_groups: tuple[CacheSpec, ...] = ()
    prefix_cache_retention_interval: int | None = None
    data_parallel: DataParallel | None = None
    speculation: Speculation | None = None
    max_loras: int = 0
    pipeline_parallel_size: int = 1
    use_v2_model_runner: bool = False
    decode_context_parallel_size: int = 1
    max_num_encoder_input_tokens: int = 0
    encoder_cache_size: int = 0
    disable_chunked_mm_input: bool = False
