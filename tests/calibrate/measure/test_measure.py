"""Measuring: folders that survive a kill, budgets, grids, recorded steps, servers and what is said when they
fail. None of it needs vLLM: a stand-in package answers where one is started."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from places import REPOSITORY as ROOT
from places import VLLM

from servecast.__main__ import main
from servecast.calibrate.measure.engine.grid import STEPS_AHEAD, Case, Limits, grid
from servecast.calibrate.measure.engine.steps import Step, StepRecorder
from servecast.calibrate.measure.errors import MeasureError
from servecast.calibrate.measure.facts import collect
from servecast.calibrate.measure.folder import Budget, Folder, Progress, Row, read_facts, read_rows
from servecast.calibrate.measure.served import OUTPUT_TOKENS, SHORTEST, overheads
from servecast.calibrate.measure.turns import complaints, in_turn, trusted
from servecast.calibrate.measure.vllm.bench_serve import Server, TookTooLongError, run_bench
from servecast.calibrate.measure.vllm.ending import heeds_ctrl_c
from servecast.calibrate.measure.vllm.server import VllmServer
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model, write_tokenizer
from servecast.sim.inputs.errors import InputError

FACTS = {"schema_version": 1, "gpu": "cpu", "torch": "2.13.0", "vllm": "0.32.0"}


def _rows(folder: Path) -> list[str]:
    return [row["case"] for row in read_rows(folder / "engine.jsonl")]


# -- folder -------------------------------------------------------------------------------------------


def test_rows_are_on_disk_when_they_are_added(tmp_path: Path) -> None:
    with Folder(tmp_path / "new" / "one", "engine.jsonl", FACTS) as folder:
        assert not list(folder.path.iterdir()), "nothing is written before there is something to write"
        folder.add({"row": "step", "case": "a", "times_s": [0.1]})
        assert _rows(folder.path) == ["a"]
        assert read_facts(folder.path) == FACTS
        folder.add({"row": "step", "case": "b"}, {"row": "step", "case": "c"})
        assert folder.cases == {"a", "b", "c"}
    assert all(row["at"] > 1e9 for row in read_rows(folder.path / "engine.jsonl"))


MEASURE = """
import sys, time
from pathlib import Path
from servecast.calibrate.measure.folder import Folder
with Folder(Path(sys.argv[1]), "engine.jsonl", {facts!r}, resume=True) as folder:
    for number in range(40):
        if str(number) not in folder.cases:
            time.sleep(0.02)
            folder.add({{"row": "step", "case": str(number), "times_s": [0.02]}})
            print(number, flush=True)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE.format(facts=FACTS), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for _ in range(5):
            run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    kept = _rows(tmp_path)
    assert 5 <= len(kept) < 40
    with (tmp_path / "engine.jsonl").open("a") as file:
        file.write('{"row":"step","case":"17","tim')  # cut off in the middle of a line
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "was cut off" in again.stderr
    assert _rows(tmp_path) == [str(number) for number in range(40)]


def test_a_cut_off_line_is_dropped_and_said(tmp_path: Path) -> None:
    file, said = tmp_path / "engine.jsonl", list[str]()
    file.write_text('{"row":"step","case":"a"}\n{"row":"step","ca')
    assert [row["case"] for row in read_rows(file, warn=said.append)] == ["a"]
    assert said == [f"{file}: line 2 was cut off while it was written; dropped"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"row": "step"}', "step"])
def test_a_broken_line_inside_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "engine.jsonl"
    file.write_text(f'{line}\n{{"row":"step","case":"a"}}\n')
    with pytest.raises(MeasureError, match="line 1 is no measured row"):
        read_rows(file)
    with pytest.raises(MeasureError, match="line 1"):
        Folder(tmp_path, "engine.jsonl", FACTS, resume=True)
    assert file.read_text().startswith(line), "nothing is lost"


