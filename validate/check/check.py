"""Can this report be true? The rules, and what they find in a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.report.answer import Answer
from servecast.sim.report.text import table
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.scenario import load as load_scenario
from servecast.validate.check import clock, identities, load, physics
from servecast.validate.check import few_requests as few
from servecast.validate.check.finding import Finding, NotReported, Rule
from servecast.validate.check.from_results import from_results
from servecast.validate.check.from_scenario import from_scenario
from servecast.validate.check.from_table import Context, from_table
from servecast.validate.check.prediction import prediction
from servecast.validate.check.table import Report
from servecast.validate.readers.document import is_csv_of_vllm

GPU = "--model-config and --gpu"
RULES: dict[str, tuple[Rule, str]] = {  # each with what it needs
    "all-failed": (identities.all_failed, "a number of failures"),
    "records": (identities.records, "the requests behind the figures"),
    "percentile-order": (identities.percentile_order, "two statistics of a latency"),
    "e2e-sum": (identities.e2e_sum, "E2E and TTFT, and the time between tokens with output lengths"),
    "throughput-requests": (
        identities.throughput_against_requests,
        "tokens/s, requests/s and output lengths",
    ),
    "wall-time": (identities.wall_time, "a rate and the number of requests"),
    "littles-law": (load.littles_law, "the concurrency, a rate and a latency"),
    "few-waves": (few.few_waves, "the concurrency, the number of requests, a rate and a latency"),
    "send-rate": (load.send_rate, "the offered rate, requests/s and a latency"),
    "drain": (load.drain, "the offered rate, tokens/s and output lengths"),
    "open-loop": (load.open_loop, "the offered rate, a rate and a latency"),
    "warm-up": (few.warm_up, "two loads with a median and a tail of TTFT"),
    "percentile-past-maximum": (
        few.percentile_past_maximum,
        "the exclusive law of percentiles, and the number of requests",
    ),
    "zero-latency": (clock.zero_latency, "a latency"),
    "halved-itl": (clock.halved_itl, "TPOT or ITL, with output lengths"),
    "clock-grid": (clock.clock_grid, "four rows of a latency"),
    "roofline-decode": (physics.roofline_decode, f"TPOT, ITL or E2E, {GPU}"),
    "roofline-prefill": (physics.roofline_prefill, f"TTFT, the prompts' length, {GPU}"),
    "prefill-difference": (physics.prefill_difference, f"TTFT at two lengths of prompts, {GPU}"),
    "roofline-throughput": (physics.roofline_throughput, f"tokens/s, {GPU}"),
    "repeated-prompts": (physics.repeated_prompts, "a scenario that says which prompts were sent before"),
    "kv-arithmetic": (physics.kv_arithmetic, f"KV usage, requests running or waiting, or {GPU}"),
    "kv-capacity": (
        physics.kv_capacity,
        f"the concurrency, the prompts' length, TTFT p50 and a latency, {GPU}",
    ),
}
_NOT_PREDICTED = (
    "not set against a prediction, which takes a scenario: `servecast validate result` does so for a result, "
    "`reported` in a scenario for a table"
)
CLEAN, FOUND, NOTHING_TO_CHECK = 0, 1, 3
_SHOWN_ROWS = 3


@dataclass(frozen=True, slots=True, repr=False)
class Checked(Answer):
    """A report and what was found in it.

    Attributes:
        report: what was checked.
        findings: rule by rule in the order of `rules`.
        rules: ids of the rules that there are for it. not_asked: those of them that no row could be asked,
            and what they need.
    """

    report: Report
    findings: tuple[Finding, ...]
    rules: list[str]
    not_asked: dict[str, str]

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
            "not_asked": self.not_asked,
            "rows": self.rows,
            "notes": list(self.report.notes),
        }

    def to_text(self) -> str:
        """A row a rule with what it found, the clearest in words, and how much was asked."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.rule, finding.level.table, finding.confidence), []).append(finding)
        rows = []
        for (rule, of_table, sure), found in groups.items():
            clearest = max(found, key=lambda finding: finding.weight)
            rows.append([rule, sure, f"{of_table}: {_cells(found)}", clearest.message])
        parts = [table(["rule", "sure", "cells", "what (the clearest)"], rows)] if rows else []
        if self.asked:
            count = len(self.findings) or "no"
            missing = self.not_asked
            known = f"{len(self.rules) - len(missing)} of {len(self.rules)} rules"
            parts.append(
                f"{count} finding{'s' * (count != 1)} ({self.rows} row{'s' * (self.rows != 1)}, {known})"
            )
            bounded = any(level.hardware is not None for level in self.report.levels)
            parts += _asked_text(self.rules, missing, bounded=bounded)
        else:
            parts.append("Nothing in it can be checked: no latency, no two rates, no bound.")
        return "\n".join([*parts, *self.report.notes])


