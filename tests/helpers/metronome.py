"""A vLLM worker that computes nothing and keeps time: each step lasts what a known law says of its batch.

    METRONOME_LAW='{"law": ...}' PYTHONPATH=tests vllm serve ... --worker-cls metronome.MetronomeWorker

All else is vLLM: HTTP server, scheduler, engine loop, KV blocks, sampler. The model's weights are never
used, so any config.json will do; its logits are those of zeros, or with METRONOME_TEXT=1 of a text that
repeats itself in part, so that some of the drafts that are looked up are accepted. A step that follows
another directly lasts from that one's end to its own, the engine's own work included, and makes up for a late
wake-up of the one before; one that finds the engine idle lasts from when it reaches the worker. An engine
that has run empty tells its worker so by a step without tokens. With METRONOME_LATE each process appends to a
file of its own in that folder when a step ended, and how much later than its law says, in s.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from metronome_law import Law
from vllm.v1.worker.cpu_worker import CPUWorker

DIRECTLY_S = 0.008  # the engine's own work between two steps takes less
LATE_S = 0.002  # what a step makes up for, at most


class MetronomeWorker(CPUWorker):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._law = Law(os.environ["METRONOME_LAW"])
        self._prompts: dict[str, int] = {}
        self._end = self._deadline = 0.0
        self._ran_empty = False
        folder = os.environ.get("METRONOME_LATE")
        self._late = Path(folder, str(os.getpid())) if folder else None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        config = self.model_config
        width, dtype = config.get_hidden_size(), config.dtype

        def nothing(input_ids: torch.Tensor, positions: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            hidden = torch.zeros(input_ids.shape[0], width, dtype=dtype)
            hidden[:, 0] = text_at(positions + 1).to(dtype)
            return hidden

        self.model_runner.model.forward = nothing
        if os.environ.get("METRONOME_TEXT"):
            vocabulary = config.get_vocab_size()

            def sure(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
                logits = torch.zeros(hidden.shape[0], vocabulary, dtype=torch.float32)
                return logits.scatter_(1, hidden[:, :1].long(), 100.0)

            self.model_runner.model.compute_logits = sure

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            now = time.monotonic()
            running = bool(scheduler_output.scheduled_cached_reqs.req_ids)
            directly = running or (now - self._end < DIRECTLY_S and not self._ran_empty)
            begin = max(self._deadline, self._end - LATE_S) if directly else now
            self._deadline = begin + self._seconds(scheduler_output)
        self._ran_empty = not scheduler_output.total_num_scheduled_tokens
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        time.sleep(max(0.0, self._deadline - time.monotonic()))
        self._end = time.monotonic()
        if self._late:
            with self._late.open("a") as file:
                file.write(f"{self._end} {self._end - self._deadline}\n")
        return output

    def _seconds(self, output: Any) -> float:
        for name in output.finished_req_ids:
            self._prompts.pop(name, None)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        self._prompts.update((new.req_id, len(new.prompt_token_ids)) for new in output.scheduled_new_reqs)
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        chunks, decodes, drafts, decode_context = [], 0, 0, 0
        for name, tokens in output.num_scheduled_tokens.items():
            if computed[name] < self._prompts[name]:
                chunks.append((tokens, computed[name]))
            else:
                decodes += 1
                drafts += tokens - 1
                decode_context += computed[name] + tokens
        return self._law.seconds(chunks, decodes, decode_context, drafts)


def text_at(positions: torch.Tensor) -> torch.Tensor:
    """The token at each position, below 128: seven that come round, but for two in five groups of four that
    are as if drawn."""
    drawn = (positions * 2654435761 % (1 << 32)) >> 9
    groups = (positions // 4 * 2246822519 % (1 << 32)) >> 11
    return torch.where(groups % 5 < 2, 20 + drawn % 100, 10 + positions % 7)
