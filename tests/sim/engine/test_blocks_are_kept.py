"""Blocks are conserved under loads, failures, aborts and late frees: whatever a connector does, each block is
free or held by a request that the engine still knows, and in the end all are free."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servecast.sim.engine.scheduler import Scheduler
from servecast.validate.parity.remote import Connected, draw_offloading, draw_remote


def held(engine: Connected) -> set[int]:
    sequences = [*engine.running, *engine.waiting]
    return {*engine.kept_blocks, *(block for i in sequences for block in engine.block_ids(i))}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(["0.23", "0.24", "0.30", "0.32", "0.33"]), st.booleans())
def test_no_block_is_lost_or_given_twice(data: st.DataObject, version: str, offloads: bool) -> None:
    """Drawn scenarios, driven in order; an abort comes at a step of its own."""
    rng = data.draw(st.randoms(use_true_random=False))
    draw = draw_offloading if offloads and version >= "0.30" else draw_remote
    scenario = draw(rng.randint, version, "drawn")
    assert scenario.remote is not None
    engine: Any = Connected(Scheduler, scenario.config, scenario.remote, trace=False)
    usable = scenario.config.num_gpu_blocks - 1
    arrivals, flying = list(scenario.arrivals), []
    for step in range(400):
        while arrivals and arrivals[0].step <= step:
            arrival = arrivals.pop(0)
            engine.add(arrival.request, arrival.arrival)
        if rng.random() < 0.03 and (known := [*engine.running, *engine.waiting]):
            engine.abort(rng.choice(known))
        if not engine.has_requests and not flying:
            if not arrivals:
                break
            continue
        made = engine.schedule()
        engine.execute(made)
        flying.append(made)
        if len(flying) == 1 + scenario.config.async_scheduling:
            engine.complete(flying.pop(0))
        blocks = held(engine)
        assert engine.free_blocks == usable - len(blocks)
        assert not blocks & set(engine.free_list(usable))
    else:
        return
    assert engine.free_blocks == usable
