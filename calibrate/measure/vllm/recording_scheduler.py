"""A vLLM scheduler that writes down what it decides and when, for calibration and for replay.

    SERVECAST_RECORDING=steps.jsonl PYTHONPATH=<folder that holds this package> \
    vllm serve ... --scheduler-cls measure.vllm.recording_scheduler.Recording

(See server.recording.) Imports the standard library and vllm alone. One JSON array a line, times in ns of
CLOCK_MONOTONIC:

    ["engine", {config}]                       once
    ["received", t, n]                         request n reached the engine's process, maybe during a step
    ["add", t, n, prompt, max_tokens, priority, [block hash, ...]]   request n joins the queue
    ["abort", t, [n, ...]]
    ["schedule", t0, t1, [[n, tokens, computed before], ...], [preempted n, ...], free blocks]
    ["update", t0, t1, [[finished n, output tokens], ...], tokens delivered]
    ["cost", steps, ns]                        what recording itself took so far

Lines reach the file every quarter of a second and whenever the engine runs empty, since vLLM kills the
engine process at the end without notice.
"""

from __future__ import annotations

import json
import os
from itertools import chain
from time import monotonic_ns
from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

FLUSH_NS = 250_000_000


class RecordingScheduler(Scheduler):  # type: ignore[misc]
    """For ``--no-async-scheduling``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = open(os.environ["SERVECAST_RECORDING"], "w", buffering=1 << 20)  # noqa: SIM115
        self._numbers: dict[str, int] = {}  # request id -> number, in order of arrival
        self._known: dict[str, Any] = {}  # request id -> vLLM's request, until it ends
        self._preempted: list[int] = []
        self._steps = self._own_ns = self._flushed = 0
        self._write(["engine", self._config()])
        _stamp_requests()

    def _config(self) -> dict[str, Any]:
        scheduler, cache = self.vllm_config.scheduler_config, self.vllm_config.cache_config
        optional = ("long_prefill_token_threshold_adaptive", "watermark", "max_num_active_seqs")
        return {
            "version": vllm.__version__,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "num_gpu_blocks": self.kv_cache_config.num_blocks,
            "block_size": cache.block_size,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "enable_chunked_prefill": scheduler.enable_chunked_prefill,
            "scheduling_policy": scheduler.policy,
            "async_scheduling": scheduler.async_scheduling,
            "scheduler_reserve_full_isl": scheduler.scheduler_reserve_full_isl,
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        } | {name: getattr(scheduler, name) for name in optional if hasattr(scheduler, name)}

    def _write(self, line: list[Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def add_request(self, request: Any) -> None:
        start = monotonic_ns()
        number = self._numbers[request.request_id] = len(self._numbers)
        self._known[request.request_id] = request
        if received := getattr(request, "received_ns", None):
            self._write(["received", received, number])
        hashes = [int.from_bytes(value[:6], "big") for value in request.block_hashes]
        self._write(
            ["add", start, number, request.num_prompt_tokens, request.max_tokens, request.priority, hashes]
        )
        self._own_ns += monotonic_ns() - start
        super().add_request(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        names = [request_ids] if isinstance(request_ids, str) else request_ids
        if names is not None:
            names = list(names)
            known = [name for name in names if self._known.pop(name, None) is not None]
            if known:
                self._write(["abort", monotonic_ns(), [self._numbers[name] for name in known]])
        return super().finish_requests(names, finished_status)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._preempted.append(self._numbers[request.request_id])
        super()._preempt_request(request, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        start = monotonic_ns()
        output = super().schedule(*args, **kwargs)
        end = monotonic_ns()
        numbers, requests = self._numbers, self.requests
        scheduled = [
            [numbers[name], tokens, requests[name].num_computed_tokens - tokens]
            for name, tokens in output.num_scheduled_tokens.items()
        ]
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        self._write(["schedule", start, end, scheduled, self._preempted, free])
        self._preempted = []
        self._steps += 1
        self._own_ns += monotonic_ns() - end
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        start = monotonic_ns()
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        end = monotonic_ns()
        finished, delivered = [], 0
        for output in chain.from_iterable(client.outputs for client in by_client.values()):
            delivered += len(output.new_token_ids)
            if output.finish_reason is not None:
                request = self._known.pop(output.request_id, None)
                if request is not None:  # or it was aborted, which is written
                    finished.append([self._numbers[output.request_id], request.num_output_tokens])
        self._write(["update", start, end, finished, delivered])
        self._own_ns += monotonic_ns() - end
        if end - self._flushed > FLUSH_NS or not self.running:
            self._flushed = end
            self._write(["cost", self._steps, self._own_ns])
            self._file.flush()
        return by_client


def _stamp_requests() -> None:
    """Have requests carry when the engine's process made them, in its thread that reads the API server."""
    make = Request.from_engine_core_request.__func__
    if make.__name__ == "stamped":
        return

    def stamped(cls: Any, *args: Any, **kwargs: Any) -> Any:
        request = make(cls, *args, **kwargs)
        request.received_ns = monotonic_ns()
        return request

    Request.from_engine_core_request = classmethod(stamped)


class RecordingAsyncScheduler(RecordingScheduler, AsyncScheduler):  # type: ignore[misc]
    """For async scheduling, which vLLM turns off when the class is not an AsyncScheduler."""


class Recording(RecordingAsyncScheduler):
    """Whichever of the two fits how the server resolved its flags."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return RecordingScheduler(vllm_config, *args, **kwargs)
