"""Forecast LLM serving: a discrete-event simulator of vLLM, calibrated on real GPUs.

Each question is a function that takes a scenario and returns an answer: print it, take its parts, or write it
as a page. ::

    import servecast

    scenario = servecast.load("a6000-qwen2.5-7b")
    answer = servecast.plan(scenario, slo=["ttft:p95:500", "tpot:p95:60"])
    print(answer)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servecast.sim.compare.compare import compare
    from servecast.sim.compare.sweep import sweep
    from servecast.sim.hardware.profile import Profile
    from servecast.sim.inputs.errors import InputError
    from servecast.sim.metrics.records import Run
    from servecast.sim.optimize.candidates import Choices
    from servecast.sim.optimize.optimize import optimize
    from servecast.sim.plan.day import day
    from servecast.sim.plan.effort import Effort
    from servecast.sim.plan.plan import plan
    from servecast.sim.report.answer import Answer
    from servecast.sim.reproduce.reproduce import reproduce
    from servecast.sim.run.explain import explain
    from servecast.sim.run.simulation import simulate
    from servecast.sim.run.workers import Workers
    from servecast.sim.scenario.lists import gpus, models, profiles
    from servecast.sim.scenario.scenario import Scenario, load
    from servecast.validate.check.check import check

__all__ = [
    "Answer",
    "Choices",
    "Effort",
    "InputError",
    "Profile",
    "Run",
    "Scenario",
    "Workers",
    "check",
    "compare",
    "day",
    "explain",
    "gpus",
    "load",
    "models",
    "optimize",
    "plan",
    "profiles",
    "reproduce",
    "simulate",
    "sweep",
]

_MODULES = {  # of the public names: imported when they are asked for, so that the command starts at once
    "Answer": "sim.report.answer",
    "Choices": "sim.optimize.candidates",
    "Effort": "sim.plan.effort",
    "InputError": "sim.inputs.errors",
    "Profile": "sim.hardware.profile",
    "Run": "sim.metrics.records",
    "Scenario": "sim.scenario.scenario",
    "Workers": "sim.run.workers",
    "check": "validate.check.check",
    "compare": "sim.compare.compare",
    "day": "sim.plan.day",
    "explain": "sim.run.explain",
    "gpus": "sim.scenario.lists",
    "load": "sim.scenario.scenario",
    "models": "sim.scenario.lists",
    "optimize": "sim.optimize.optimize",
    "plan": "sim.plan.plan",
    "profiles": "sim.scenario.lists",
    "reproduce": "sim.reproduce.reproduce",
    "simulate": "sim.run.simulation",
    "sweep": "sim.compare.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'servecast' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"servecast.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
