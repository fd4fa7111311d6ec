"""Two engine cores that share layers of experts, step by step by hand.

A core's own layers take a second a token, the shared ones another second for each token of both cores, and
nothing is padded. So a step with 4 and 1 tokens lasts max(4, 1) + 4 + 1 = 9 s on both.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.data_parallel import DataParallel
from servecast.sim.engine.engine_loop import IDLE, OUTCOMES, EngineLoop
from servecast.sim.engine.lockstep import Lockstep
from servecast.sim.engine.request import Request, Requests
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.engine.speculation import speculation
from servecast.sim.engine.step_costs import StepCosts

S = 10**12
FOREVER = 1 << 62


class Pair:
    """Two cores in lockstep."""

    def __init__(
        self,
        *,
        is_async: bool = False,
        interval: int = 4,
        first: bool = True,
        cadence: int = 1,
        budget: int = 16,
        drafts: int = 0,
        drafter_shared: bool = True,
    ) -> None:
        cores = DataParallel(
            size=2,
            local=2,
            api_servers=1,
            lockstep=True,
            sync_interval=interval,
            sync_first=first,
            prefill_schedule_interval=cadence,
        )
        config = EngineConfig(
            version="0.32",
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=64,
            num_gpu_blocks=64,
            enable_prefix_caching=False,
            async_scheduling=is_async,
            data_parallel=cores,
            speculation=speculation("0.32", "mtp", drafts, (1.0,) * drafts) if drafts else None,
        )
        numbers = dict.fromkeys(
            ("decode_s", "chunk_token_s", "chunk_s", "serial_s", "request_s", "eager_s"), 0.0
        )
        numbers |= {
            "attention": [],
            "window": 0,
            "chunked": False,
            "graphed": 0,
            "prompt_tile": 1,
            "slots": 0,
            "lora": (0.0, 0.0, 0.0),
            "least": (None, None, 1.0),
        }
        shared = (lambda tokens: (tokens, float(sum(tokens)), True),)
        self.together = Lockstep(cores, *shared, shared * 2 if drafts and drafter_shared else ())
        self.loops = []
        for index in range(2):
            plain, *passes = (
                StepCosts(numbers, float, lambda rows: 0.0, lambda tokens, requests: float(tokens))
                for _ in range(3)
            )
            lookup = {"skips": True, "infills": False, "at_once": False}
            lookup |= dict.fromkeys(("step_s", "request_s", "token_s"), 0.0)
            costs = plain.with_drafts(lookup, *passes) if drafts else plain
            loop = EngineLoop(
                Scheduler(config), index, costs, None, lambda step: 0.0, repeat(1.0), (0, 0), None
            )
            self.together.add(loop)
            self.loops.append(loop)

    def run(self, *sent: tuple[int, float, int, int]) -> np.ndarray:
        """Requests as (core, second, prompt, output): outcomes, (fields, requests), in seconds."""
        requests = [Request(i, at, prompt, out, out) for i, (_, at, prompt, out) in enumerate(sent)]
        outcomes = np.full((len(OUTCOMES), len(sent)), -1, np.int64)
        for loop in self.loops:
            loop.load(Requests.of(requests), outcomes)
            loop.tell_ends = False
        for row, (core, at, _, _) in enumerate(sent):
            self.together.advance(int(at * S))
            self.together.now = (
                max(self.together.now, int(at * S)) if not self.together.running else self.together.now
            )
            self.loops[core].inbox.append((int(at * S), row))
        assert self.together.advance(FOREVER) == IDLE
        return outcomes / S

    def log(self, core: int) -> list[tuple[float, float, int, int]]:
        """(start, duration, prompt tokens, decodes) of the core's steps, dummies left out."""
        columns = self.loops[core].step_columns
        times = columns[1:3].view(np.float64)
        return list(zip(*times.tolist(), columns[3].tolist(), columns[5].tolist(), strict=True))


