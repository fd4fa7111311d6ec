"""The open-loop traffic that is planned for, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servecast.sim.scenario.scenario import Scenario
from servecast.sim.traffic.draw import draw, with_request_rate

DRAWN = 10_000  # requests, whose lengths are looked at


@dataclass(frozen=True, slots=True)
class Traffic:
    """Means and 95th percentiles of the tokens of a request. arrivals: the law, in a scenario's words."""

    arrivals: str
    prompt_tokens: float
    prompt_p95: float
    output_tokens: float
    output_p95: float

    @classmethod
    def of(cls, scenario: Scenario) -> Traffic:
        """What ``plan`` sends, as it is drawn."""
        workload = scenario.open_loop()
        drawn = draw(with_request_rate(workload, 1.0, num_requests=DRAWN), scenario.seed)
        sent = [
            (each.prompt_tokens, each.output_tokens)
            for stream in drawn[0].streams
            if not stream.background
            for each in stream.requests
        ]
        prompts, outputs = np.array(sent, dtype=float).T
        streams = [stream for stream in workload.stages[0].streams if not stream.background]
        laws = ["recorded" if each.arrivals is None else each.arrivals.kind for each in streams]
        return cls(
            " and ".join(dict.fromkeys(laws)),
            float(prompts.mean()),
            float(np.percentile(prompts, 95)),
            float(outputs.mean()),
            float(np.percentile(outputs, 95)),
        )

    def to_text(self) -> str:
        """In a sentence."""
        return (
            f"{self.arrivals} arrivals; prompts of {self.prompt_tokens:,.0f} tokens (p95 "
            f"{self.prompt_p95:,.0f}), answers of {self.output_tokens:,.0f} (p95 {self.output_p95:,.0f})"
        )
