"""Engines that compute their requests as the rows of one padded batch, as small servers do.

One step is one pass over the rows that decode, then one joint pass over the rows whose prompt is not yet
computed, padded to the longest of them; all tokens of a step leave at its end. Who is admitted, and when, is
the policy: a subclass says it in ``_admit``. The server is one process whose event loop stands still during a
step, so a request that arrives while steps follow each other takes two of them to get from its socket to the
queue; while nothing runs it gets there at once. Read from the public source of the ``infer`` server, whose
benchmark the infer-rtx5080 scenarios reproduce.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.request import Request
from servecast.sim.inputs.errors import InputError

TURNS = 2  # turns of the event loop from a new connection to the engine's queue: accept, read


@dataclass(slots=True)
class PaddedStep:
    """A step of a padded batch; see ``Step`` in ``servecast.sim.engine.engine``.

    Attributes:
        rows, longest: rows of the decode pass, and KV tokens that it reads for each, the new one included.
    """

    tick: int
    rows: int = 0
    longest: int = 0
    idle_s: float = 0.0
    total_tokens: int = 0
    samples: int = 0
    decodes: int = 0
    decode_context: int = 0
    drafts: int = 0
    drafters: int = 0
    draft_length: int = 0
    steady: int = 0
    emitted: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    preempted: tuple[int, ...] = ()
    cached_tokens: dict[int, int] = field(default_factory=dict)
    first_tokens: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)


class Row:
    """A request in the engine. computed: prompt tokens whose KV is there. generated: tokens delivered."""

    __slots__ = ("computed", "final", "generated", "prompt", "request_id", "token_tick")

    def __init__(self, request: Request, max_model_len: int) -> None:
        self.request_id = request.request_id
        self.prompt = request.prompt_tokens
        self.final = min(request.output_tokens, request.max_tokens, max_model_len - request.prompt_tokens)
        self.computed = self.generated = 0
        self.token_tick = -1  # of the step that delivered its newest token

    @property
    def tokens(self) -> int:
        """Prompt and delivered tokens."""
        return self.prompt + self.generated

    @property
    def done(self) -> bool:
        return self.generated >= self.final


class Pool(Protocol):
    """The KV memory of an engine."""

    @property
    def usage(self) -> float:
        """Share in use, 0 to 1."""
        ...


class PaddedBatch:
    """The rows, their steps and their tokens; without a policy.

    Args:
        config: ``max_num_seqs`` is the number of rows, ``long_prefill_token_threshold`` the prompt tokens
            that a row computes in one step where ``enable_chunked_prefill`` is set (0: all of them).
    """

    kv: Pool

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.tick = 0
        self._chunk = config.max_model_len
        if config.enable_chunked_prefill and config.long_prefill_token_threshold:
            self._chunk = config.long_prefill_token_threshold
        self._arriving: deque[tuple[int, Row]] = deque()  # (first tick at which it can be admitted, row)
        self._queue: deque[Row] = deque()
        self._rows: list[Row] = []

    # ---- the policy -------------------------------------------------------------------------------

    def _admit(self, step: PaddedStep) -> list[Row]:
        """Take from the front of ``self._queue`` the rows that join the batch in this step."""
        raise NotImplementedError

    def _grow(self, row: Row) -> None:
        """A decoding row is about to write its next token's KV."""

    def _extent(self, decoding: list[Row]) -> tuple[int, int]:
        """Rows of the decode pass, and KV tokens it reads for each: by default the longest row's."""
        return len(decoding), max(row.tokens for row in decoding)

    def _leave(self, row: Row) -> None:
        """A row has its last token, or its client has gone."""
        self._rows.remove(row)

    # ---- what can be read -------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        return bool(self._rows or self._queue or self._arriving)

    @property
    def num_running(self) -> int:
        return sum(not row.done for row in self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._arriving)

    @property
    def waiting(self) -> list[int]:
        """Request ids, next one first."""
        return [row.request_id for row in (*self._queue, *(row for _, row in self._arriving))]

    # ---- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request, arrival: int) -> None:
        """A request has arrived.

        Raises:
            InputError: it is longer than ``max_model_len``.
        """
        if request.prompt_tokens >= self.config.max_model_len:
            raise InputError(
                f"its prompt of {request.prompt_tokens} tokens leaves no room for an output",
                where=f"request {request.request_id}",
                fix=f"Shorten it below max_model_len={self.config.max_model_len}, or raise max_model_len.",
            )
        self._arriving.append((self.tick + TURNS, Row(request, self.config.max_model_len)))

    def abort(self, request_id: int) -> None:
        """Drop a request wherever it stands; an unknown or finished one is ignored."""
        for row in self._rows:
            if row.request_id == request_id and not row.done:
                row.final = row.generated
                self._leave(row)
                return
        self._queue = deque(row for row in self._queue if row.request_id != request_id)
        self._arriving = deque(entry for entry in self._arriving if entry[1].request_id != request_id)

    # ---- a step ------------------------------------------------------------------------------------

    def schedule(self) -> PaddedStep:
        """Decide the next step."""
        step = PaddedStep(self.tick)
        while self._arriving and (not self._rows or self._arriving[0][0] <= self.tick):
            self._queue.append(self._arriving.popleft()[1])
        admitted = self._admit(step)
        for row in admitted:
            step.admitted.append(row.request_id)
            step.cached_tokens[row.request_id] = 0
        self._rows += admitted
        decoding = []
        for row in self._rows:
            if row.done:
                continue
            if row.computed < row.prompt:
                tokens = min(row.prompt - row.computed, self._chunk)
                step.chunks.append((tokens, row.computed))
                step.total_tokens += tokens
                step.samples += row.computed + tokens == row.prompt
            else:
                self._grow(row)
                decoding.append(row)
                step.decode_context += row.tokens
        step.decodes = len(decoding)
        step.samples += step.decodes
        step.total_tokens += step.decodes
        if decoding:
            step.rows, step.longest = self._extent(decoding)
        self.tick += 1
        return step

    def complete(self, step: PaddedStep) -> None:
        """Deliver the tokens of a step; who has its last one leaves."""
        for row in list(self._rows):
            if row.done:
                continue
            if row.computed < row.prompt:
                row.computed = min(row.prompt, row.computed + self._chunk)
                if row.computed < row.prompt:
                    continue
                step.first_tokens.append(row.request_id)
            elif row.token_tick == step.tick - 1:
                step.steady += 1
            else:
                step.gaps.append(row.token_tick)
            row.generated += 1
            row.token_tick = step.tick
            step.emitted += 1
            if row.done:
                step.finished.append(row.request_id)
                self._leave(row)
