"""Sessions: what is sent when, what of the history is cached, and what becomes of one whose request fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_fleet import OneSecondSteps, config, times

from servecast.sim.engine.request import Stage
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.fleet.spec import Life
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.turns import session_summary
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS, RoundRobin, Router
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.sessions import SessionRequest
from servecast.sim.traffic.spec import StreamSpec


def drawn(sessions: dict[str, Any], **fields: Any) -> list[Stage]:
    """Sessions that come every 100 s, of turns of 20 tokens and 12 more as output, behind 32 of a system."""
    stream: dict[str, Any] = {
        "arrivals": {"kind": "timestamps", "times_s": [0.0, 100.0]},
        "prompt_tokens": 20,
        "output_tokens": 12,
        "system_prompt_tokens": 32,
        "sessions": sessions,
        **fields,
    }
    return draw(expand(parse(StreamSpec, stream, source="test"), None), 0)


def served(stages: list[Stage], *, lives: list[Life] | None = None, router: Router | None = None) -> Run:
    """By replicas whose steps last a second and hold 64 new tokens."""
    free, rng = FrontEndCosts(), np.random.default_rng(0)

    def replica(index: int, client: Client) -> Replica:
        law, ones = OneSecondSteps(), iter(lambda: 1.0, None)
        engine = Scheduler(config(max_model_len=512, num_gpu_blocks=401))
        return Replica(index, engine, law, ones, free, rng, client)

    fleet = Fleet(replica, lives or 1, router or RoundRobin(), Client(free), rng, detection_s=0.5)
    run = fleet.run(stages)
    requests = [each for stage in stages for stream in stage.streams for each in stream.requests]
    known = {each.request_id: each.turn for each in requests if isinstance(each, SessionRequest)}
    run.requests["turn"] = run.requests["request_id"].map(known)
    run.meta["unsent"] = fleet.unsent
    return run


def test_history_is_cached_as_full_blocks_of_prompts_and_of_generated_tokens() -> None:
    """Blocks of 16; the last token that a turn generates is never computed, so of 64 tokens 63 are.

    turn  prompt                 ends with  computed  full blocks of it, found by the next turn
    1     32 + 20 = 52           64         63        3 = 48
    2     64 + 20 = 84           96         95        5 = 80
    3     96 + 20 = 116

    The second session finds the system's 32 tokens, and then its own history.
    """
    run = served(drawn({"turns": 3, "think_s": 3}))
    assert run.requests["prompt_tokens"].tolist() == [52, 84, 116] * 2
    assert run.requests["cached_tokens"].tolist() == [0, 48, 80, 32, 48, 80]


def test_a_turn_waits_for_the_answer_before_and_then_thinks() -> None:
    run = served(drawn({"turns": 3, "think_s": 3}))
    # 52 tokens in the first step, then a token a second: 12 s; 84 - 48 and 116 - 80 fit one step, too
    assert times(run, "arrival") == [0, 15, 30, 100, 115, 130]
    assert times(run, "finish") == [12, 27, 42, 112, 127, 142]
    found = session_summary(run, (95,))
    assert found is not None
    assert (found["sessions"], found["mean_turns"], found["median_session_s"]) == (2, 3, 42)
    assert found["served_share"] == pytest.approx(36 / 42)
    assert [row["mean_prompt_tokens"] for row in found["turns"]] == [52, 84, 116]
    hits = [row["prefix_cache_hit_rate"] for row in found["turns"]]
    assert hits == [32 / 104, 96 / 168, 160 / 232]
    assert [row["median_turn_s"] for row in found["turns"]] == [12, 12, 12]


def test_a_slow_answer_delays_the_turns_behind_it() -> None:
    together = drawn({"turns": 2, "think_s": 3}, arrivals={"kind": "timestamps", "times_s": [0.0, 0.0]})
    run = served(together)
    by_session = run.requests.sort_values("request_id")
    # both first prompts need 52 of 64 tokens a step: the second ends a step later, and so all behind it
    assert times(Run(by_session, run.steps, run.itl), "finish") == [12, 27, 13, 28]


def test_tools_and_agents_in_parallel_come_between_the_requests_of_a_turn() -> None:
    """A call (0 to 4 s, of 4 tokens) starts two agents of 8 + 10 tokens, who call a tool (4 s, 2 s of tool, 6
    tokens) and answer in 12 s, together; then the turn goes on with both answers, 24 tokens."""
    spec = {
        "turns": 1,
        "tools": {"calls": 1, "seconds": 2, "result_tokens": 6, "output_tokens": 4},
        "sub_agents": {"share": 1, "agents": 2, "system_prompt_tokens": 8, "prompt_tokens": 10},
    }
    run = served(drawn(spec, arrivals={"kind": "timestamps", "times_s": [0.0]}))
    assert times(run, "arrival") == [0, 4, 4, 10, 10, 22]
    assert run.requests["prompt_tokens"].tolist() == [52, 18, 18, 28, 28, 80]
    assert times(run, "finish") == [4, 8, 8, 22, 22, 34]
    assert run.requests["cached_tokens"].tolist()[-1] == 48  # of 52 + 4
    assert set(run.requests["turn"]) == {1}


def test_a_closed_loop_is_of_sessions_and_a_bound_of_requests() -> None:
    loop = {"kind": "closed_loop", "concurrency": 2}
    run = served(drawn({"turns": 2, "think_s": 3}, arrivals=loop, num_requests=3, max_concurrency=1))
    rows = run.requests.sort_values("request_id")
    ordered = Run(rows, run.steps, run.itl)
    assert times(ordered, "arrival") == [0, 15, 0, 27, 36, 63]  # the third begins when the first has ended
    assert times(ordered, "sent") == [0, 24, 12, 36, 48, 63]


def test_a_session_is_over_when_a_request_of_it_fails() -> None:
    lives = [Life(fail_s=5.0), Life(start_s=50.0)]
    run = served(drawn({"turns": 3}), lives=lives)
    assert run.requests["status"].tolist() == ["failed", "finished", "finished", "finished"]
    assert run.meta["unsent"] == 2


def test_times_of_sessions_are_those_of_whole_ones() -> None:
    run = served(drawn({"turns": 3}))
    run.meta["cut_sessions"] = {run.requests["group"].iloc[-1]}
    found = session_summary(run, (95,))
    assert found is not None
    assert (found["sessions"], found["whole_sessions"], found["median_session_s"]) == (2, 1, 36)


def test_a_context_into_which_no_turn_fits_is_refused() -> None:
    with pytest.raises(InputError, match=r"sessions.max_context_tokens: no turn .* fits into 10 tokens"):
        drawn({"turns": 3, "max_context_tokens": 10})


def test_a_session_ends_before_a_request_that_is_too_long() -> None:
    run = served(drawn({"turns": 3, "max_context_tokens": 96}))
    assert run.requests["prompt_tokens"].tolist() == [52, 84] * 2


def test_affine_routers_keep_a_session_where_its_history_is() -> None:
    hits = {}
    for name in ("session_affinity", "session_hashing", "round_robin"):
        router = ROUTERS[name](RouterOptions(), np.random.default_rng(0))
        run = served(drawn({"turns": 4}), lives=[Life(), Life()], router=router)
        hits[name] = run.requests["cached_tokens"].tolist()[:4]
    found = [0, 48, 80, 112]
    assert hits == {"session_affinity": found, "session_hashing": found, "round_robin": [0, 0, 48, 80]}