@pytest.mark.parametrize("name", ["gpu", "torch", "vllm"])
def test_another_machine_is_refused(tmp_path: Path, name: str) -> None:
    with Folder(tmp_path, "engine.jsonl", FACTS) as folder:
        folder.add({"row": "step", "case": "a"})
    with pytest.raises(MeasureError, match=f"was measured with {name}"):
        Folder(tmp_path, "kernels.jsonl", FACTS | {name: "other"}, resume=True)
    assert _rows(tmp_path) == ["a"]


def test_rows_of_before_need_resume(tmp_path: Path) -> None:
    with Folder(tmp_path, "engine.jsonl", FACTS) as folder:
        folder.add({"row": "step", "case": "a"})
    with pytest.raises(MeasureError, match=r"has 1 rows already.*--resume"):
        Folder(tmp_path, "engine.jsonl", FACTS)
    with Folder(tmp_path, "kernels.jsonl", FACTS) as folder:  # another file of the same machine
        assert not folder.cases


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', "{}"])
def test_facts_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(MeasureError, match="not the facts"):
        read_facts(tmp_path)


def test_facts_of_this_machine() -> None:
    facts = collect()
    assert facts["schema_version"] == 1
    assert facts["memory_bytes"] > 1 << 28
    assert json.loads(json.dumps(facts)) == facts


# -- budget and progress ------------------------------------------------------------------------------


def test_budget() -> None:
    now = [100.0]
    budget = Budget(10, clock=lambda: now[0])
    assert budget.fits(10)
    now[0] = 107.0
    assert (budget.spent_s, budget.left_s) == (7.0, 3.0)
    assert budget.fits(3)
    assert not budget.fits(3.1)
    assert Budget(None).fits(1e9)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MeasureError, match="--time-budget"):
            Budget(wrong)


def test_progress_says_what_is_left() -> None:
    now, out = [0.0], io.StringIO()
    progress = Progress(4, Budget(None, clock=lambda: now[0]), out)
    for case in "abcd":
        now[0] += 60
        progress.done(case)
    assert out.getvalue().splitlines() == [
        "1/4 measured, about 3 min left: a",
        "2/4 measured, about 2 min left: b",
        "3/4 measured, about 60 s left: c",
        "4/4 measured, about 0 s left: d",
    ]


# -- grid ---------------------------------------------------------------------------------------------

SMALL = Limits(8, 256, 512, 2048, 128)
USUAL = Limits(256, 8192, 32_768, 400_000, 16)


@pytest.mark.parametrize(
    "limits", [SMALL, USUAL, Limits(1, 64, 256, 512, 16), Limits(512, 16384, 131072, 10**7, 16)]
)
def test_a_grid_keeps_the_limits(limits: Limits) -> None:
    cases, skipped = grid(limits)
    assert len({case.key for case in cases}) == len(cases) > 10
    assert not {case.key for case in cases} & skipped.keys()
    for case in cases:
        assert case.too_much(limits) is None
        tokens = len(case.contexts) + sum(new for new, _ in case.chunks)
        assert tokens <= limits.max_num_batched_tokens
        assert len(case.contexts) + len(case.chunks) <= limits.max_num_seqs
        assert sum(case.contexts) + STEPS_AHEAD * len(case.contexts) <= limits.kv_tokens
        assert all(
            new > 0 and before >= 0 and new + before < limits.max_model_len for new, before in case.chunks
        )
    assert grid(limits) == (cases, skipped), "the same order every time, or --resume would be another grid"


def test_a_grid_begins_with_what_matters_most() -> None:
    cases, _ = grid(USUAL)
    first = cases[:30]
    assert {case.region for case in first} == {
        *("decode", "decode_ragged", "prefill", "prefill_context", "mixed", "long_run")
    }
    batches = {len(case.contexts) for case in first}
    assert {1, 256} <= batches
    assert {16, 8192} <= {case.chunks[0][0] for case in first if case.chunks}
    assert {180, 44} <= {len(case.contexts) for case in cases}, "between CUDA-graph sizes"


