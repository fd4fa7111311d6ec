"""Paged continuous batching: KV comes in blocks as it is needed, so more requests fit into the memory."""

from __future__ import annotations

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.padded.batch import PaddedBatch, PaddedStep, Row
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError

ADMISSION_SHARE = 0.8  # prompts of a step may fill this share of the free blocks; the rest is for decoding


class BlockPool:
    """Counts blocks. take and give_back keep the number of a row's blocks."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = self.free = blocks
        self.block_size = block_size
        self._held: dict[int, int] = {}  # request id -> blocks

    @property
    def usage(self) -> float:
        return 1 - self.free / self.blocks

    def hold(self, request_id: int, tokens: int) -> bool:
        """Let a request have blocks for that many tokens; False if there are not enough."""
        held = self._held.get(request_id, 0)
        more = -(-tokens // self.block_size) - held
        if more > self.free:
            return False
        self.free -= max(more, 0)
        self._held[request_id] = held + max(more, 0)
        return True

    def give_back(self, request_id: int) -> None:
        self.free += self._held.pop(request_id)


class PagedBatching(PaddedBatch):
    """At most ``max_num_seqs`` rows, and in each step no more prompt tokens than 80 % of the free blocks
    hold. ``num_gpu_blocks`` counts usable blocks only: this server has no null block."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.kv: BlockPool = BlockPool(config.num_gpu_blocks, config.block_size)

    def add(self, request: Request, arrival: int) -> None:
        """See PaddedBatch. InputError also for a prompt beyond 80 % of the pool, which is never admitted."""
        if request.prompt_tokens > self._admissible(self.kv.blocks):
            raise InputError(
                f"its prompt of {request.prompt_tokens} tokens is never admitted to {self.kv.blocks} blocks",
                where=f"request {request.request_id}",
                fix="Shorten it, or raise num_gpu_blocks_override: prompts may fill 80 % of the free blocks.",
            )
        super().add(request, arrival)

    def _admissible(self, blocks: int) -> int:
        return int(blocks * self.kv.block_size * ADMISSION_SHARE)

    def _admit(self, step: PaddedStep) -> list[Row]:
        admitted: list[Row] = []
        tokens = self._admissible(self.kv.free)
        while self._queue and len(self._rows) + len(admitted) < self.config.max_num_seqs:
            if self._queue[0].prompt > tokens:
                break
            row = self._queue.popleft()
            tokens -= row.prompt
            self._hold(row, row.prompt)
            admitted.append(row)
        return admitted

    def _grow(self, row: Row) -> None:
        self._hold(row, row.tokens)

    def _hold(self, row: Row, tokens: int) -> None:
        if not self.kv.hold(row.request_id, tokens):
            raise InputError(
                f"all {self.kv.blocks} KV blocks are taken while {self.num_running} requests run",
                where=f"request {row.request_id}",
                fix="Raise num_gpu_blocks_override or lower max_num_seqs: this server then fails them all.",
            )

    def _leave(self, row: Row) -> None:
        super()._leave(row)
        self.kv.give_back(row.request_id)
