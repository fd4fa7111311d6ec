"""What serves a request rate: whole replicas, GPUs, and their cost by the hour, the month and the token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.plan.traffic import Traffic
from servecast.sim.report.text import counted
from servecast.sim.scenario.scenario import Scenario

HOURS_A_MONTH = 730  # 8,760 / 12


def check_target(target_rate: float, margin: float) -> None:
    """Refuse a rate that is none (requests/s), or a margin that is no share."""
    if not 0 < target_rate < math.inf:
        fix = "Give the requests a second that are to be served."
        raise InputError(f"{target_rate:g} is not positive and finite", where="--target-rate", fix=fix)
    if not 0 <= margin < math.inf:
        raise InputError(f"{margin:g} is no share", where="--margin", fix="Give for example 0.2 for 20 %.")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is bought as a whole: the fleet of a scenario. hour_cost: of all its GPUs, None if not known."""

    replicas: int
    gpus: int
    hour_cost: float | None

    @classmethod
    def of(cls, scenario: Scenario, gpu_hour_cost: float | None) -> Unit:
        """A scenario's fleet, at the price of a GPU."""
        specs = scenario.fleet.specs
        gpus = sum(scenario.of_replica(spec).engine.gpus for spec in specs)
        return cls(len(specs), gpus, None if gpu_hour_cost is None else gpus * gpu_hour_cost)


@dataclass(frozen=True, slots=True)
class Size:
    """What serves ``target_rate``, with at least ``margin`` (a share of it) in hand, if traffic is split
    evenly. Rates are requests/s.

    rate: what a unit carries. units: how many there are. traffic: for the cost of tokens.
    """

    target_rate: float
    margin: float
    rate: float
    unit: Unit
    traffic: Traffic

    @property
    def units(self) -> int:
        return math.ceil(self.target_rate * (1 + self.margin) / self.rate - 1e-9)

    @property
    def replicas(self) -> int:
        return self.units * self.unit.replicas

    @property
    def gpus(self) -> int:
        return self.units * self.unit.gpus

    @property
    def in_hand(self) -> float:
        """What is carried beyond the target rate, as a share of it."""
        return self.units * self.rate / self.target_rate - 1

    @property
    def hour_cost(self) -> float | None:
        return None if self.unit.hour_cost is None else self.units * self.unit.hour_cost

    @property
    def month_cost(self) -> float | None:
        """Of 730 hours."""
        return None if self.hour_cost is None else HOURS_A_MONTH * self.hour_cost

    def million(self, tokens: float) -> float | None:
        """The cost of a million tokens where a request has so many, at the target rate."""
        return None if self.hour_cost is None else self.hour_cost / (3600 * self.target_rate * tokens) * 1e6

    def to_json(self) -> dict[str, Any]:
        """Plain values; costs are None without a price."""
        prompt, output = self.traffic.prompt_tokens, self.traffic.output_tokens
        return {
            "target_rate": self.target_rate,
            "margin": self.margin,
            "replicas": self.replicas,
            "gpus": self.gpus,
            "in_hand": self.in_hand,
            "hour_cost": self.hour_cost,
            "month_cost": self.month_cost,
            "cost_per_million_tokens": self.million(prompt + output),
            "cost_per_million_input_tokens": self.million(prompt),
            "cost_per_million_output_tokens": self.million(output),
        }

    def to_text(self) -> str:
        """What is bought, in a line."""
        bought = f"{counted(self.replicas, 'replica')}, {counted(self.gpus, 'GPU')}"
        return f"{bought}, {self.in_hand:.1%} in hand{self.money_text()}"

    def money_text(self, currency: str = "") -> str:
        """Behind what is bought; empty without a price."""
        if self.hour_cost is None or self.month_cost is None:
            return ""
        unit = f" {currency}" if currency else ""
        return f"; {self.hour_cost:,.2f}{unit} an hour, {self.month_cost:,.0f} a month"

    def tokens_text(self) -> str | None:
        """What tokens cost; None without a price."""
        prompt, output = self.traffic.prompt_tokens, self.traffic.output_tokens
        both = self.million(prompt + output)
        if both is None:
            return None
        return (
            f"A million tokens: {both:.3g} (input and output together); "
            f"{self.million(output):.3g} if output bears it all, {self.million(prompt):.3g} if input does"
        )
