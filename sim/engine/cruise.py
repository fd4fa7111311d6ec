"""The running sequences that decode one token a step: counted, not visited.

Nothing in a cruising sequence changes from step to step, so all that is kept is when it next needs a
block, when it gets its last token, and when the scheduler sees that the last token is in flight. These
fall due at known ticks (numbers of ``schedule`` calls).
"""

from __future__ import annotations

from collections import defaultdict

from servecast.sim.engine.sequence import Sequence


class Cruise:
    """The cruising sequences of one engine.

    Attributes:
        count: how many there are.
    """

    __slots__ = ("_async", "_block_due", "_block_size", "_last_due", "_retire_due", "_sum_base", "count")

    def __init__(self, block_size: int, *, async_scheduling: bool) -> None:
        self.count = 0
        self._block_size = block_size
        self._async = async_scheduling
        self._sum_base = 0
        self._block_due: defaultdict[int, list[Sequence]] = defaultdict(list)
        self._last_due: defaultdict[int, list[Sequence]] = defaultdict(list)
        self._retire_due: defaultdict[int, list[Sequence]] = defaultdict(list)

    def context(self, tick: int) -> int:
        """KV tokens that they read at this tick, summed, their new ones included."""
        return self.count * (tick + 1) - self._sum_base

    def join(self, sequence: Sequence, tick: int) -> None:
        """From ``tick`` on it computes one token a step."""
        base = tick - sequence.computed
        sequence.cruising = True
        sequence.base = base
        sequence.join_tick = tick - 1
        self.count += 1
        self._sum_base += base
        last = sequence.last_tick = base + sequence.final_tokens - 2
        self._last_due[last].append(sequence)
        if self._async and sequence.stops_by_length:
            self._retire_due[last + 1].append(sequence)
        self._note_block(sequence, base + len(sequence.blocks) * self._block_size)

    def leave(self, sequence: Sequence) -> None:
        """It ends or is disturbed. What still falls due for it is ignored."""
        sequence.cruising = False
        self.count -= 1
        self._sum_base -= sequence.base

    def add_block(self, sequence: Sequence, block: int) -> None:
        """It got the block that it needed."""
        sequence.blocks.append(block)
        self._note_block(sequence, sequence.block_tick + self._block_size)

    def blocks_due(self, tick: int) -> list[Sequence]:
        """Those whose next token needs a new block."""
        return [s for s in self._block_due.pop(tick, ()) if s.cruising and s.block_tick == tick]

    def last_in_flight(self, tick: int) -> list[Sequence]:
        """Async: those whose last token is being computed, so that they get no more."""
        return [s for s in self._retire_due.pop(tick, ()) if s.cruising and s.last_tick == tick - 1]

    def ended_by(self, tick: int) -> list[Sequence]:
        """Those whose last token comes from the step of this tick."""
        return [s for s in self._last_due.pop(tick, ()) if s.cruising and s.last_tick == tick]

    def _note_block(self, sequence: Sequence, tick: int) -> None:
        sequence.block_tick = tick
        if tick <= sequence.last_tick + 1:  # async: a stop token is seen one step late
            self._block_due[tick].append(sequence)
