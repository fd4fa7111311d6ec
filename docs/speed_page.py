"""The page of measured speeds, from results/speed.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = """# Speed

How fast a simulation is and what it holds, on {machine}; `make benchmark` measures your machine and
renews this page. Times are CPU time of one core in `servecast.simulate`, percentiles included, the median of
five runs that take turns. The model is Llama-3.1-8B on H100s with 256 sequences, the engine {engine}.
Meanwhile the machine carried a load of {load:g} on its {cores} cores: where that is more than 1 a core, it is
slower than it can be, and the rows are to be read beside each other.

| workload | requests a CPU second | aim | requests running | steps a request |
|---|---|---|---|---|
{rows}

Fleets get 40 requests a second and replica, of 32 prefixes of 700 tokens.

## What bounds it

- **Long outputs.** vLLM's loop visits every running request in every step, and so does this one: 2,000 output
  tokens cost 2,000 visits, of {token_ns:.0f} ns each here.
- **Routers.** What all replicas show is kept in columns that change with a scrape or an event, so a pick
  costs about as much for 256 replicas as for 64. What is left is the picker itself, in Python.
- **Several clients, a limit of requests in flight, faults.** Events of requests are in one compiled heap;
  SimPy has the stages, timers, and the life of replicas alone.

## A million requests

{million_requests:,} requests of 1,000 tokens in and 250 out, lognormal, 700 of them in one of 32 shared
prefixes, on four replicas behind `precise-prefix-cache-scorer`: {wall_s:.0f} s of wall time, {cpu_s:.0f} s of
CPU, {gigabytes:.2f} GB: {rate:,.0f} requests a CPU second. On work of this kind BLIS is reported at 490 to
2,780 requests a CPU second, Vidur at 390 to 730. Most of the memory is the table of steps, of which such a
fleet makes several a request.

## A plan

`servecast plan a6000-qwen2.5-7b --slo ttft:p95:500 --slo tpot:p95:60` sends 210,000 requests in 87 runs. It
takes 3.8 s of CPU when it is run again: user and system, the median of four, at a load of 4 on 2 cores. Half
of it are the runs and what is read off them, a quarter is the start, a fifth the plots of the page.

## Growth

256 tokens in, 128 out, near saturation, each in a fresh process; bytes are the most that the process held,
less those of an almost empty run.

| requests | CPU s | requests a CPU second | bytes a request |
|---|---|---|---|
{growth}
"""


def page(results: Path) -> str:
    """The page. results: what ``make benchmark`` wrote."""
    document: dict[str, Any] = json.loads(results.read_text("utf-8"))
    rows, million = document["rows"], document["million"]
    long_outputs = next(row for row in rows if "2,000 out" in row["name"])
    return TEXT.format(
        machine=document["machine"],
        engine="compiled" if document["compiled"] else "interpreted",
        load=document["load"],
        cores=document["cores"],
        rows="\n".join(_row(row) for row in rows),
        token_ns=1e9 / long_outputs["requests_per_cpu_s"] / 2000,
        million_requests=million["requests"],
        wall_s=million["wall_s"],
        cpu_s=million["cpu_s"],
        gigabytes=million["bytes"] / 1e9,
        rate=million["requests_per_cpu_s"],
        growth="\n".join(
            f"| {each['requests']:,} | {each['cpu_s']:.1f} | {each['requests_per_cpu_s']:,.0f} | "
            f"{each['bytes_per_request']:,} |"
            for each in document["growth"]
        ),
    )


def _row(row: dict[str, Any]) -> str:
    aim = "" if row["aim"] is None else f"{row['aim']:,}"
    cells = (
        row["name"],
        f"{row['requests_per_cpu_s']:,.0f}",
        aim,
        row["mean_running"],
        row["steps_per_request"],
    )
    return f"| {' | '.join(map(str, cells))} |"
