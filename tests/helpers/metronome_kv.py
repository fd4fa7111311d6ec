"""A metronome (see metronome.py) whose prompts go through vLLM's ExampleConnector: KV blocks are written to
and read from the disk by the connector itself, and a step lasts longer by what a known law says of those that
it moves.

The law has "kv_request_s" for each request that a step writes or reads, and "kv_moved_token_s" for its
tokens.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from metronome import MetronomeWorker
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context


class ConnectedWorker(MetronomeWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        width, dtype = self.model_config.get_hidden_size(), self.model_config.dtype

        def stores(input_ids: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            if has_kv_transfer_group():
                context, connector = get_forward_context(), get_kv_transfer_group()
                for name, layer in context.no_compile_layers.items():
                    if getattr(layer, "kv_cache", None) is not None and context.attn_metadata is not None:
                        connector.save_kv_layer(name, layer.kv_cache, context.attn_metadata[name])
            return torch.zeros(input_ids.shape[0], width, dtype=dtype)

        self.model_runner.model.forward = stores

    def _seconds(self, output: Any) -> float:
        law = json.loads(os.environ["METRONOME_LAW"])
        seconds = float(super()._seconds(output))
        for request in getattr(output.kv_connector_metadata, "requests", ()):
            seconds += law["kv_request_s"] + len(request.slot_mapping) * law["kv_moved_token_s"]
        return seconds
