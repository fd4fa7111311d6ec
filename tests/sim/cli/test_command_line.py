"""The command line: what it prints, writes and answers to bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from small_scenarios import scenario_file

from servecast.__main__ import COMMANDS, main
from servecast.sim.run.results import check_output, read_result, write_result

SERVECAST = Path(sys.executable).with_name("servecast")
CONTEXT = {
    "commit": "abc",
    "gpu": "1x L4",
    "machine": "m",
    "driver_cuda": "d",
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "dtype": "bfloat16",
    "vllm_version": "0.23.0",
    "server_args": "none",
    "request_shape": "64 in, 8 out",
    "load_pattern": "Poisson",
}
ANSWER = {"name": "answer", "value": 8, "origin": "a guess", "field": "workload.output_tokens"}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(scenario_file(tmp_path, slo=["ttft:p95:100"], run_context=CONTEXT, assumptions=[ANSWER]))


def servecast(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SERVECAST, *arguments], capture_output=True, text=True)


# help, and how fast the command is


def test_help_lists_every_command_without_importing_any() -> None:
    code = (
        "import sys\n"
        "from servecast.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'numpy', 'pandas', 'scipy', 'pydantic', 'matplotlib', 'joblib'}\n"
        "print(sorted(name for name in sys.modules if name in heavy or name.startswith("
        "('servecast.calibrate', 'servecast.validate'))), file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr == "[]\n"
    for name, (_, text) in COMMANDS.items():
        assert f"{name}: {text}" in found.stdout


@pytest.mark.parametrize("command", ["simulate", "plan", "reproduce", "compare", "sweep"])
def test_help_of_a_command_says_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: servecast {command}" in text
    for option in ("--json", "--set", "--gpu", "--model-config", "--seed", "--router", "--replicas"):
        assert option in text
    assert "--no-json" not in text


def test_simulating_imports_neither_calibrate_nor_validate(tiny: str) -> None:
    code = (
        "import sys\n"
        "from servecast.__main__ import main\n"
        f"assert main(['simulate', {tiny!r}]) == 0\n"
        "packages = ('servecast.calibrate', 'servecast.validate', 'torch', 'vllm')\n"
        "assert not [name for name in sys.modules if name.startswith(packages)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# simulate


def test_simulate_prints_the_block_of_vllm_bench_and_where_it_comes_from(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", tiny]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("============ Serving Benchmark Result ============\nSuccessful requests:")
    assert "P99 TTFT (ms):" in out
    assert "vllm_version   0.23.0" in out  # the run context
    assert "kernels of the L40S scaled to the L4 by peak and bandwidth" in out
    assert "+-33%" in out
    assert "profile l4-qwen2.5-0.5b was fitted to a server on this GPU" in out
    assert err == ""


def test_simulate_prints_a_row_a_stage_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "l4-qwen2.5-0.5b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["stage", "done", "req/s", "tok/s"]
    rows = {line.split()[0]: line.split()[1] for line in lines[1:7]}
    assert rows == {f"concurrency={n}": str(min(20 * n, 320)) for n in (1, 2, 4, 8, 16, 32)}


def test_json_is_alone_on_stdout_and_has_the_keys_of_vllm_bench(tiny: str) -> None:
    found = servecast("simulate", tiny, "--json", "--set", "engine.max_num_seqs=2", "--save-detailed")
    assert found.returncode == 0
    assert found.stderr == ""
    document = json.loads(found.stdout)
    assert document["completed"] == 60
    assert document["total_output_tokens"] == 480
    assert document["p99_ttft_ms"] > document["median_ttft_ms"] > 0
    assert document["max_num_running"] == 2
    assert document["what_if"] == {"engine.max_num_seqs": 2}
    assert document["engine"]["max_num_seqs"] == 2
    assert document["run_context"]["commit"] == "abc"
    assert document["assumptions"][0]["name"] == "answer"
    assert (document["schema_version"], document["seed"], document["engine_version"]) == (1, 0, "0.23")
    assert document["provenance"]["basis"] == "kernels of the L40S scaled to the L4 by peak and bandwidth"
    assert len(document["ttfts"]) == len(document["input_lens"]) == len(document["start_times"]) == 60


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tiny: str, tmp_path: Path) -> None:
    """In this process and in another, whose hashes are salted otherwise."""

    def write(name: str, seed: str, *, apart: bool = False) -> list[bytes]:
        files = [tmp_path / name / file for file in ("result.json", "requests.csv", "steps.parquet")]
        options = zip(("--output", "--records", "--steps"), map(str, files), strict=True)
        command = ("simulate", tiny, "--seed", seed, *chain(*options))
        assert (servecast(*command).returncode if apart else main(list(command))) == 0
        return [file.read_bytes() for file in files]

    first = write("a", "3")
    assert write("b", "3", apart=True) == first
    assert all(ours != theirs for ours, theirs in zip(write("c", "4"), first, strict=True))
    written = tmp_path / "a"
    assert len(list(written.iterdir())) == 3
    assert json.loads(first[0])["seed"] == 3
    assert len(pd.read_csv(written / "requests.csv")) == 60
    assert pd.read_parquet(written / "steps.parquet")["emitted"].sum() == 480


def test_request_rate_replaces_the_workload(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", tiny, "--json", "--request-rate", "5", "--num-requests", "40"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_prompts"], document["request_rate"]) == (40, 5.0)


def test_what_if_flags_are_the_same_as_the_fields_they_stand_for(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpu", "h100", "--replicas", "2", "--router", "least_outstanding", "--engine-version", "0.32"]
    flags += ["--model-config", "Qwen2.5-7B-Instruct", "--tensor-parallel-size", "2"]
    assert main(["simulate", tiny, "--json", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpu"] == "H100"
    assert document["model_id"] == "Qwen/Qwen2.5-7B-Instruct"
    assert document["fleet"] == {"replicas": 2, "router": "least_outstanding"}
    assert (document["engine_version"], document["engine"]["tensor_parallel_size"]) == ("0.32", 2)
    fields = ["gpu.name=h100", "fleet.replicas=2", "fleet.router=least_outstanding", "engine.version=0.32"]
    fields += ["model.config=Qwen2.5-7B-Instruct", "engine.tensor_parallel_size=2"]
    assert main(["simulate", tiny, "--json", *(f"--set={field}" for field in fields)]) == 0
    same = json.loads(capsys.readouterr().out)
    assert {**same, "what_if": None} == {**document, "what_if": None}


# plan


QUICK = ("--tolerance", "0.3", "--max-num-requests", "300", "--jobs", "1")


def test_plan_answers_in_json_with_its_evidence(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", tiny, *QUICK, "--json", "--sensitivity", "--target-rate", "1000"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    low, high = document["interval"]
    assert low == document["max_request_rate"] < high <= low * 1.3 * (1 + 1e-9)
    assert document["slo"] == ["ttft:p95:100"]  # the scenario's own
    assert document["binding_limit"] != "unknown"
    assert document["binding_evidence"]
    assert document["knee"]["request_rate"] > 0
    assert document["knee"]["concurrency"] is None  # the scenario sweeps no concurrency
    states = {probe["rate"]: probe["state"] for probe in document["probes"]}
    assert (states[low], states[high]) == ("pass", "fail")
    assert document["sizes"][0]["replicas"] == -(-1000 // low)
    assert document["error_band"] == pytest.approx(0.3 + 0.02 * math.log2(864 / 300))
    assert document["report"] is None
    less, more = document["sensitivity"]  # of the answer's length: 8 tokens, hence 6 and 10
    assert (less["scaled"], more["scaled"]) == (6, 10)
    assert less["max_request_rate"] > 0 > more["max_request_rate"]
    assert more["values"]["ttft:p95:100"] > less["values"]["ttft:p95:100"]


def test_plan_prints_the_answer_and_writes_the_report(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", tiny, *QUICK, "--gpu-hour-cost", "0.7"]) == 0
    out = capsys.readouterr().out
    for said in ("Largest request rate: ", "What binds: ", "Knee: ", "A million tokens: "):
        assert said in out
    assert out.endswith("Report: out/plan-tiny.html\n")
    assert "tiny" in (tmp_path / "out" / "plan-tiny.html").read_text()


def test_every_what_if_has_a_report_of_its_own(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for changes in ([], ["--set", "engine.max_num_seqs=8", "--set", "workload.prompt_tokens=70"]):
        main(["plan", tiny, *QUICK, *changes])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "plan-tiny-engine.max_num_seqs=8-workload.prompt_tokens=70.html",
        "plan-tiny.html",
    ]


def test_simulate_says_that_more_is_sent_than_is_served(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queue of one seat: 20 requests a second, of which each takes some 40 ms alone."""
    said = {}
    for seats in (1, 64):
        main(
            [
                "simulate",
                tiny,
                "--json",
                "--set",
                f"engine.max_num_seqs={seats}",
                "--num-requests",
                "200",
                "--request-rate",
                "30",
            ]
        )
        notes = json.loads(capsys.readouterr().out)["notes"]
        said[seats] = [note for note in notes if "more than is served" in note]
    assert len(said[1]) == 1
    assert said[64] == []


