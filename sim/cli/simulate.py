"""``servecast simulate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Group, Parameter

from servecast.sim.cli.options import Load, WhatIf, numbers
from servecast.sim.cli.output import show
from servecast.sim.run import simulation
from servecast.sim.run.benchmark_report import write_benchmark_report
from servecast.sim.run.results import check_output, check_table, write_result, write_table


@Parameter(name="*", group=Group("Files", sort_key=9))
@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """What to write.

    Attributes:
        output: write the result as JSON, under vllm bench serve's keys.
        records: write a row a request, as .csv or .parquet; times are in seconds.
        steps: write a row an engine step, likewise.
        benchmark_report: write an llm-d Benchmark Report v0.2, as YAML.
        save_detailed: add each request's lengths and TTFT to the JSON.
    """

    output: Path | None = None
    records: Path | None = None
    steps: Path | None = None
    benchmark_report: Path | None = None
    save_detailed: bool = False

    def check(self) -> None:
        """Refuse what could not be written, before a long run."""
        for path, flag in ((self.records, "--records"), (self.steps, "--steps")):
            if path is not None:
                check_table(path, where=flag)
        for path, flag in ((self.output, "--output"), (self.benchmark_report, "--benchmark-report")):
            check_output(path, where=flag)

    def write(self, found: simulation.Simulation) -> list[str]:
        """Write them, and say which."""
        if self.records is not None:
            write_table(self.records, found.requests)
        if self.steps is not None:
            write_table(self.steps, found.steps)
        if self.output is not None:
            write_result(self.output, found.result)
        if self.benchmark_report is not None:
            write_benchmark_report(self.benchmark_report, found.run, found.result)
        paths = (self.records, self.steps, self.output, self.benchmark_report)
        return [f"written: {path}" for path in paths if path is not None]


def simulate(
    scenario: str,
    /,
    *,
    metric_percentiles: str = "95,99",
    warmup: str | None = None,
    json: bool = False,
    files: Files = Files(),
    load: Load = Load(),  # noqa: B008
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Run a scenario once, in simulated time.

    Prints what vllm bench serve prints (a row a stage where there are several), the run context of the
    benchmark that the scenario describes, and what the prediction rests on.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        metric_percentiles: which percentiles to give, separated by commas.
        warmup: what to leave out at the start of each stage: 30s, 100 (requests), 20% or auto.
        json: print the result as JSON, and nothing else.
    """
    ranks = numbers(metric_percentiles, where="--metric-percentiles")
    files.check()
    found = simulation.simulate(
        what_if.load(scenario),
        request_rate=load.request_rate,
        num_requests=load.count,
        percentiles=ranks,
        warmup=warmup,
        detailed=files.save_detailed,
    )
    return show(found, json=json, more=files.write(found))