def test_a_case_that_does_not_fit_says_why() -> None:
    assert "max_num_seqs is 8" in str(Case("decode", contexts=(10,) * 9).too_much(SMALL))
    assert "max_num_batched_tokens is 256" in str(Case("prefill", chunks=((300, 0),)).too_much(SMALL))
    assert "max_model_len is 512" in str(Case("decode", contexts=(500,)).too_much(SMALL))
    assert "the pool has 2048" in str(Case("decode", contexts=(400,) * 8).too_much(SMALL))


# -- recorded steps -----------------------------------------------------------------------------------


class _Scheduler:
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "outputs"


class _Recorder(StepRecorder, _Scheduler):
    pass


def _output(new: dict[str, int], cached: dict[str, int], tokens: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=c) for n, c in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values())
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def test_steps_are_what_the_scheduler_decided() -> None:
    recorder = _Recorder()
    prompts = {"a": 100, "b": 300, "c": 50}
    for output in (
        _output({"a": 99, "b": 0}, {}, {"a": 1, "b": 200}),  # a: its last prompt token; b: a first chunk
        _output({"c": 0}, {"a": 100, "b": 200}, {"a": 1, "b": 100, "c": 50}),
        _output({}, {"a": 101, "b": 300}, {"a": 1, "b": 1}),
        _output({}, {}, {}),  # nothing left to run
    ):
        assert recorder.update_from_output(output, None) == "outputs"
    assert recorder.recorded == 4
    first, second, third = recorder.take(prompts)
    assert recorder.take(prompts) == []
    assert first == Step(((1, 99), (200, 0)), 0, 0, 1, None)
    assert (second.chunks, second.decodes, second.decode_context, second.samples) == (
        ((100, 200), (50, 0)),
        1,
        101,
        3,
    )
    assert (third.chunks, third.decodes, third.decode_context, third.samples) == ((), 2, 102 + 301, 2)
    assert second.seconds is not None
    assert second.seconds >= 0


# -- served overheads ---------------------------------------------------------------------------------


def _recording(prompts: list[int], *, sent_ns: int, takes_ns: int, step_ns: int) -> str:
    """Requests received ``takes_ns`` after they were sent, then prefilled and decoded in the same steps."""
    lines: list[list[Any]] = [["engine", {}]]
    for n, prompt in enumerate(prompts):
        lines += [
            ["received", sent_ns + takes_ns, n],
            ["add", sent_ns + takes_ns, n, prompt, OUTPUT_TOKENS, 0, []],
        ]
    clock = sent_ns + takes_ns
    for token in range(OUTPUT_TOKENS):
        scheduled = [[n, 1 if token else p, p + token - 1 if token else 0] for n, p in enumerate(prompts)]
        lines.append(["schedule", clock, clock, scheduled, [], 0])
        clock += step_ns
        lines.append(["update", clock, clock, [], len(prompts)])
    return "".join(json.dumps(line) + "\n" for line in [*lines, ["cost", 1, 1]]) + '["sched'


def _result(prompts: list[int], *, first_s: float, gap_s: float) -> dict[str, Any]:
    return {
        "start_times": [100.0] * len(prompts),
        "input_lens": prompts,
        "ttfts": [first_s] * len(prompts),
        "itls": [[gap_s] * (OUTPUT_TOKENS - 1)] * len(prompts),
    }


def test_overheads_are_what_the_engine_did_not_take() -> None:
    prompts = [SHORTEST, SHORTEST + 1]
    recorded = _recording(prompts, sent_ns=100 * 10**9, takes_ns=4_000_000, step_ns=20_000_000)
    rows = list(overheads(_result(prompts, first_s=0.027, gap_s=0.020), recorded, 2))
    assert [row["kind"] for row in rows] == ["request_in", "token_out", "token_out"]
    assert rows[0]["times_s"] == pytest.approx([0.004] * 2)
    for row, count in zip(rows[1:], (2, 2 * (OUTPUT_TOKENS - 1)), strict=True):
        assert row["burst"] == 2
        assert row["times_s"] == pytest.approx([0.003] * count)