def _asked_text(rules: list[str], missing: dict[str, str], *, bounded: bool) -> list[str]:
    """Which rules were asked, and which were not for want of a GPU, or of something else."""
    of_gpu = [rule for rule, need in missing.items() if need.endswith(GPU) and not bounded]
    others = [rule for rule in missing if rule not in of_gpu]
    lines = [f"Asked: {', '.join(rule for rule in rules if rule not in missing)}"]
    if of_gpu:
        lines.append(f"Not asked, which need {GPU}: {', '.join(of_gpu)}")
    if others:
        lines.append(f"Not asked, for want of what --json names: {', '.join(others)}")
    return lines


def check(
    report: Report | Scenario | Path | str, *more: Path | str, predict: bool = True, **context: Any
) -> Checked:
    """Can this benchmark report be true?

    Asks Little's law, sums of latencies, tokens against requests, rooflines, KV arithmetic, the order of
    percentiles, warm-up, drain and clocks, and sets a scenario's reports against the prediction.

    Args:
        report: a scenario with reported tables, or its name; or the path of a CSV table, or of a result.
        more: further result files, one a level of load.
        predict: set the reported values of a scenario against ours.
        context: what a table or a result does not say of itself: model_config, gpu, tensor_parallel_size,
            replicas, prompt_tokens, output_tokens, num_requests, percentile_law.

    Raises:
        InputError: the report cannot be read.
    """
    if not isinstance(report, Report):
        report = _read(report, [Path(each) for each in more], Context(**context))
    if predict and report.scenario is None and any(level.hardware is not None for level in report.levels):
        report = replace(report, notes=(*report.notes, _NOT_PREDICTED))
    with_prediction = predict and report.scenario is not None and report.scenario.profile is not None
    rules = RULES | ({"prediction": (prediction, "a scenario")} if with_prediction else {})
    findings: list[Finding] = []
    missing: dict[str, str] = {}
    for name, (rule, need) in rules.items():
        try:
            findings += [replace(finding, rule=name) for finding in rule(report)]
        except NotReported:
            missing[name] = need
    return Checked(report, tuple(findings), list(rules), missing)


def _read(report: Scenario | Path | str, more: list[Path], context: Context) -> Report:
    if isinstance(report, Scenario):
        context.refuse()
        return from_scenario(report)
    path = Path(report)
    if all(_is_result(each) for each in (path, *more)):
        return from_results([path, *more], context)
    if more:
        raise InputError(
            "only result files come several at a time", where=str(more[0]), fix="Give one table or scenario."
        )
    return from_table(path, context) if path.suffix == ".csv" else _read(load_scenario(report), [], context)


def _is_result(path: Path) -> bool:
    """Whether a file is a load generator's result: JSON, or YAML that is no scenario."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return "schema_version" not in read_yaml(path)
    if path.suffix == ".csv" and path.is_file():
        return is_csv_of_vllm(path)
    return path.suffix in (".json", ".jsonl")


def _cells(found: list[Finding]) -> str:
    """Columns and rows of the findings, the rows counted where they are many."""
    columns = dict.fromkeys(column for finding in found for column in finding.columns)
    labels = list(dict.fromkeys(finding.level.label for finding in found))
    rows = ", ".join(labels) if len(labels) <= _SHOWN_ROWS else f"{len(labels)} rows"
    return f"{', '.join(columns)} at {rows}"
