"""Can this report be true? The rules, and what they find in a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from servecast.validate.check import clock, identities, load, physics
from servecast.validate.check import few_requests as few
from servecast.validate.check.finding import Finding
from servecast.validate.check.prediction import prediction
from servecast.validate.check.table import Report

Rule = Callable[[Report], Iterator[Finding]]

RULES: dict[str, Rule] = {
    "records": identities.records,
    "percentile-order": identities.percentile_order,
    "e2e-sum": identities.e2e_sum,
    "throughput-requests": identities.throughput_against_requests,
    "wall-time": identities.wall_time,
    "littles-law": load.littles_law,
    "few-waves": few.few_waves,
    "send-rate": load.send_rate,
    "drain": load.drain,
    "open-loop": load.open_loop,
    "warm-up": few.warm_up,
    "percentile-past-maximum": few.percentile_past_maximum,
    "zero-latency": clock.zero_latency,
    "halved-itl": clock.halved_itl,
    "clock-grid": clock.clock_grid,
    "roofline-decode": physics.roofline_decode,
    "roofline-prefill": physics.roofline_prefill,
    "roofline-throughput": physics.roofline_throughput,
    "repeated-prompts": physics.repeated_prompts,
    "kv-arithmetic": physics.kv_arithmetic,
    "kv-capacity": physics.kv_capacity,
}
_NOT_PREDICTED = (
    "not set against a prediction, which takes a scenario: `servecast validate result` does so for a result, "
    "`reported` in a scenario for a table"
)
CLEAN, FOUND, NOTHING_TO_CHECK = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Checked:
    """A report and what was found in it, rule by rule in the order of `RULES`, then the prediction."""

    report: Report
    findings: tuple[Finding, ...]
    predicted: bool

    @property
    def rules(self) -> list[str]:
        """Ids of the rules that were asked."""
        return [*RULES, *(["prediction"] if self.predicted else [])]

    @property
    def asked(self) -> bool:
        """Whether the report has anything that a rule can be asked of: a latency or a gauge, two throughputs,
        or one and the GPU."""
        throughput = {"output_throughput", "request_throughput"}
        metrics = [{value.metric for value in level.values.values()} for level in self.report.levels]
        bounded = any(level.hardware is not None for level in self.report.levels)
        return any(
            found - throughput - {"success", "goodput"}
            or throughput <= found
            or (bounded and found & throughput)
            for found in metrics
        )

    @property
    def rows(self) -> int:
        """How many rows report something."""
        return sum(bool(level.values) for level in self.report.levels)

    @property
    def exit_code(self) -> int:
        """0 without findings, 1 with, 3 where the report has nothing that a rule can be asked of."""
        if self.findings:
            return FOUND
        return CLEAN if self.asked else NOTHING_TO_CHECK

    def to_json(self) -> dict[str, Any]:
        """As ``servecast check --json`` prints it."""
        return {
            "report": self.report.source,
            "findings": [finding.to_json() for finding in self.findings],
            "rules": self.rules,
            "rows": self.rows,
            "notes": list(self.report.notes),
        }


def check(report: Report, *, predict: bool = True) -> Checked:
    """Ask every rule. With ``predict`` the reported values of a scenario are also set against ours."""
    if predict and report.scenario is None and any(level.hardware is not None for level in report.levels):
        report = replace(report, notes=(*report.notes, _NOT_PREDICTED))
    with_prediction = predict and report.scenario is not None and report.scenario.profile is not None
    rules = RULES | ({"prediction": prediction} if with_prediction else {})
    findings = [replace(finding, rule=name) for name, rule in rules.items() for finding in rule(report)]
    return Checked(report, tuple(findings), with_prediction)