def test_two_cores_with_unequal_loads_wait_for_each_other() -> None:
    """Core 0: 4 tokens of prompt and 3 of output. Core 1: 1 and 2, and then dummy steps of one token, one
    while core 0 ends, one until both agree, at the fourth step, that nobody has work.

    start  core 0       core 1       lasts
    0      4 prompt     1 prompt     4 + 5
    9      decode       decode       1 + 2
    12     decode       dummy        1 + 2
    15     dummy        dummy        1 + 2
    """
    pair = Pair()
    found = pair.run((0, 0, 4, 3), (1, 0, 1, 2))
    assert pair.log(0) == [(0, 9, 4, 0), (9, 3, 0, 1), (12, 3, 0, 1)]
    assert pair.log(1) == [(0, 9, 1, 0), (9, 3, 0, 1)]
    first, last = OUTCOMES.index("first_token"), OUTCOMES.index("finish")
    assert found[first].tolist() == [9, 9]
    assert found[last].tolist() == [15, 12]
    assert pair.together.dummies == [1, 2]
    assert pair.together.dummy_s == [3, 6]
    assert pair.together.waves == 1
    assert not pair.together.running


def test_a_prompt_of_one_core_slows_the_decodes_of_the_other() -> None:
    """Core 1 decodes alone, with dummies of core 0, 3 s a step; the step with core 0's 10 tokens takes it
    10 + 11 s."""
    pair = Pair()
    pair.run((1, 0, 1, 5), (0, 4, 10, 1))
    assert [row[:2] for row in pair.log(1)] == [(0, 3), (3, 3), (6, 21), (27, 3), (30, 3)]
    assert pair.log(0) == [(6, 21, 10, 0)]


def test_requests_wait_for_dummy_steps_that_go_on_until_the_cores_agree() -> None:
    """One step of work (3 s); releases until 0.29 look every 32nd step, so that 31 dummy steps follow. What
    comes at 4 s starts with the third step, at 6 s, and the wave ends with step 32, after 96 s."""
    pair = Pair(interval=32, first=False)
    found = pair.run((0, 0, 1, 1), (0, 4, 1, 1))
    assert found[OUTCOMES.index("scheduled")].tolist() == [0, 6]
    assert pair.together.dummies == [30, 32]
    assert pair.together.now == 96 * S


def test_async_cores_decide_a_step_while_the_one_before_runs() -> None:
    """As one async engine: what arrives at 1 s in step 0 (0-3 s) is in step 2, since step 1 was decided at
    0 s."""
    pair = Pair(is_async=True)
    found = pair.run((0, 0, 1, 4), (1, 1, 1, 1))
    assert found[OUTCOMES.index("scheduled")].tolist() == [0, 6]


@pytest.mark.parametrize(("cadence", "starts"), [(1, 3), (4, 12)])
def test_prompts_start_in_common_steps_of_a_cadence(cadence: int, starts: int) -> None:
    """``--prefill-schedule-interval 4``: core 0 decodes from step 1 on, 3 s a step; its second request comes
    at 1 s and waits for step 4, at 12 s."""
    pair = Pair(cadence=cadence, interval=16)
    found = pair.run((0, 0, 1, 9), (0, 1, 2, 1))
    assert found[OUTCOMES.index("scheduled")].tolist() == [0, starts]


def test_cores_draft_together() -> None:
    """Core 0: 4 tokens of prompt and 5 of output, two drafts a step, all accepted. A dummy step of core 1
    verifies two drafts as well, and both cores run the drafter's two passes, whose layers they share: over
    the tokens of the step, and over one of each request, a dummy's too.

    start  tokens    step         first pass   second pass
    0      4 and 3   4 + (4 + 3)  4 + (4 + 3)  1 + (1 + 1)
    25     3 and 3   3 + (3 + 3)  3 + (3 + 3)  1 + (1 + 1)
    46     3 and 3   ...
    """
    pair = Pair(drafts=2)
    found = pair.run((0, 0, 4, 5))
    assert [row[:2] for row in pair.log(0)] == [(0, 25), (25, 21), (46, 21)]
    assert found[OUTCOMES.index("finish")].tolist() == [67]


def test_a_drafter_of_its_own_is_waited_for_by_all() -> None:
    """Its layers have no experts, so that no core waits inside them: one without requests drafts nothing, and
    a step lasts as long as the longest of all drafting takes: 4 s and 1 s behind 11 s of both cores."""
    pair = Pair(drafts=2, drafter_shared=False)
    pair.run((0, 0, 4, 5))
    assert [row[:2] for row in pair.log(0)] == [(0, 11 + 4 + 1), (16, 9 + 3 + 1), (29, 9 + 3 + 1)]
