"""Wrong input gets one message: what, where (file and field path), what to do. A row a mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_scenarios import MINIMAL
from trace_formats import read_azure, read_burstgpt, read_mooncake, read_timed_trace

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.scenario.reported import read_rows
from servecast.sim.scenario.scenario import load
from servecast.sim.scenario.vllm_flags import parse_serve_command

SCENARIO = MINIMAL.replace("0.32", "0.23")
HASHED = '{"timestamp": %s, "input_length": %s, "output_length": 5, "hash_ids": [%s]}\n'


@dataclass(frozen=True)
class Case:
    """A mistake: ``call`` makes it in a fresh folder; the message must be exactly ``where: what. fix``,
    with the folder written as ``DIR``."""

    name: str
    call: Callable[[Path], Any]
    where: str
    what: str
    fix: str


def scenario(name: str, overrides: dict[str, Any], where: str, what: str, fix: str = "Correct it.") -> Case:
    """A scenario that is right but for some overrides."""

    def call(folder: Path) -> Any:
        (folder / "mine.yaml").write_text(SCENARIO)
        return load(folder / "mine.yaml", overrides)

    return Case(name, call, f"DIR/mine.yaml: {where}" if where else "DIR/mine.yaml", what, fix)


def text(name: str, content: str | bytes, where: str, what: str, fix: str) -> Case:
    """A scenario file that is no YAML, or not a scenario."""

    def call(folder: Path) -> Any:
        (folder / "mine.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return load(folder / "mine.yaml")

    return Case(name, call, where, what, fix)


def trace(
    name: str,
    read: Callable[[Path], Any],
    content: str | bytes,
    where: str,
    what: str,
    fix: str = "Correct or remove the line.",
) -> Case:
    """A trace file."""

    def call(folder: Path) -> Any:
        (folder / "trace").write_bytes(content.encode() if isinstance(content, str) else content)
        return read(folder / "trace")

    return Case(name, call, f"DIR/trace{where}", what, fix)


def command(name: str, line: str, what: str, fix: str) -> Case:
    """A pasted vllm serve line."""
    return Case(name, lambda _: parse_serve_command(line), "vllm serve", what, fix)


def reported(name: str, table: str, changes: dict[str, Any], where: str, what: str, fix: str) -> Case:
    """A reported table of a scenario."""

    def call(folder: Path) -> Any:
        (folder / "mine.yaml").write_text(SCENARIO)
        (folder / "table.csv").write_text(table)
        columns = {"ttft_p50_ms": {"metric": "ttft", "statistic": "p50", "unit": "ms"}}
        data = {"table": "table.csv", "keys": ["concurrency"], "columns": columns, **changes}
        return read_rows(load(folder / "mine.yaml", {"reported": [data]}).reported[0])

    return Case(name, call, where, what, fix)


LEVELS = {"workload.arrivals": None, "sweep": {"levels": [{"concurrency": 2}]}, "workload.num_requests": None}
CASES = [
    # scenarios
    Case(
        "unknown scenario",
        lambda _: load("a6000-qwen2.5-7"),
        "SCENARIO",
        "there is no scenario 'a6000-qwen2.5-7'",
        "Did you mean 'a6000-qwen2.5-7b'?",
    ),
    Case(
        "no such file",
        lambda folder: load(folder / "other.yaml"),
        "DIR/other.yaml",
        "there is no such file",
        "Check the path.",
    ),
    text(
        "broken YAML",
        SCENARIO + "slo: [ttft\n",
        "DIR/mine.yaml, line 12",
        "not valid YAML: expected ',' or ']', but got '<stream end>'",
        "Correct the line.",
    ),
    text(
        "not a mapping",
        "- a\n- b\n",
        "DIR/mine.yaml",
        "not a mapping of fields",
        "See the scenario reference.",
    ),
    text(
        "a key twice",
        SCENARIO + "name: b\n",
        "DIR/mine.yaml, line 11",
        "not valid YAML: the key 'name' comes twice",
        "Correct the line.",
    ),
    scenario(
        "another schema version",
        {"schema_version": 2},
        "schema_version",
        "the scenario has schema version 2, this servecast reads 1",
        "Update the file, or use the servecast that it was written for.",
    ),
    scenario(
        "unknown field",
        {"workload.promt_tokens": 5},
        "workload.promt_tokens",
        "unknown field 'promt_tokens'",
        "Did you mean 'prompt_tokens'?",
    ),
    scenario(
        "missing field",
        {"gpu": {}},
        "gpu",
        "a GPU needs one of name and file",
        "Give the name, for example a6000.",
    ),
    scenario(
        "missing rate",
        {"workload.arrivals": {"kind": "poisson"}},
        "workload.arrivals.request_rate",
        "field 'request_rate' is missing",
        "Add it.",
    ),
    scenario(
        "wrong unit",
        {"workload.duration_s": "10ms"},
        "workload.duration_s",
        "duration_s is a number without a unit, not '10ms'",
        "It is in seconds: write duration_s: 0.01",
    ),
    scenario(
        "bytes with a unit",
        {"engine.kv_cache_memory_bytes": "10GiB"},
        "engine.kv_cache_memory_bytes",
        "kv_cache_memory_bytes is a number without a unit, not '10GiB'",
        "It is in bytes: write kv_cache_memory_bytes: 10737418240",
    ),
    scenario(
        "a number as text",
        {"seed": "7"},
        "seed",
        "seed is a number without a unit, not '7'",
        "Write seed: 7",
    ),
    scenario(
        "negative rate",
        {"workload.arrivals.request_rate": -1},
        "workload.arrivals.request_rate",
        "request_rate should be greater than 0, not -1",
    ),
    scenario(
        "zero rate",
        {"workload.arrivals.request_rate": 0},
        "workload.arrivals.request_rate",
        "request_rate should be greater than 0, not 0",
    ),
    scenario(
        "infinite rate",
        {"workload.arrivals.request_rate": float("inf")},
        "workload.arrivals.request_rate",
        "request_rate should be a finite number, not inf",
    ),
    scenario(
        "no prompt",
        {"workload.prompt_tokens": 0},
        "workload.prompt_tokens",
        "prompt_tokens should be greater than or equal to 1, not 0",
    ),
    scenario(
        "a mistake in a field of two forms is one mistake",
        {"engine.max_model_len": -2},
        "engine.max_model_len",
        "max_model_len should be greater than or equal to 1, not -2",
    ),
    scenario(
        "two mistakes",
        {"engine.max_model_len": 0, "fleet.replicas": 1.5},
        "engine.max_model_len",
        "max_model_len should be greater than or equal to 1, not 0",
        "Correct it. (1 more after this one.)",
    ),
    scenario(
        "fractional count",
        {"fleet.replicas": 1.5},
        "fleet.replicas",
        "replicas should be a whole number, not 1.5",
    ),
    scenario(
        "unknown arrivals",
        {"workload.arrivals.kind": "poison"},
        "workload.arrivals",
        "'poison' is not a known kind",
        "Did you mean 'poisson'? Known: poisson, gamma, constant, vllm_bench, inference_perf, timestamps, "
        "profile, closed_loop.",
    ),
    scenario(
        "times that go backwards",
        {"workload.arrivals": {"kind": "timestamps", "times_s": [0, 2, 1]}},
        "workload.arrivals.times_s.2",
        "time 1.0 comes after 2.0",
        "Sort the times.",
    ),
    scenario(
        "no end",
        {"workload.num_requests": None},
        "workload",
        "the stream has no end",
        "Give num_requests or duration_s.",
    ),
    scenario(
        "all at once by time",
        {
            "workload.arrivals": {"kind": "vllm_bench", "request_rate": float("inf")},
            "workload.duration_s": 60,
        },
        "workload.duration_s",
        "these arrivals are a number of requests, not a duration",
        "Give num_requests instead.",
    ),
    scenario(
        "a level without an end",
        LEVELS,
        "sweep.levels.0",
        "the stream has no end",
        "Give num_requests or duration_s.",
    ),
    scenario(
        "half a lognormal",
        {"workload.prompt_tokens": {"kind": "lognormal", "mean": 100}},
        "workload.prompt_tokens",
        "a lognormal length with mean",
        "Give mean and std, or median and sigma.",
    ),
    scenario(
        "half a ramp-up",
        {"workload.arrivals": {"kind": "vllm_bench", "ramp_up_strategy": "linear"}},
        "workload.arrivals",
        "an incomplete ramp-up",
        "Give ramp_up_strategy, ramp_up_start_rps and ramp_up_end_rps.",
    ),
    scenario(
        "memory above the card's",
        {"engine.gpu_memory_utilization": 92},
        "engine.gpu_memory_utilization",
        "gpu_memory_utilization should be less than or equal to 1, not 92",
    ),
    scenario(
        "unknown router",
        {"fleet.router": "round-robbin"},
        "fleet.router",
        "router cannot be 'round-robbin'",
        "Did you mean 'round_robin'? Known: round_robin, random, least_outstanding, power_of_two, "
        "session_affinity, prefix_affinity, session_hashing, consistent_hashing, and the path of an "
        "EndpointPickerConfig (.yaml).",
    ),
    scenario(
        "SLO without a statistic",
        {"slo": ["ttft:500"]},
        "slo.0",
        "'ttft:500' is not an SLO",
        "Write metric:statistic:milliseconds, for example ttft:p95:500.",
    ),
    scenario(
        "missing trace",
        {"workload": {"trace": {"format": "azure", "path": "no.csv"}}},
        "workload.trace.path",
        "there is no file 'DIR/no.csv'",
        "Paths are relative to the scenario's folder.",
    ),
    scenario(
        "lengths beside a trace",
        {"workload.trace": {"format": "azure", "path": "mine.yaml"}},
        "workload.prompt_tokens",
        "prompt_tokens beside a trace",
        "Remove it: the trace has the lengths.",
    ),
    scenario(
        "an override of nothing",
        {"slo": [], "slo.0": "ttft:p95:500"},
        "",
        "there is nothing at '0' of 'slo.0'",
        "Give the field's dotted path.",
    ),
    # engine flags
    scenario(
        "version without rules",
        {"engine.version": "0.7"},
        "engine.version",
        "no rule set for vLLM '0.7'",
        "Use 0.10, 0.19, or 0.20 to 0.33, or set assume_rules to run under the nearest of them.",
    ),
    scenario(
        "flag of another version",
        {"engine.watermark": 0.01},
        "engine.watermark",
        "vLLM 0.23 has no watermark",
        "Remove it, or use version 0.24.",
    ),
    scenario(
        "pasted flag of another version",
        {"engine.command": "vllm serve m --max-num-queued-reqs 5"},
        "engine.command",
        "vLLM 0.23 has no --max-num-queued-reqs",
        "Remove it, or use version 0.29 to 0.33.",
    ),
    scenario(
        "pasted value out of range",
        {"engine.command": "vllm serve m --max-num-seqs 0"},
        "engine",
        "max_num_seqs should be greater than or equal to 1, not 0",
    ),
    command(
        "unknown flag",
        "vllm serve m --max-num-sequences 5",
        "vllm serve has no flag --max-num-sequences",
        "Did you mean '--max-num-seqs'?",
    ),
    command(
        "flag with no number",
        "vllm serve m --max-num-seqs=many",
        "--max-num-seqs takes a number, not 'many'",
        "Correct the value.",
    ),
    command(
        "flag without its value",
        "vllm serve m --max-num-seqs",
        "--max-num-seqs has no value",
        "Give its value after it.",
    ),
    command(
        "flag that is not modelled",
        "vllm serve m --prefill-context-parallel-size 2",
        "--prefill-context-parallel-size cannot be simulated",
        "Context parallelism of prompts is not modelled.",
    ),
    command(
        "another command",
        "vllm bench serve",
        "'vllm bench serve' is not a vllm serve command",
        "Paste it from 'vllm serve' on.",
    ),
    command(
        "open quote", "vllm serve 'm", "cannot be split into words: No closing quotation", "Check the quotes."
    ),
    # objectives
    Case(
        "SLO of an unknown latency",
        lambda _: SLO.parse("ttf:p95:500"),
        "--slo",
        "'ttf' in 'ttf:p95:500' is not a latency",
        "Did you mean 'ttft'?",
    ),
    Case(
        "SLO in seconds",
        lambda _: SLO.parse("ttft:p95:0.5s"),
        "--slo",
        "'0.5s' in 'ttft:p95:0.5s' is not a limit",
        "Limits are positive numbers of milliseconds, without the unit. Write 500.",
    ),
    Case(
        "SLO of an odd percentile",
        lambda _: SLO.parse("ttft:p100:500"),
        "--slo",
        "'p100' in 'ttft:p100:500' is not a statistic",
        "Write mean, or a percentile from p50 to p99.9.",
    ),
    Case(
        "goodput limit of zero",
        lambda _: Goodput.parse("ttft:0"),
        "--goodput",
        "'0' in 'ttft:0' is not a limit",
        "Limits are positive numbers of milliseconds, without the unit.",
    ),
    Case(
        "goodput limit twice",
        lambda _: Goodput.parse("ttft:5 ttft:6"),
        "--goodput",
        "ttft has two limits",
        "Give one.",
    ),
    # traces
    trace(
        "truncated JSONL",
        read_mooncake,
        HASHED % (0, 600, "0, 1") + '{"timestamp": 5, "inp',
        ", line 2",
        "not valid JSON (Unterminated string starting at: line 1 column 18 (char 17))",
        "Is the file cut off? Get it again.",
    ),
    trace(
        "trace with time going backwards",
        read_mooncake,
        HASHED % (5000, 600, "0, 1") + HASHED % (4000, 600, "0, 1"),
        ", line 2",
        "time goes backwards, from 5.0 s to 4.0 s",
        "Sort the file by time.",
    ),
    trace(
        "negative length",
        read_mooncake,
        HASHED % (0, -3, ""),
        ", line 1",
        "input_length is -3, not a whole number of at least 1 token",
    ),
    trace(
        "hash ids that do not fit",
        read_mooncake,
        HASHED % (0, 600, "0, 1, 2"),
        ", line 1",
        "3 hash_ids for 600 tokens in blocks of 512",
        "Give the file's block size as block_tokens.",
    ),
    trace(
        "timed trace without times",
        read_timed_trace,
        '{"input_length": 5, "output_length": 5}',
        ", line 1",
        "no 'timestamp'",
        "Is the line cut off, or the file of another format? Correct or remove it.",
    ),
    trace(
        "truncated CSV",
        read_azure,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17",
        ", line 3",
        "no 'ContextTokens'",
        "Is the line cut off, or the file of another format? Correct or remove it.",
    ),
    trace(
        "CSV with a broken time",
        read_azure,
        "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,4808,10\n",
        ", line 2",
        "TIMESTAMP is 'yesterday', not a date and time",
    ),
    trace(
        "CSV before its start",
        read_azure,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,10\n2023-11-16 18:17:02,48,10\n",
        ", line 3",
        "time goes backwards, to before the first request",
        "Sort the file by time.",
    ),
    trace(
        "CSV with no number",
        read_burstgpt,
        "Timestamp,Model,Request tokens,Response tokens\n5,ChatGPT,many,18\n",
        ", line 2",
        "Request tokens is 'many', not a number",
    ),
    trace("empty trace", read_mooncake, "", "", "no requests", "Give a file with at least one."),
    trace(
        "binary trace",
        read_azure,
        b"\xff\xfe\x00",
        "",
        "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        "Give a readable UTF-8 text file.",
    ),
    # reported tables
    reported(
        "table without a column",
        "concurrency,ttft_ms\n1,5\n",
        {},
        "DIR/table.csv",
        "there is no column 'ttft_p50_ms'",
        "Did you mean 'ttft_ms'?",
    ),
    reported(
        "column that nothing explains",
        "concurrency,ttft_p50_ms,extra\n1,5,6\n",
        {},
        "DIR/table.csv",
        "nothing says what column 'extra' is",
        "Add it to keys, columns or inputs of the reported table.",
    ),
    reported(
        "row to fit that is not there",
        "concurrency,ttft_p50_ms\n1,5\n",
        {"fit_rows": [{"concurrency": 2}]},
        "DIR/table.csv",
        "no row with concurrency 2",
        "Name a row by its keys.",
    ),
    reported(
        "cell that is no number",
        "concurrency,ttft_p50_ms\n1,fast\n",
        {},
        "DIR/table.csv, line 2",
        "ttft_p50_ms is 'fast', not a number",
        "Correct it, or leave it empty.",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_gets_one_clear_message(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        case.call(tmp_path)
    error = caught.value
    told = [part.replace(str(tmp_path), "DIR") for part in (error.where, error.what, error.fix)]
    assert told == [case.where, case.what, case.fix]
    assert str(error) == f"{error.where}: {error.what}. {error.fix}"