def test_what_is_on_its_way_at_a_time_is_counted_and_first_tokens_are_told_apart() -> None:
    """Three requests, one of them sent when the others have their first tokens; the server merges the last
    two tokens of one of them."""
    prompts, ns = [SHORTEST, SHORTEST + 1, SHORTEST + 2], 10**6
    lines: list[list[Any]] = [["engine", {}]]
    for n, sent in enumerate((0, 1, 50)):
        lines += [["received", (sent + 4) * ns, n], ["add", (sent + 4) * ns, n, prompts[n], 3, 0, []]]
    batches = [(0, 1), (0, 1, 2), (0, 1, 2), (2,)]
    given = dict.fromkeys(range(3), 0)
    for step, batch in enumerate(batches):
        scheduled = []
        for n in batch:
            scheduled.append([n, 1 if given[n] else prompts[n], prompts[n] + given[n] - 1 if given[n] else 0])
            given[n] += 1
        lines += [["schedule", 0, 0, scheduled, [], 0], ["update", 0, (40 + 20 * step) * ns, [], len(batch)]]
    recorded = "".join(json.dumps(line) + "\n" for line in lines) + "cut"
    result = {
        "start_times": [0.0, 0.001, 0.050],
        "input_lens": prompts,
        "ttfts": [0.042, 0.041, 0.013],
        "itls": [[0.020, 0.020], [0.040], [0.020, 0.020]],
    }
    rows = list(overheads(result, recorded, 3))
    into = {row["burst"]: row["times_s"] for row in rows if row["kind"] == "request_in"}
    assert into == {1: pytest.approx([0.004]), 2: pytest.approx([0.004] * 2)}
    out = {(row["first"], row["burst"], row["firsts"]): row["times_s"] for row in rows[len(into) :]}
    assert {key: len(times) for key, times in out.items()} == {
        (True, 2, 2): 2,
        (True, 3, 1): 1,
        (False, 3, 1): 1,
        (False, 3, 0): 2,
        (False, 1, 0): 1,
    }
    assert {row["lumped"] for row in rows} == {0.333}


# -- turns --------------------------------------------------------------------------------------------


def _turn(in_ms: float, out_ms: float = 2.0, lumped: float = 0.0) -> list[Row]:
    shared = {"row": "overhead", "lumped": lumped}
    return [
        shared | {"kind": "request_in", "burst": 1, "times_s": [in_ms / 1000] * 3},
        shared | {"kind": "token_out", "first": True, "burst": 1, "times_s": [out_ms / 1000] * 3},
        shared | {"kind": "token_out", "first": False, "burst": 1, "times_s": [out_ms / 1000] * 9},
    ]


@pytest.mark.parametrize(
    ("says", "turns", "counted", "complaint"),
    [
        ((8, 9), 2, {1, 2}, None),
        ((80, 9, 9.5), 3, {2, 3}, None),  # the first minute of a server
        ((80, 78), 2, {1, 2}, None),  # or a slow front end: no turn knows better
        ((9, 60, 75, 10), 4, {1, 4}, None),
        ((40, 90, 180, 9), 4, {4}, "spent 42.0, 92.0, 182.0, 11.0 ms outside of the engine, turn by turn"),
    ],
)
def test_the_quietest_turn_counts_once_another_confirms_it(
    says: tuple[float, ...], turns: int, counted: set[int], complaint: str | None
) -> None:
    measured = list(in_turn([4], lambda _load, turn: _turn(says[turn - 1]), {}))
    assert [turn for _, turn, _ in measured] == list(range(1, turns + 1))
    rows = {turn: rows for _, turn, rows in measured}
    assert set(trusted(rows)) == counted
    found = complaints({4: rows})
    assert (complaint is None and not found) or complaint in found[0]


