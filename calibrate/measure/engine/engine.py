"""vLLM's engine core in this process, made to run steps of a wanted composition."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.request import Request

from ..errors import MeasureError
from .grid import STEPS_AHEAD, Case, Limits
from .step_schedulers import recording
from .steps import Step

COLD = 2  # first steps of a composition, which compile and warm up


class Engine:
    """A model's engine core with dummy weights, driven as vLLM's own engine process drives it.

    There is no API server, tokenizer or client: requests are handed to the scheduler. **A request's context
    is not computed, it is declared**: the request joins with that many tokens marked as computed, as one
    does whose KV came from another machine, and gets blocks of its own for all of them. The whole KV cache
    is filled with random values once, so that what attention reads is neither zero nor shared; values do
    not change what it costs. Long runs compute everything they use, so they show whether that holds.

    Args:
        model: folder with a ``config.json``. flags: of ``vllm serve``; prefix caching is always off.

    Attributes:
        flags: how vLLM resolved them. limits: what the engine can do. config: the model's config.json.

    Raises:
        MeasureError: vLLM refuses the flags or the model.
    """

    def __init__(self, model: Path, flags: Sequence[str] = ()) -> None:
        self._core, settings = _start(model, flags)
        scheduler, cache = settings.scheduler_config, settings.cache_config
        self._scheduler = self._core.scheduler
        filled = self._core.collective_rpc(fill_kv_cache)
        block_size = int(cache.block_size)
        blocks = int(self._scheduler.kv_cache_config.num_blocks)
        self.limits = Limits(
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=self._scheduler.max_num_scheduled_tokens,
            max_model_len=self._scheduler.max_model_len,
            kv_tokens=(blocks - 1) * block_size,
            block_size=block_size,
        )
        self.flags = _resolved(settings) | {"num_gpu_blocks": blocks, "kv_cache_filled": all(filled)}
        self._vocab_size = settings.model_config.get_vocab_size()
        self._rng = random.Random(0)
        self._numbers = 0

    def measure(
        self, case: Case, *, steps: int, least: int, seconds: float = math.inf, until: float = math.inf
    ) -> list[Step]:
        """Run a case and return its steps, without the first two, which are cold.

        Except for a long run only steps of exactly the case's composition are returned, with contexts that
        grow by one a step. As many as ``steps``; fewer, but ``least``, once they took ``seconds``; and
        whatever there is when ``time.monotonic()`` passes ``until``.
        """
        prompts = self._long_run(case) if case.traffic else self._compose(case, steps + COLD)
        begin = time.monotonic()
        before = 1 + COLD  # steps that do not count: one admits the decodes
        while self._scheduler.has_requests() and self._scheduler.recorded < before + steps:
            self._step()
            now = time.monotonic()
            enough = self._scheduler.recorded >= before + least and now - begin > seconds
            if enough or now > until:
                break
        self._empty(prompts)
        found = [step for step in self._scheduler.take(prompts) if step.seconds is not None]
        if not case.traffic:
            parts = len(case.contexts), case.chunks
            found = [step for step in found if (step.decodes, step.chunks) == parts]
        return found[COLD:]

    def _compose(self, case: Case, steps: int) -> dict[str, int]:
        """Add the requests whose next steps all have the case's composition; request id -> prompt tokens.

        The decodes are admitted by a step of their own, with one token of prompt left each. The scheduler's
        token budget is then set so that each step has room for the decodes and one round of chunks.
        """
        prompts: dict[str, int] = {}
        for context in case.contexts:
            prompts |= self._add(context + 1, context, output=max(STEPS_AHEAD, steps) + 2)
        if prompts:
            self._scheduler.max_num_scheduled_tokens = self.limits.max_num_batched_tokens
            self._step()
        if case.chunks:
            tokens = sum(tokens for tokens, _ in case.chunks)
            self._scheduler.max_num_scheduled_tokens = len(case.contexts) + tokens
            for _ in range(steps + 2):
                for tokens, context in case.chunks:
                    prompts |= self._add(context + tokens, context, output=1)
        return prompts

    def _long_run(self, case: Case) -> dict[str, int]:
        self._scheduler.max_num_scheduled_tokens = self.limits.max_num_batched_tokens
        self._limit_running(case.running)
        prompts: dict[str, int] = {}
        for prompt, output in case.traffic:
            prompts |= self._add(prompt, 0, output=output)
        return prompts

    def _limit_running(self, requests: int) -> None:
        for name in ("max_num_running_reqs", "max_num_active_reqs"):  # admission has its own limit in 0.32
            if hasattr(self._scheduler, name):
                setattr(self._scheduler, name, requests)

    def _add(self, prompt: int, computed: int, *, output: int) -> dict[str, int]:
        self._numbers += 1
        name = f"measured-{self._numbers}"
        request = Request(
            request_id=name,
            prompt_token_ids=self._rng.choices(range(self._vocab_size), k=prompt),
            # as vllm serve samples by default; end-of-sequence tokens do not end it
            sampling_params=SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True),
            pooling_params=None,
            arrival_time=float(self._numbers),
        )
        request.num_computed_tokens = computed
        self._core.add_request(request)
        return {name: prompt}

    def _step(self) -> None:
        """One turn of the loop of vLLM's engine process (EngineCoreProc._process_engine_step)."""
        _, executed = self._core.step_fn()
        self._core.post_step(executed)

    def _empty(self, names: dict[str, int]) -> None:
        """Abort what runs and wait until nothing is in flight."""
        self._core.abort_requests(list(names))
        while self._scheduler.has_requests() or self._core.batch_queue:
            self._step()
        self._limit_running(self.limits.max_num_seqs)

    def close(self) -> None:
        self._core.shutdown()


