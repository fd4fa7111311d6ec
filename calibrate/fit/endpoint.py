"""Calibration against a server of which nothing is known but its answers.

A short closed-loop plan is run by ``vllm bench serve`` and becomes a reported table beside a scenario of
the same load; the profile is then fitted to that table through the simulator, as to anybody's report
(calibrate.from_report). The folder keeps it all, so that ``reproduce`` can show it and the fit be repeated.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from cyclopts import Parameter

from servecast.calibrate.fit.report import fit_report
from servecast.calibrate.fit.text import cell_line
from servecast.calibrate.measure.folder import Budget, say
from servecast.calibrate.measure.vllm.bench_serve import Server, run_bench
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load
from servecast.sim.traffic.trace_writers import write_timed_trace
from servecast.sim.traffic.traces import Trace

WARM_UP = 2  # requests that open a level and do not count
COLUMNS: dict[str, dict[str, str]] = {
    "ttft_p50_ms": {"metric": "ttft", "statistic": "p50", "unit": "ms"},
    "ttft_p95_ms": {"metric": "ttft", "statistic": "p95", "unit": "ms"},
    "tpot_p50_ms": {"metric": "tpot", "statistic": "p50", "unit": "ms"},
    "itl_p95_ms": {"metric": "itl", "statistic": "p95", "unit": "ms"},
    "output_tok_s": {"metric": "output_throughput", "unit": "tok/s"},
}


@dataclass(frozen=True, slots=True)
class Level:
    """One closed loop: so many requests of one length, so many of them at a time."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def num_requests(self) -> int:
        return max(12, 4 * self.concurrency)


@dataclass(frozen=True, slots=True)
class Endpoint(Server):
    """A server to measure. python: that has vllm, for the benchmark."""

    python: str = sys.executable