def test_loads_take_turns_and_those_that_are_known_are_not_measured_again() -> None:
    order = [(load, turn) for load, turn, _ in in_turn([1, 8], lambda *_: _turn(5), {8: {1: _turn(5)}})]
    assert order == [(1, 1), (1, 2), (8, 2)]


def test_less_is_more_than_more_where_it_was_disturbed() -> None:
    loads = {
        1: {1: _turn(80), 2: _turn(82)},
        8: {1: _turn(20), 2: _turn(21)},
        32: {1: _turn(40), 2: _turn(40)},
    }
    (found,) = complaints(loads)
    assert found.startswith("with 1 requests in progress a first token spent 82.0, 84.0 ms")
    assert "and 22.0 ms with more of them" in found


def test_a_front_end_that_falls_behind_is_said_to() -> None:
    found = complaints({8: {1: _turn(20), 2: _turn(20)}, 32: {1: _turn(50, 30, 0.4), 2: _turn(50, 30, 0.4)}})
    assert len(found) == 1
    assert found[0].startswith("with 32 requests in progress API server or client fell behind")


def test_overheads_of_two_machines_are_refused() -> None:
    recorded = _recording([SHORTEST], sent_ns=90 * 10**9, takes_ns=0, step_ns=1)
    with pytest.raises(MeasureError, match="before it was sent"):
        list(overheads(_result([SHORTEST], first_s=1.0, gap_s=0.1), recorded, 1))


# -- server and benchmark, against a stand-in ---------------------------------------------------------

STAND_IN = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

args = sys.argv[1:]
flag = lambda name: args[args.index(name) + 1]
if args[0] == "bench":
    print("key" if os.environ.get("OPENAI_API_KEY") == "secret" else "no key", "secret" in " ".join(args))
    if flag("--model") == "broken":
        sys.exit("no such model")
    if flag("--model") == "slow":
        time.sleep(60)
    if flag("--model") == "wrapped":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path(flag("--result-dir"), "child").write_text(str(child.pid))
        child.wait()
    if flag("--model") == "cut":
        Path(flag("--result-dir"), flag("--result-filename")).write_text('{"completed": 2, "err')
        sys.exit()
    done = 0 if flag("--model") == "refused" else int(flag("--num-prompts"))
    result = {"completed": done, "errors": ["401 Unauthorized"], "hash_seed": os.environ["PYTHONHASHSEED"]}
    Path(flag("--result-dir"), flag("--result-filename")).write_text(json.dumps(result))
    sys.exit()
if args[1].endswith("broken"):
    sys.exit("KeyError: no such architecture")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(args[1], "child").write_text(str(child.pid))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("up", flush=True)