def test_records_name_their_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = {
        "arrivals": {"kind": "poisson", "request_rate": 20},
        "num_requests": 5,
        "prompt_tokens": 8,
        "output_tokens": 2,
    }
    stages = [{"name": name, "streams": [stream]} for name in ("slow", "fast")]
    file = scenario_file(tmp_path, workload={"stages": stages})
    assert main(["simulate", str(file), "--records", str(tmp_path / "r.csv")]) == 0
    assert pd.read_csv(tmp_path / "r.csv")["stage_name"].tolist() == ["slow"] * 5 + ["fast"] * 5


def test_plan_exits_with_1_where_nothing_meets_the_slo(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    impossible = ("--slo", "ttft:p95:0.1", "--set", "workload.output_tokens=1")
    assert main(["plan", tiny, *QUICK, "--json", *impossible]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["max_request_rate"]) == ("infeasible", None)


def test_plan_takes_goodput_as_vllm_bench_does(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--goodput", "ttft:100", "tpot:20", "--attainment", "0.9"]
    assert main(["plan", tiny, *QUICK, "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["objectives"] == {"slos": [], "goodput": "ttft:100 tpot:20", "attainment": 0.9}


# reproduce


def test_reproduce_prints_and_writes_the_object_of_every_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cells.json"
    assert main(["reproduce", "l4-qwen2.5-0.5b", "--jobs", "1", "--json", "--output", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert file.read_text() == out
    document = json.loads(out)
    assert {"fitted_rows", "predicted_rows", "rows", "mape_predicted"} <= set(document)


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulat"], "there is no command 'simulat'. Did you mean 'simulate'?"),
        (["simulate"], "SCENARIO requires an argument"),
        (["simulate", "a6000"], "SCENARIO: there is no scenario 'a6000'."),
        (["simulate", "missing.yaml"], "missing.yaml: there is no such file."),
        (["simulate", "TINY", "--bogus", "1"], "Unknown option: --bogus."),
        (["simulate", "TINY", "more"], "Unused Tokens: ['more']"),
        (["simulate", "TINY", "--seed", "x"], 'Invalid value for --seed: unable to convert "x" into int.'),
        (["simulate", "TINY", "--seed", "-1"], "seed should be greater than or equal to 0, not -1."),
        (["simulate", "TINY", "--set", "engine"], "--set: 'engine' is not of the form FIELD=VALUE."),
        (["simulate", "TINY", "--set", "engine..x=1"], "--set: 'engine..x=1' is not of the form"),
        (["simulate", "TINY", "--set", "slo=[1"], "--set: '[1' is not a value."),
        (["simulate", "TINY", "--set", "engine.max_num_seq=1"], "Did you mean 'max_num_seqs'?"),
        (
            ["simulate", "TINY", "--set", "workload.arrivals.request_rate=-2"],
            "request_rate should be greater",
        ),
        (["simulate", "TINY", "--gpu", "l44"], "'l44'"),
        (["simulate", "TINY", "--profile", "none"], "there is no profile 'none'."),
        (["simulate", "TINY", "--router", "randon"], "Did you mean 'random'? Known: round_robin, random"),
        (["simulate", "TINY", "--records", "r.xlsx"], "--records: 'r.xlsx' is no table."),
        (["simulate", "TINY", "--output", "TINY/r.json"], "--output: 'TINY/r.json' cannot be written."),
        (["simulate", "TINY", "--metric-percentiles", "p95"], "--metric-percentiles: 'p95' is no list"),
        (["simulate", "TINY", "--warmup", "some"], "--warmup: cannot read 'some'."),
        (["simulate", "TINY", "--request-rate", "0"], "--request-rate: 0 is not a rate."),
        (["plan", "TINY", "--slo", "ttft:500"], "--slo: 'ttft:500' is not an SLO."),
        (["plan", "TINY", "--slo", "ttft:p95:0.5s"], "Write 500."),
        (["plan", "TINY", "--slo", "latency:p95:5"], "--slo: 'latency' in 'latency:p95:5' is not a latency."),
        (["plan", "TINY", "--goodput", "ttft=500"], "--goodput: 'ttft=500' is not a goodput limit."),
        (["plan", "TINY", "--attainment", "95"], "--attainment: 95 is not a share"),
        (["plan", "TINY", "--jobs", "0"], "--jobs: 0 processes."),
        (["plan", "TINY", "--target-rate", "-5"], "--target-rate: -5 is not positive"),
        (["plan", "TINY", "--report", "TINY/r.html"], "--report: 'TINY/r.html' cannot be written."),
        (["compare", "TINY"], "B: there is nothing to compare with."),
        (["compare", "TINY", "--routers", "round_robin"], "at least two of them"),
        (["compare", "TINY", "--routers", "round_robin", "least_outstanding"], "Add --replicas 4."),
        (["compare", "a.json", "b.json"], "a.json: cannot be read: No such file or directory. Give"),
        (["check", "a.csv"], "a.csv: cannot be read: No such file or directory. Give a CSV file."),
        (["simulate", "TINY", "--num-requests", "5"], "--num-requests: 5 requests at no rate"),
        (["explain", "TINY", "--statistic", "std"], "statistic: std is a spread"),
        (["sweep", "TINY"], "--vary: nothing varies."),
        (["sweep", "TINY", "--vary", "x"], "--vary: 'x' is not of the form FIELD=VALUE."),
        (["sweep", "TINY", "--rates", "5,fast"], "--rates: '5,fast' is no list of numbers above 0."),
        (
            ["sweep", "TINY", "--seeds", "2", "--num-requests", "7"],
            "Give --rates with it, or --set workload.",
        ),
        (["sweep", "TINY", "--seeds", "0"], "--seeds: 0 is too few."),
        (["sweep", "TINY", "--seeds", "2", "--backend", "threads"], "--backend"),
        (["sweep", "TINY", "--seeds", "2", "--backend", "dask"], "--dask-scheduler: dask needs the address"),
    ],
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([word.replace("TINY", tiny) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("servecast: ")
    assert err.count("\n") == 1
    assert message.replace("TINY", tiny) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_is_no_traceback(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("servecast.sim.run.simulation.run_of", interrupted)
    assert main(["simulate", tiny]) == 130
    assert capsys.readouterr().err == "servecast: interrupted\n"


# result files


def test_results_of_another_schema_version_are_refused(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = tmp_path / "ours.json", tmp_path / "other.json"
    assert main(["simulate", tiny, "--output", str(ours)]) == 0
    document = read_result(ours)
    write_result(other, {**document, "schema_version": 2})
    assert main(["compare", str(ours), str(other)]) == 2
    assert capsys.readouterr().err == (
        f"servecast: {other}: schema_version: schema version 2, this servecast reads 1. "
        "Write the result again with this version of servecast.\n"
    )


def test_a_result_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_result(path, {"a": 1.5, "b": float("nan")})
    with pytest.raises(TypeError):
        write_result(path, {"a": object()})
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    check_output(tmp_path / "new" / "folder" / "r.json", where="--output")


def test_compare_says_which_tools_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file in files:
        file.write_text('{"schema_version": "1.3", "aiperf_version": "0.10.0", "input_config": {}}')
    assert main(["compare", *map(str, files)]) == 2
    said = capsys.readouterr().err
    assert "is a result of aiperf; this reads those of servecast simulate and of vllm bench serve" in said