def _start(model: Path, flags: Sequence[str]) -> tuple[Any, Any]:
    """The engine core and its VllmConfig, with a recording scheduler."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm's flags", add_help=False))
    fixed = ("--model", str(model), "--load-format", "dummy", "--skip-tokenizer-init")
    parsed = parser.parse_args([*flags, *fixed, "--no-enable-prefix-caching"])
    try:
        # the defaults of batch sizes are those of a server, not of offline use
        settings = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)
        # set on the resolved configuration, where it is known whether scheduling is async
        settings.scheduler_config.scheduler_cls = recording(
            async_scheduling=settings.scheduler_config.async_scheduling
        )
        core = EngineCore(settings, Executor.get_class(settings), log_stats=True)
    except Exception as error:  # whatever vLLM raises, the user has to see what it said
        raise MeasureError(
            f"vLLM does not start: {type(error).__name__}: {error}",
            f"model {model}",
            "Correct the flags or the config.json, or free memory.",
        ) from error
    return core, settings


def fill_kv_cache(worker: Any) -> bool:
    """Fill a worker's KV cache with random values; whether it has one. Runs in the worker's process."""
    caches = getattr(worker.model_runner, "kv_caches", None) or []
    for cache in caches:
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            if tensor.is_floating_point() and tensor.element_size() > 1:
                tensor.normal_()
            else:
                tensor.view(torch.uint8).random_(0, 0x70)  # bytes that are a number in every fp8 format
    return bool(caches)


def _resolved(settings: Any) -> dict[str, Any]:
    """The flags that decide what a step costs, as vLLM resolved them."""
    scheduler, cache, parallel = settings.scheduler_config, settings.cache_config, settings.parallel_config
    compilation = settings.compilation_config
    mode = getattr(getattr(compilation, "cudagraph_mode", None), "name", "NONE")
    return {
        "version": vllm.__version__.split("+")[0],
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": settings.model_config.max_model_len,
        "block_size": cache.block_size,
        "async_scheduling": bool(scheduler.async_scheduling),
        "enforce_eager": bool(settings.model_config.enforce_eager),
        "cudagraph_mode": mode,
        "cudagraph_capture_sizes": [] if mode == "NONE" else list(compilation.cudagraph_capture_sizes or []),
        "kv_cache_dtype": str(cache.cache_dtype),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "executor": str(parallel.distributed_executor_backend),
        "dtype": str(settings.model_config.dtype).removeprefix("torch."),
        "quantization": settings.model_config.quantization,
        "temperature": 1.0,
    }