HTTPServer((flag("--host"), int(flag("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Environment in which ``-m vllm.entrypoints.cli.main`` is a few lines."""
    package = tmp_path / "stand_in" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(STAND_IN)
    return {"PYTHONPATH": str(tmp_path / "stand_in")}


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return True
    return state == "Z"


def test_a_server_ends_with_all_that_it_started(tmp_path: Path, stand_in: dict[str, str]) -> None:
    server = VllmServer(tmp_path, log=tmp_path / "log", env=stand_in)
    assert not server.alive
    with pytest.raises(KeyboardInterrupt), server:  # noqa: PT012
        assert server.alive
        assert server.healthy()
        assert server.base_url.endswith(str(server.port))
        child = int((tmp_path / "child").read_text())
        assert not _gone(child)
        raise KeyboardInterrupt
    assert not server.alive
    assert _gone(child)
    server.stop()


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, stand_in: dict[str, str]) -> None:
    with pytest.raises(MeasureError, match=r"ended before it was up.*\nKeyError: no such architecture"):
        VllmServer(tmp_path / "broken", log=tmp_path / "log", env=stand_in).__enter__()
    with pytest.raises(MeasureError, match="--python: cannot start"):
        VllmServer(tmp_path, log=tmp_path / "log", python=tmp_path / "none").__enter__()
    never = VllmServer(tmp_path, log=tmp_path / "log", env=stand_in, start_up_s=0.0)
    with pytest.raises(MeasureError, match="not up after 0 s"):
        never.__enter__()
    assert not never.alive


def test_bench(tmp_path: Path, stand_in: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    trace, result = tmp_path / "trace.jsonl", tmp_path / "result.json"
    trace.write_text('{"timestamp": 0}\n{"timestamp": 1}\n\n')

    def bench(model: str, *, api_key_env: str | None = None, **more: Any) -> dict[str, Any]:
        server = Server("http://127.0.0.1:1", model, str(tmp_path), api_key_env=api_key_env)
        return run_bench(server, trace, result, env=stand_in, **more)

    assert bench("good", hash_seed=7)["hash_seed"] == "7"
    assert bench("good")["completed"] == 2
    with pytest.raises(MeasureError, match=r"ended with code 1.*\nno key False\nno such model"):
        bench("broken")
    assert not result.exists(), "no result of an earlier run is left to be mistaken for this one's"
    monkeypatch.setenv("SERVER_KEY", "secret")
    with pytest.raises(MeasureError, match="\nkey False\nno such model"):
        bench("broken", api_key_env="SERVER_KEY")
    with pytest.raises(MeasureError, match="no request completed; the first error: 401"):
        bench("refused")
    with pytest.raises(MeasureError, match=r"its result cannot be read \(Unterminated string"):
        bench("cut")
    with pytest.raises(TookTooLongError, match=r"not done after 0\.2 s"):
        bench("slow", timeout_s=0.2)
    for seconds in (3.0, 60.0):  # a machine that is busy needs more, to start what is to be ended
        with pytest.raises(TookTooLongError):
            bench("wrapped", timeout_s=seconds)
        if (tmp_path / "child").exists():
            break
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 300
    while not _gone(child):
        assert time.monotonic() < deadline, "what the benchmark started goes on"
        time.sleep(0.02)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(MeasureError, match="\nno key False\nno such model"):
        bench("broken")
    with pytest.raises(MeasureError, match="the environment has no NO_KEY"):
        bench("good", api_key_env="NO_KEY")


# -- recording ----------------------------------------------------------------------------------------


class _Engine:
    def __init__(self) -> None:
        self.running: list[Any] = []

    def add_request(self, request: Any) -> None:
        pass

    def finish_requests(self, names: Any, status: Any) -> None:
        pass

    def update_from_output(self, outputs: list[Any], _: Any) -> dict[int, Any]:
        return {0: SimpleNamespace(outputs=outputs)}


class _Request(SimpleNamespace):
    @classmethod
    def from_engine_core_request(cls) -> Any:
        return cls()


def test_an_aborted_request_may_still_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in {
        "vllm": {"__version__": "0.32.0"},
        **{f"vllm.{each}": {} for each in ("v1", "v1.core", "v1.core.sched")},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": type("AsyncScheduler", (_Engine,), {})},
        "vllm.v1.core.sched.scheduler": {"Scheduler": _Engine},
        "vllm.v1.request": {"Request": _Request},
    }.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(contents)
    monkeypatch.setenv("SERVECAST_RECORDING", str(tmp_path / "steps.jsonl"))
    module = "servecast.calibrate.measure.vllm.recording_scheduler"
    try:
        recording = importlib.import_module(module)
    finally:
        sys.modules.pop(module, None)
    monkeypatch.setattr(recording.RecordingScheduler, "_config", lambda self: {})
    recorder = recording.RecordingScheduler()
    for name in ("kept", "aborted"):
        recorder.add_request(
            _Request(
                request_id=name,
                block_hashes=[],
                num_prompt_tokens=8,
                max_tokens=4,
                priority=0,
                num_output_tokens=4,
            )
        )
    recorder.finish_requests("aborted", None)
    ended = [
        SimpleNamespace(request_id=name, new_token_ids=[1], finish_reason="stop")
        for name in ("kept", "aborted")
    ]
    recorder.update_from_output(ended, None)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    (update,) = [line for line in lines if line[0] == "update"]
    assert update[3:] == [[[0, 4]], 2]
    assert [line[2] for line in lines if line[0] == "abort"] == [[1]]


# -- command line -------------------------------------------------------------------------------------


def test_bad_input_is_one_message(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    stand_in: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    base = ["calibrate", "measure", "engine", "--out", str(out), "--model"]
    model = str(write_tiny_model(tmp_path / "model"))
    assert main([*base, str(tmp_path / "none")]) == 2
    assert "config.json: cannot be read" in capfd.readouterr().err
    assert main([*base, model, "--steps", "0"]) == 2
    assert "--steps: 0 is not above 0" in capfd.readouterr().err
    assert main([*base, model, model]) == 2
    assert "2 models of the same name" in capfd.readouterr().err
    assert main([*base, model, "--python", str(tmp_path / "none")]) == 2
    assert "--python: cannot start" in capfd.readouterr().err
    monkeypatch.setenv("PYTHONPATH", stand_in["PYTHONPATH"])  # a vllm without an engine
    assert main([*base, model]) == 2
    assert "vLLM cannot be imported" in capfd.readouterr().err
    assert not (out / "facts.json").exists()
    assert not (out / "engine.jsonl").exists()


@pytest.mark.parametrize("what", ["engine", "kernels", "served"])
def test_the_package_runs_alone(tmp_path: Path, what: str) -> None:
    """On a machine with nothing but a copy of the folder and Python."""
    done = _alone(tmp_path, what, "--help")
    assert done.returncode == 0, done.stderr
    assert "--time-budget" in done.stdout


def test_it_refuses_alone_as_inside_of_servecast(tmp_path: Path) -> None:
    assert MeasureError is InputError
    done = _alone(tmp_path, "served", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr == (
        f"measure: {tmp_path}/none/config.json: cannot be read: No such file or directory. "
        "Give a folder with a model's config.json.\n"
    )


def _alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m measure`` with the copy in a folder and the standard library, and no other package."""
    (folder / "measure").symlink_to(ROOT / "calibrate" / "measure")
    start = (
        "import sys, runpy; sys.path.append(sys.argv.pop(1)); "
        "runpy.run_module('measure', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start, str(folder), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )


def test_a_command_that_is_stopped_stops_what_it_measures_with(tmp_path: Path) -> None:
    """SIGINT reaches the command alone: what it started hears of it through it, and at once."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport pathlib, time\npathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        f"try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    python.chmod(0o755)
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [
            sys.executable,
            "-m",
            "servecast",
            "calibrate",
            "measure",
            "--python",
            str(python),
            "engine",
        ]
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=heeds_ctrl_c)
        while not (tmp_path / "began").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() == 130  # what it started would sleep for ten minutes, and then end well
        assert (tmp_path / "ended").exists()
        (tmp_path / "began").unlink()
        (tmp_path / "ended").unlink()


# -- tokenizer -----------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_any_tokens_come_back_from_their_text(tmp_path: Path) -> None:
    """vLLM 0.23's benchmark sends its prompts as text: each token must be read as one again, by the library
    that vLLM brings."""
    write_tokenizer(tmp_path, vocab_size=152_064)
    code = (
        "import sys, tokenizers\n"
        "tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])\n"
        "ids = [number for number in range(0, 152_064, 7) if not 256 <= number <= 258]\n"
        "assert tokenizer.encode(tokenizer.decode(ids)).ids == ids\n"
    )
    python = VLLM / "bin" / "python"
    subprocess.run([str(python), "-c", code, str(tmp_path / "tokenizer.json")], check=True)


def test_the_tokenizer_has_a_character_of_its_own_for_each_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocab_size=152_064)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert sorted(model["vocab"].values()) == list(range(152_064))
    assert sum(len(text) > 1 for text in model["vocab"]) == 3  # the special ones
    "".join(model["vocab"]).encode()  # none is half of a surrogate pair
