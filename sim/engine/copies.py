"""The copies of the OffloadingConnector, over the links between a GPU and its host."""

from __future__ import annotations

from servecast.sim.engine.connector import NEVER
from servecast.sim.engine.offloading import Job, Jobs
from servecast.sim.engine.pipe import Pipe
from servecast.sim.inputs.units import PICOSECONDS


class LinkedCopies:
    """See ``Copies``. Stores begin with the step after theirs (OffloadingConnectorWorker.prepare_store_kv);
    a step waits for those that are flushed.

    Args:
        to_gpu, to_host: each way. block_bytes: of a GPU block, on one rank.

    Attributes:
        loaded_blocks: so far.
    """

    def __init__(self, to_gpu: Pipe, to_host: Pipe, block_bytes: int) -> None:
        self.to_gpu, self.to_host, self.block_bytes = to_gpu, to_host, block_bytes
        self.loaded_blocks = 0
        self._planned: list[Job] = []
        self._ends: dict[int, tuple[int, Job]] = {}

    def start(self, jobs: Jobs, now: int) -> float:
        flushed = [job for job in jobs.stores if job.number in jobs.flush]
        for job in [*self._planned, *flushed, *jobs.loads]:
            link = self.to_host if job.stores else self.to_gpu
            self._ends[job.number] = link.send(len(job.blocks) * self.block_bytes, now), job
        self.loaded_blocks += sum(len(job.blocks) for job in jobs.loads)
        self._planned = [job for job in jobs.stores if job.number not in jobs.flush]
        awaited = [number for number in jobs.flush if number in self._ends]
        wait = max((self._ends[number][0] for number in awaited), default=now)
        for number in awaited:  # the host has waited for them
            self._ends[number] = now, self._ends[number][1]
        return max(0, wait - now) / PICOSECONDS

    def finished(self, now: int) -> list[Job]:
        done = [number for number, (end, _) in self._ends.items() if end <= now]
        return [self._ends.pop(number)[1] for number in done]

    def next_event(self, now: int) -> int:
        if self._planned:
            return now + 1  # they begin with the next step
        return min((end for end, _ in self._ends.values()), default=NEVER)
