"""``servecast simulate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servecast.sim.cli.options import Load, WhatIf, numbers
from servecast.sim.cli.output import print_facts, print_json, print_table

_COLUMNS = (  # of a table of stages: header, key
    ("stage", "stage"),
    ("done", "completed"),
    ("req/s", "request_throughput"),
    ("tok/s", "output_throughput"),
    ("TTFT p50", "median_ttft_ms"),
    ("p95 ms", "p95_ttft_ms"),
    ("TPOT p50", "median_tpot_ms"),
    ("p95 ms", "p95_tpot_ms"),
    ("ITL p95 ms", "p95_itl_ms"),
    ("E2EL p50", "median_e2el_ms"),
    ("p95 ms", "p95_e2el_ms"),
    ("KV peak", "kv_cache_usage_peak"),
    ("running", "max_num_running"),
    ("waiting", "max_num_waiting"),
)


def simulate(
    scenario: str,
    /,
    *,
    output: Path | None = None,
    records: Path | None = None,
    steps: Path | None = None,
    benchmark_report: Path | None = None,
    save_detailed: bool = False,
    metric_percentiles: str = "95,99",
    warmup: str | None = None,
    json: bool = False,
    load: Load = Load(),  # noqa: B008 (frozen)
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Run a scenario once, in simulated time.

    Prints what vllm bench serve prints (a row a stage where there are several), the run context of the
    benchmark that the scenario describes, and what the prediction rests on.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        output: write the result as JSON, under vllm bench serve's keys.
        records: write a row a request, as .csv or .parquet; times are in seconds.
        steps: write a row an engine step, likewise.
        benchmark_report: write an llm-d Benchmark Report v0.2, as YAML.
        save_detailed: add each request's lengths and TTFT to the JSON.
        metric_percentiles: which percentiles to give, separated by commas.
        warmup: what to leave out at the start of each stage: 30s, 100 (requests), 20% or auto.
        json: print the result as JSON, and nothing else.
    """
    ranks = numbers(metric_percentiles, where="--metric-percentiles")
    loaded, changes = what_if.load(scenario)

    from servecast.sim.metrics.metrics import vllm_bench_text
    from servecast.sim.metrics.warmup import Warmup
    from servecast.sim.run import simulate as simulation
    from servecast.sim.run.benchmark_report import write_benchmark_report
    from servecast.sim.run.results import check_output, check_table, result, write_result, write_table
    from servecast.sim.scenario.deployment import Deployment

    cut = None if warmup is None else Warmup.parse(warmup)
    for path, flag in ((records, "--records"), (steps, "--steps")):
        if path is not None:
            check_table(path, where=flag)
    for path, flag in ((output, "--output"), (benchmark_report, "--benchmark-report")):
        if path is not None:
            check_output(path, where=flag)
    deployment = Deployment.of(loaded)
    run = simulation.simulate(deployment, workload=load.workload(loaded))
    document = result(deployment, run, what_if=changes, ranks=ranks, warmup=cut, detailed=save_detailed)
    written: list[Path] = []
    for path, table in ((records, run.requests), (steps, run.steps)):
        if path is not None:
            write_table(path, table)
            written.append(path)
    if output is not None:
        write_result(output, document)
        written.append(output)
    if benchmark_report is not None:
        write_benchmark_report(benchmark_report, run, document)
        written.append(benchmark_report)
    if json:
        print_json(document)
        return 0
    if document["stages"]:
        print_stages(document["stages"])
    else:
        print(vllm_bench_text(document))
    if "fleet_load" in document:
        print_replicas(document["fleet_load"]["replicas"])
    print_context(document)
    for path in written:
        print(f"written: {path}")
    return 0


def print_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """A row a stage. Latencies are milliseconds."""
    columns = [
        (header, key) for header, key in _COLUMNS if any(stage.get(key) is not None for stage in stages)
    ]
    print_table([header for header, _ in columns], [[stage[key] for _, key in columns] for stage in stages])


def print_replicas(replicas: Sequence[Mapping[str, Any]], *, title: str = "\nReplicas") -> None:
    """A row a replica."""
    columns = {
        "replica": "replica",
        "requests": "requests",
        "failed": "failed",
        "prefix hits": "prefix_cache_hit_rate",
        "uncached tok/s": "uncached_tokens_per_s",
        "running (mean)": "mean_num_running",
        "waiting (mean)": "mean_num_waiting",
        "waiting (peak)": "max_num_waiting",
        "KV (mean)": "mean_kv_cache_usage",
        "KV (peak)": "kv_cache_usage_peak",
        "preemptions": "num_preemptions",
    }
    rows = [[each[key] for key in columns.values()] for each in replicas]
    print_table(list(columns), rows, title=title)


def print_context(document: Mapping[str, Any]) -> None:
    """What a result was made of: run context, what-ifs, and what it rests on."""
    if document["run_context"]:
        said = {name: value for name, value in document["run_context"].items() if value is not None}
        print_facts("Run context of the benchmark", said)
    if document["what_if"]:
        print_facts("What-if", document["what_if"])
    from servecast.sim.scenario.servers import SERVERS  # here, so that help comes at once

    server = SERVERS[document["engine"]["policy"]].title(document["engine_version"])
    provenance = document["provenance"]
    band = document["error_band"]
    facts = {
        "basis": provenance["basis"],
        "profile": f"{document['profile'] or 'none, typical efficiencies'} ({provenance['profile']})",
        "error band": "not known" if band is None else f"+-{band:.0%}",
        "engine": f"{server}, rules of {document['engine']['rules']}",
        "seed": document["seed"],
        "servecast": document["servecast_version"],
    }
    print_facts("What the prediction rests on", facts)
    for note in document["notes"]:
        print(f"note: {note}")
