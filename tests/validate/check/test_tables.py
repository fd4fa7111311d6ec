"""``servecast check`` on tables of a few rows: what is said of them, what is not, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servecast.__main__ import main
from servecast.sim.inputs.errors import InputError
from servecast.validate.check.check import Checked, check
from servecast.validate.check.columns import read_name
from servecast.validate.check.finding import Finding
from servecast.validate.check.from_table import Context, from_table


def table(folder: Path, *lines: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def checked(folder: Path, context: Context, *lines: str) -> Checked:
    return check(from_table(table(folder, *lines), context))


def said(folder: Path, context: Context, *lines: str) -> list[tuple[str, str]]:
    return [(f.rule, f.confidence) for f in checked(folder, context, *lines).findings]


# -- true ------------------------------------------------------------------------------------------

TRUE = {
    "a closed loop of an unknown number of requests": ["concurrency,e2e_mean_ms,req_s", "512,4000,74.0"],
    "a closed loop of which some failed": [
        "concurrency,requests,e2e_mean_ms,e2e_max_ms,req_s,success",
        "8,800,1000,1100,4.0,0.7",
    ],
    "prompts that differ, then a load that queues": [
        "concurrency,ttft_p50_ms,ttft_p95_ms",
        "1,50,150",
        "64,2000,2600",
    ],
    "models that answer at different length": [
        "model,concurrency,req_s,output_tok_s",
        *(f"{model},{c},{c},{c * tokens}" for model, tokens in (("A", 100), ("B", 500)) for c in (1, 2, 4)),
    ],
    "a rate that is met, models that answer at different length": [
        "model,request_rate,req_s,output_tok_s",
        *(f"{model},{r},{r},{r * tokens}" for model, tokens in (("A", 100), ("B", 500)) for r in (1, 2, 4)),
    ],
    "digits that say nothing": ["run,ttft_p50_ms", *(f"{n},{12.51 + 0.37 * n:.4f}" for n in range(9))],
    "one waits for 2 s, not the rest": [
        "concurrency,tp,ttft_p50_ms,ttft_p95_ms",
        "1,1,50,2000",
        "2,2,20,30",
    ],
    "outputs of one token": [
        "concurrency,requests,osl,ttft_mean_ms,tpot_mean_ms,tpot_p50_ms,itl_p50_ms,e2e_mean_ms,req_s,output_tok_s",
        "4,400,1,40.00,0.00,0.00,0.00,40.00,99.5,99.5",
    ],
}


@pytest.mark.parametrize("name", TRUE)
def test_nothing_is_said_of_a_true_table(tmp_path: Path, name: str) -> None:
    assert [(f.rule, f.message) for f in checked(tmp_path, Context(), *TRUE[name]).findings] == []


MERGED = "concurrency,ttft_mean_ms,itl_mean_ms,itl_p50_ms,tpot_mean_ms,e2e_mean_ms"


def test_two_tokens_an_event_halve_nothing(tmp_path: Path) -> None:
    """Latencies bear the mean out, so the median of 0 does not make it half of the gaps."""
    rules = said(tmp_path, Context(output_tokens=128), MERGED, "1,50,10.0,0.00,10.0,1320")
    assert rules == [("zero-latency", "certain")]


def test_a_rounded_zero_is_not_a_zero(tmp_path: Path) -> None:
    assert said(tmp_path, Context(), "itl_p50_ms,itl_mean_ms", "0,6") == [("zero-latency", "possible")]
    found = said(tmp_path, Context(), "itl_p50_ms,itl_mean_ms", "0.00,6")
    assert found == [("zero-latency", "certain"), ("halved-itl", "likely")]


def test_gaps_of_events_with_several_tokens(tmp_path: Path) -> None:
    """The mean gap is that of an event: with two tokens in each it is twice the TPOT."""
    context = Context("Qwen2.5-0.5B-Instruct", "l4", output_tokens=128)
    (found,) = checked(tmp_path, context, MERGED, "1,50,20.0,20.0,10.0,1320").findings
    assert (found.rule, found.confidence, found.columns[-1]) == ("e2e-sum", "likely", "itl_mean_ms")
    assert "several tokens came in an event" in found.message
    fast = said(tmp_path, context, "concurrency,output_tok_s", "1,1500")
    assert fast == [("roofline-throughput", "likely")]


# -- false -----------------------------------------------------------------------------------------

SUMS = "concurrency,output_tokens_mean,ttft_mean_ms,itl_mean_ms,tpot_mean_ms,e2e_mean_ms"


@pytest.mark.parametrize(
    ("row", "rule", "confidence", "column"),
    [
        ("1,101.0,100,10.0,10.2,800", "e2e-sum", "likely", "itl_mean_ms"),
        ("1,101.0,100,10.0,10.2,1400", "e2e-sum", "certain", "itl_mean_ms"),
        ("1,101.0,100,5.0,10.2,1100", "halved-itl", "certain", "itl_mean_ms"),
        ("1,101.0,100,10.0,5.1,1100", "halved-itl", "likely", "tpot_mean_ms"),
        ("1,101.0,1200,10.0,10.2,1100", "e2e-sum", "certain", "ttft_mean_ms"),
    ],
)
def test_sums_of_outputs_that_differ(
    tmp_path: Path, row: str, rule: str, confidence: str, column: str
) -> None:
    assert said(tmp_path, Context(), SUMS, "1,101.0,100,10.0,10.2,1100") == []
    (found,) = checked(tmp_path, Context(), SUMS, row).findings
    assert (found.rule, found.confidence, column in found.columns) == (rule, confidence, True)


@pytest.mark.parametrize("statistic", ["mean", "min", "max", "p90"])
def test_no_latency_is_under_that_of_its_first_token(tmp_path: Path, statistic: str) -> None:
    header = f"ttft_{statistic}_ms,e2e_{statistic}_ms"
    assert said(tmp_path, Context(), header, "90,80") == [("e2e-sum", "certain")]
    assert said(tmp_path, Context(), header, "80,80") == []


@pytest.mark.parametrize(
    ("tail", "expected"),
    [("e2e_max_ms,5000", "certain"), ("e2e_p99_ms,5000", "likely"), ("e2e_p95_ms,5000", None)],
)
def test_idle_slots_are_certain_where_the_longest_latency_is_known(
    tmp_path: Path, tail: str, expected: str | None
) -> None:
    """64 slots of 10 s over 100 s idle for 5 s at most: 61 of them are busy, not 32."""
    column, value = tail.split(",")
    rules = said(
        tmp_path, Context(), f"concurrency,requests,e2e_mean_ms,{column},req_s", f"64,3200,1000,{value},32"
    )
    assert rules == ([] if expected is None else [("littles-law", expected)])


def test_a_long_latency_may_leave_slots_idle(tmp_path: Path) -> None:
    header = "concurrency,requests,e2e_mean_ms,e2e_max_ms,req_s"
    assert said(tmp_path, Context(), header, "64,640,1000,12000,32") == []


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    lines = ["concurrency,ttft_p50_ms", "1,9000", "2,9000"]
    (found,) = checked(tmp_path, Context("Llama-3.1-70B-Instruct", "l4"), *lines).findings
    assert (found.rule, found.confidence) == ("kv-arithmetic", "certain")
    assert found.numbers["weights_gib"] > 5 * found.numbers["card_gib"]
    assert said(tmp_path, Context("Llama-3.1-70B-Instruct", "h100", 4), *lines) == []


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "metric", "statistic", "scale"),
    [
        ("ttft_p95_ms", "ttft", "p95", 1e-3),
        ("ttft_p100_ms", "ttft", "max", 1e-3),
        ("P99 ITL (ms)", "itl", "p99", 1e-3),
        ("median TTFT [s]", "ttft", "p50", 1.0),
        ("Latency P50 (s)", "e2el", "p50", 1.0),
        ("Output toks/s", "output_throughput", None, 1.0),
        ("Throughput (tok/s)", "output_throughput", None, 1.0),
        ("Requests/s", "request_throughput", None, 1.0),
        ("kv_pct_max", "kv_usage", "max", 0.01),
        ("goodput%", "goodput", None, 0.01),
    ],
)
def test_column_names(column: str, metric: str, statistic: str | None, scale: float) -> None:
    name = read_name(column)
    assert (name.part, name.name, name.statistic, name.scale) == ("metric", metric, statistic, scale)


def cells(found: tuple[Finding, ...]) -> set[tuple[str, str, str]]:
    return {(f.rule, f.level.label, column) for f in found for column in f.columns}


def test_a_table_with_a_row_a_number(tmp_path: Path) -> None:
    lines = ["model,metric,value", "A,TTFT P50 (ms),20", "A,TTFT P99 (ms),10", "B,TTFT P50 (ms),20"]
    assert cells(checked(tmp_path, Context(), *lines).findings) == {
        ("percentile-order", "model=A", "TTFT P50 (ms)"),
        ("percentile-order", "model=A", "TTFT P99 (ms)"),
    }


def test_rows_are_named_by_all_of_their_load(tmp_path: Path) -> None:
    lines = ["isl,concurrency,ttft_p50_ms,ttft_p99_ms", "100,1,20,10", "200,1,20,10"]
    labels = [f.level.label for f in checked(tmp_path, Context(), *lines).findings]
    assert labels == ["isl=100 concurrency=1", "isl=200 concurrency=1"]


def test_a_byte_order_mark_and_nan_are_let_be(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("concurrency,ttft_p50_ms,ttft_p99_ms\n1,20,NaN\n2,20,30\n", encoding="utf-8-sig")
    report = from_table(path, Context())
    assert [(level.concurrency, len(level.values)) for level in report.levels] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([""], [], "no rows"),
        (["a,b", "1,2"], [], "none of its columns is known"),
        (["ttft_p50", "1"], [], "has no unit"),
        (["ttft_p50_ms", "fast"], [], "not a number"),
        (["ttft_p50_ms", "inf"], [], "cannot be"),
        (["ttft_p50_ms", "1e400"], [], "cannot be"),
        (["ttft_p50_ms", "-1"], [], "cannot be"),
        (["req_s,ttft_p50_ms", "-1,1"], [], "cannot be"),
        (["concurrency,ttft_p50_ms", "0,1"], [], "not a whole number from 1 on"),
        (["concurrency,ttft_p50_ms", "0.5,1"], [], "not a whole number from 1 on"),
        (["requests,ttft_p50_ms", "0,1"], [], "not a whole number from 1 on"),
        (["requests,ttft_p50_ms", "inf,1"], [], "cannot be"),
        (["errors,ttft_p50_ms", "-1,1"], [], "cannot be"),
        (["output_tokens,ttft_p50_ms", "0,1"], [], "not a number from 1 on"),
        (["request_rate,ttft_p50_ms", "0,1"], [], "no rate"),
        (["kv_usage,ttft_p50_ms", "55.3,1"], [], "kv_usage_pct"),
        (["success,ttft_p50_ms", "98,1"], [], "success_pct"),
        (["ttft_p50_ms,ttft_p50_ms", "1,2"], [], "twice"),
        (["ttft_p50_ms,ttft_median_ms", "1,2"], [], "mean the same"),
        (["model,metric,value", "A,ttft_p50_ms,1", "A,ttft_p50_ms,2"], [], "given twice"),
        (["ttft_p50_ms", "1"], ["--replicas", "0"], "--replicas"),
        (["ttft_p50_ms", "1"], ["--replicas", "-1"], "--replicas"),
        (["ttft_p50_ms", "1"], ["--num-requests", "0"], "--num-requests"),
        (["ttft_p50_ms", "1"], ["--output-tokens", "0"], "--output-tokens"),
        (["ttft_p50_ms", "1"], ["--gpu", "h100"], "--model-config is missing"),
        (["ttft_p50_ms", "1"], ["--gpu", "none", "--model-config", "Qwen2.5-7B-Instruct"], "the catalogue"),
    ],
)  # fmt: skip
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], arguments: list[str], message: str
) -> None:
    assert main(["check", str(table(tmp_path, *lines)), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_a_table_of_a_known_gpu_points_to_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, "ttft_p50_ms", "20")
    assert main(["check", str(path), "--model-config", "Qwen2.5-0.5B-Instruct", "--gpu", "l4", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "servecast validate result" in note


COLUMNS = (
    "concurrency", "request_rate", "requests", "errors", "osl", "isl", "tp", "req_s", "output_tok_s",
    "success", "kv_usage_pct", "running", "waiting", "gpu_memory_gib", "ntpot_mean_ms",
    *(f"{metric}_{statistic}_ms" for metric in ("ttft", "tpot", "itl", "e2e")
      for statistic in ("mean", "p50", "p99", "p100", "min", "std")),
)  # fmt: skip
GOOD = ["", "0", "0.00", "1", "2", "20", "1000000000"]
CELLS = [st.sampled_from(GOOD), st.sampled_from([*GOOD, "7.5", "nan", "inf", "-3", "1e400", "1e9"])]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_table_is_checked_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    columns = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=9, unique=True))
    cell = data.draw(st.sampled_from(CELLS))
    rows = data.draw(st.lists(st.tuples(*[cell] * len(columns)), min_size=1, max_size=4))
    context = Context(
        *data.draw(st.sampled_from([(None, None), ("Qwen2.5-0.5B-Instruct", "l4")])),
        output_tokens=data.draw(st.sampled_from([None, 1, 2, 128])),
        prompt_tokens=data.draw(st.sampled_from([None, 1, 256])),
        num_requests=data.draw(st.sampled_from([None, 1, 10**9])),
        percentile_law=data.draw(st.sampled_from(["linear", "exclusive"])),
    )
    try:
        done = checked(tmp_path, context, ",".join(columns), *(",".join(row) for row in rows))
    except InputError:
        return
    json.dumps(done.to_json(), allow_nan=False)


# -- what was asked, and what a row alone shows ------------------------------------------------------


def test_throughput_times_ttft_alone_may_be_over_the_slots(tmp_path: Path) -> None:
    """0.5 requests/s that wait 8 s for their first token are 4 before it, in a loop of 1."""
    rows = ("concurrency,requests,ttft_mean_ms,req_s", "1,40,8000,0.5", "4,40,8000,2")
    report = checked(tmp_path, Context(), *rows)
    assert [(f.rule, f.confidence) for f in report.findings] == [("littles-law", "certain")] * 2
    assert report.findings[0].numbers == {"in_flight": pytest.approx(4, rel=0.1), "concurrency": 1.0}
    assert said(tmp_path, Context(), rows[0], "1,40,1900,0.5") == []


@pytest.mark.parametrize("row", ["1,128,50,500,60,3040,0.3289", "8,128,400,900,80,3968,2.016"])
def test_a_tpot_that_does_not_fit_is_found_with_a_column_of_lengths(tmp_path: Path, row: str) -> None:
    """500 ms and 127 x 60 ms are 8.1 s, of a latency of 3.0 s."""
    header = "concurrency,osl,requests,ttft_mean_ms,tpot_mean_ms,e2e_mean_ms,req_s"
    assert said(tmp_path, Context(), header, row) == [("e2e-sum", "likely")]
    fits = "1,128,50,500,20,3040,0.3289"
    assert said(tmp_path, Context(), header, fits) == []


def test_seconds_that_are_called_milliseconds(tmp_path: Path) -> None:
    """0.3787 requests/s of 2.64 ms are 0.001 in flight of 1; of 2.64 s they are 1."""
    rows = ["1,50,2.64,0.3787", "2,100,2.7,0.74", "4,200,2.9,1.37"]
    found = said(tmp_path, Context(), "concurrency,requests,e2e_mean_ms,req_s", *rows)
    assert found == [("littles-law", "likely")] * 3
    assert said(tmp_path, Context(), "concurrency,requests,e2e_mean_s,req_s", *rows) == []


def test_a_longer_prompt_that_delays_too_little_was_cached(tmp_path: Path) -> None:
    """1,024 tokens more of a 72B model on two H100 are 1.5e14 FLOPs, 74 ms at the peak of 1.98e15 FLOP/s."""
    context = Context(model_config="Llama-3.1-70B-Instruct", gpu="h100", tensor_parallel_size=2)
    header = "isl,osl,concurrency,requests,ttft_mean_ms,tpot_mean_ms,e2e_mean_ms,req_s"
    rows = ["1024,128,1,8,130,31.0,4067,0.2459", "2048,128,1,8,150,31.0,4087,0.2447"]
    (found,) = checked(tmp_path, context, header, *rows, "4096,128,1,8,510,31.1,4460,0.2242").findings
    assert (found.rule, found.confidence, found.level.label.split()[0]) == (
        "prefill-difference", "likely", "isl=2048",
    )  # fmt: skip
    assert found.numbers["bound_s"] == pytest.approx(0.074, rel=0.05)
    assert said(tmp_path, context, header, rows[0], "2048,128,1,8,230,31.0,4167,0.2400") == []


def test_a_run_in_which_all_failed_is_no_clean_report(tmp_path: Path) -> None:
    assert said(tmp_path, Context(), "concurrency,requests,errors,req_s", "4,40,40,0") == [
        ("all-failed", "certain")
    ]
    assert said(tmp_path, Context(), "concurrency,requests,errors,ttft_p50_ms", "4,40,4,20") == []


def test_it_says_which_rules_could_be_asked(tmp_path: Path) -> None:
    report = checked(tmp_path, Context(), "concurrency,requests,e2e_mean_ms,req_s", "1,40,2000,0.49")
    asked = set(report.rules) - report.not_asked.keys()
    assert asked == {"littles-law", "few-waves", "wall-time", "zero-latency"}
    assert report.not_asked["roofline-throughput"] == "tokens/s, --model-config and --gpu"
    assert "(1 row, 4 of 23 rules)" in report.to_text()
    assert "Asked: wall-time, littles-law, few-waves, zero-latency" in report.to_text()
    assert report.to_json()["not_asked"] == report.not_asked
