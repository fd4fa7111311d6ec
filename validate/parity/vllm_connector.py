"""A KV connector for vLLM's scheduler that answers from a ``FakeStore``; runs under vLLM's Python."""

from __future__ import annotations

from typing import Any

import vllm.distributed.kv_transfer.kv_connector.v1.base as base
from fake_store import FakeStore  # type: ignore[import-not-found]


class FakeConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]
    """The scheduler's half; the store stands in for the workers'."""

    def __init__(self, vllm_config: Any, role: Any, *rest: Any, **options: Any) -> None:
        super().__init__(vllm_config, role, *rest, **options)
        self.store = FakeStore(vllm_config.kv_transfer_config.kv_connector_extra_config["plans"])
        self.block_size = vllm_config.cache_config.block_size

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        answer = self.store.match(
            int(request.request_id),
            request.num_prompt_tokens,
            request.num_tokens,
            num_computed_tokens,
            self.block_size,
        )
        return (None, False) if answer is None else answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        held = [list(group) for group in blocks.get_block_ids()]
        own = held if len(held) > 1 else held[0]
        self.store.allocated(int(request.request_id), own, num_external_tokens, self.block_size)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return base.KVConnectorMetadata()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        ended = request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
        return self.store.finished(int(request.request_id), ended), None

    def start_load_kv(self, *_: Any, **__: Any) -> None: ...
    def wait_for_layer_load(self, *_: Any) -> None: ...
    def save_kv_layer(self, *_: Any, **__: Any) -> None: ...
    def wait_for_save(self) -> None: ...