def levels_for(
    scenario: Scenario, concurrency: Sequence[int] = (), prompt_tokens: int = 256, output_tokens: int = 64
) -> list[Level]:
    """What is worth asking of a server: one request alone, a long prompt, and rising concurrency.

    Args:
        concurrency: levels instead of 1, 8, 32 and 128 as far as the engine runs them together.

    Raises:
        InputError: a level is below 1, or the lengths do not fit the engine's max_model_len.
    """
    config = Deployment.of(scenario).config
    if any(level < 1 for level in concurrency):
        raise InputError("a level below 1", where="--concurrency", fix="Give whole numbers from 1.")
    if min(prompt_tokens, output_tokens - 1) < 1 or prompt_tokens + output_tokens > config.max_model_len:
        raise InputError(
            f"{prompt_tokens} and {output_tokens} tokens do not fit max_model_len {config.max_model_len}",
            where="--prompt-tokens, --output-tokens",
            fix="Give at least 1 and 2 tokens, together at most max_model_len.",
        )
    asked = list(concurrency) or [level for level in (1, 8, 32, 128) if level <= config.max_num_seqs]
    levels = [Level(level, prompt_tokens, output_tokens) for level in asked]
    longer = min(8 * prompt_tokens, config.max_model_len - output_tokens)
    if longer >= 2 * prompt_tokens:
        levels.insert(1, Level(1, longer, max(2, output_tokens // 8)))
    return levels


def measure_endpoint(
    scenario: Scenario,
    endpoint: Endpoint,
    levels: Sequence[Level],
    out: Path,
    *,
    time_budget_s: float | None = None,
) -> Scenario:
    """Run the levels and write ``out/scenario.yaml`` with ``out/report.csv``, the table that they gave.

    Args:
        scenario: what is known of the server: model, GPU, engine flags.
        time_budget_s: no level is started that would probably end later.

    Returns:
        The scenario that was written, whose ``reported`` names every row for the fit.

    Raises:
        InputError: the server does not answer as it should (levels measured before it are in the table), or
            there was time for fewer than two levels.
    """
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(time_budget_s)
    done: list[tuple[Level, dict[str, float]]] = []
    longest = 0.0
    requests = sum(WARM_UP + level.num_requests for level in levels)
    tokens = sum((WARM_UP + each.num_requests) * (each.prompt_tokens + each.output_tokens) for each in levels)
    say(f"{len(levels)} closed loops, {requests:,} requests, {tokens:,} tokens; Ctrl-C keeps what is done")
    try:
        for number, level in enumerate(levels):
            if not budget.fits(2 * longest):
                say(f"the time is over: {len(levels) - number} of {len(levels)} levels left out")
                break
            say(f"concurrency {level.concurrency}, {level.prompt_tokens} in, {level.output_tokens} out")
            began = budget.spent_s
            done.append((level, _measure(endpoint, level, out, number)))
            longest = max(longest, budget.spent_s - began)
    finally:
        _write(scenario, done, out)
    if len(done) < 2:
        raise InputError(
            f"{len(done)} levels measured, a fit needs at least 2",
            where="--time-budget",
            fix="Give it more time.",
        )
    return load(out / "scenario.yaml")


def _measure(endpoint: Endpoint, level: Level, out: Path, number: int) -> dict[str, float]:
    trace = out / f"level-{number}.jsonl"
    count = WARM_UP + level.num_requests
    prompts, outputs = (np.full(count, n, dtype=np.int64) for n in (level.prompt_tokens, level.output_tokens))
    write_timed_trace(Trace(np.zeros(count), prompts, outputs, None, 16), trace)
    args = ("--max-concurrency", str(level.concurrency), "--ignore-eos")
    file = out / f"level-{number}.json"
    found = run_bench(endpoint, trace, file, args=args, hash_seed=1 + number, python=endpoint.python)
    return _statistics(found)


def _statistics(result: dict[str, Any]) -> dict[str, float]:
    """The table's cells of one saved benchmark, without its first requests."""
    failed = [text for text in result["errors"] if text]
    if failed:
        raise InputError(
            f"{len(failed)} requests failed; the first error: {failed[0].strip()[-500:]}",
            where="vllm bench serve",
            fix="Mend the server first: a fit to failures says nothing.",
        )
    order = np.argsort(np.array(result["start_times"]))[WARM_UP:]
    starts, ttfts, tokens = (
        np.array(result[name])[order] for name in ("start_times", "ttfts", "output_lens")
    )
    gaps = [np.array(result["itls"][index]) for index in order]
    decode_s = np.array([each.sum() for each in gaps])
    last = (starts + ttfts + decode_s).max()
    return {
        "ttft_p50_ms": 1e3 * float(np.percentile(ttfts, 50)),
        "ttft_p95_ms": 1e3 * float(np.percentile(ttfts, 95)),
        "tpot_p50_ms": 1e3 * float(np.percentile(decode_s / (tokens - 1), 50)),
        "itl_p95_ms": 1e3 * float(np.percentile(np.concatenate(gaps), 95)),
        "output_tok_s": float(tokens.sum() / (last - starts.min())),
    }


def _write(scenario: Scenario, done: Sequence[tuple[Level, dict[str, float]]], out: Path) -> None:
    """The table, and a scenario of the same load beside it."""
    if not done:
        return
    with (out / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["level", *COLUMNS])
        for number, (_, cells) in enumerate(done):
            writer.writerow([number, *(f"{cells[name]:.6g}" for name in COLUMNS)])
    gpu = scenario.gpu
    data: dict[str, Any] = {
        "schema_version": scenario.schema_version,
        "name": f"{scenario.name}-black-box",
        "description": f"Closed loops on a server known by its answers alone, for {scenario.name}.",
        "model": {"config": str(scenario.config_file().absolute())},
        "gpu": {"name": gpu.name} if gpu.file is None else {"file": str(gpu.file.absolute())},
        "engine": scenario.engine.model_dump(mode="json", include=scenario.engine.model_fields_set),
        "workload": {
            "prompt_tokens": done[0][0].prompt_tokens,
            "output_tokens": done[0][0].output_tokens,
            "content": {"kind": "unique"},
        },
        "sweep": {
            "levels": [
                {
                    "row": {"level": number},
                    "concurrency": level.concurrency,
                    "num_requests": level.num_requests,
                    "prompt_tokens": level.prompt_tokens,
                    "output_tokens": level.output_tokens,
                }
                for number, (level, _) in enumerate(done)
            ]
        },
        "reported": [
            {
                "name": "black-box",
                "table": "report.csv",
                "source": "vllm bench serve against the endpoint",
                "keys": ["level"],
                "columns": COLUMNS,
                "fit_rows": [{"level": number} for number in range(len(done))],
            }
        ],
    }
    (out / "scenario.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def endpoint(
    scenario: str,
    *,
    server: Annotated[Endpoint, Parameter(name="*", show_default=False)],
    output: Path,
    out: Path = Path("out/black-box"),
    concurrency: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    prompt_tokens: int = 256,
    output_tokens: int = 64,
    time_budget: float | None = None,
) -> int:
    """Calibrate against a running OpenAI-compatible server, by its answers alone.

    Runs a few closed loops with vllm bench serve, writes them as a report beside a scenario of the same
    load, and fits the profile to it through the simulator. What a few loops do not tell stays typical.

    Args:
        scenario: what is known of the server: model, GPU, engine flags. A shipped name, or a YAML file.
        server.base_url: of the server, as http://127.0.0.1:8000.
        server.model: the name that it serves.
        server.tokenizer: folder or name of the model's tokenizer; the model's name without it.
        server.endpoint: of completions (/v1/completions).
        server.api_key_env: name of the environment variable with the server's key.
        server.python: of the environment that has vllm, where servecast's own has not.
        output: where the profile is written.
        out: folder for the benchmark's results, the report and its scenario.
        concurrency: levels instead of our own.
        prompt_tokens: of a request; one level takes eight times as many.
        output_tokens: of a request.
        time_budget: seconds; no level is started that would probably end later.
    """
    known = load(scenario)
    levels = levels_for(known, concurrency or (), prompt_tokens, output_tokens)
    report = measure_endpoint(known, server, levels, out, time_budget_s=time_budget)
    found = fit_report(report, progress=say)
    found.profile.save(output)
    for cell in found.cells:
        level = levels[int(cell.keys["level"])]
        print(cell_line(f"concurrency {level.concurrency}, {level.prompt_tokens} in", cell))
    print(f"profile written to {output}; against the table: servecast reproduce {out / 'scenario.yaml'}")
    return 0
