"""Which of the two engines that follow vLLM's scheduler runs here. They decide alike to the last block."""

from __future__ import annotations

from collections.abc import Callable

from servecast.sim.engine import core, scheduler
from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine

# Visiting every request, as vLLM does, is fastest where it is compiled; in Python counting is.
VllmScheduler: Callable[[EngineConfig], Engine] = core.Scheduler if core.COMPILED else scheduler.Scheduler
