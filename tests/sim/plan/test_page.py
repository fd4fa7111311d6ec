"""The HTML report says what the plan says, needs no network, escapes its input, and is reproducible."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from servecast.sim.metrics.binding import Binding
from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.records import STEP_COLUMNS, Run
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.plan import figures
from servecast.sim.plan.capacity import Plan
from servecast.sim.plan.closed_loop import SweepPoint
from servecast.sim.plan.judge import JudgedObjective, Objectives, State
from servecast.sim.plan.page import LIMITS, PageContext, write_plan_page
from servecast.sim.plan.prober import ProbedRate
from servecast.sim.report import drawing
from servecast.sim.run import figures as run_figures

CONTEXT = PageContext(
    title="A model <7B> & a GPU",
    question="How many?",
    band="within 20 %",
    facts={"For 10 requests/s": "3 replicas"},
    run_context={"Model": "<script>alert(1)</script>"},
    provenance={"Seed": 7},
    assumptions=[{"name": "prompt_tokens", "value": 256, "origin": "not stated"}],
)


def probed(rate: float, ttft: float, state: State, *, saturated: bool = False) -> ProbedRate:
    values = Interval(ttft, ttft - 5, ttft + 5, 0.95, 4), Interval(0.97, 0.96, 0.98, 0.95, 400)
    return ProbedRate(
        rate=rate,
        state=state,
        verdicts=(
            JudgedObjective("ttft:p95:500", 500.0, values[0], state),
            JudgedObjective("goodput ttft:500 tpot:50", 0.95, values[1], "pass"),
        ),
        reasons=() if state == "pass" else (f"ttft:p95:500: {ttft:g} misses 500",),
        saturated=saturated,
        completion_ratio=0.9 if saturated else 1.0,
        output_throughput=100 * rate,
        e2e_s=1.0,
        tpot_s=0.02,
        kv_peak=0.25,
        max_running=40,
        max_waiting=3,
        preemptions=1,
        replications=4,
        num_requests=1250,
        evidence=None,
    )


@pytest.fixture
def plan() -> Plan:
    return Plan(
        state="found",
        max_request_rate=4.0,
        interval=(4.0, 4.1),
        knee=8.0,
        binding=Binding("kv_blocks", ("in 40% of the engine's time requests wait",)),
        probes=(
            probed(1.0, 200, "pass"),
            probed(4.0, 490, "pass"),
            probed(4.1, 520, "fail"),
            probed(8.0, 900, "fail"),
            probed(16.0, 9000, "fail", saturated=True),
        ),
        objectives=Objectives((SLO.parse("ttft:p95:500"),), Goodput.parse("ttft:500 tpot:50")),
        confidence=0.95,
        tolerance=0.03,
        seed=0,
        notes=("a note",),
    )


@pytest.fixture
def run() -> Run:
    n = 5000
    steps = pd.DataFrame({name: np.zeros(n) for name in STEP_COLUMNS})
    steps["start"] = np.arange(n) * 0.01
    steps["running"] = np.arange(n) % 40
    steps["kv_usage"] = 0.2
    itl = pd.DataFrame({"stage": 0, "gap": [0.02, 0.03, 5.0], "weight": [900, 99, 1]})
    return Run(pd.DataFrame(), steps, itl, meta={"request_rate": 4.0})


class Text(HTMLParser):
    """Collects the text of a page, and checks that every tag that opens is closed."""

    VOID = ("meta", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def text_of(path: Path) -> str:
    parser = Text()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return " ".join(word for word in parser.words if word)


def test_a_report_gives_the_answer_its_reasons_and_its_provenance(
    plan: Plan, run: Run, tmp_path: Path
) -> None:
    sweep = [SweepPoint(1, 40.0, 42.3), SweepPoint(256, 4000.0, 4039.9), SweepPoint(512, 3900.0, 3896.1)]
    path = write_plan_page(tmp_path / "report.html", plan, context=CONTEXT, run=run, sweep=sweep)
    text = text_of(path)
    for words in (
        "A model <7B> & a GPU",
        "4 requests/s",
        "is the largest rate found to meet TTFT p95 ≤ 500 ms and 95% of requests with TTFT ≤ 500 ms "
        "and TPOT ≤ 50 ms with 95% confidence; 4.1 requests/s fails.",
        "within 20 %",
        "KV cache blocks",
        "in 40% of the engine's time requests wait",
        "8 requests/s",
        "For 10 requests/s 3 replicas",
        "<script>alert(1)</script>",
        "prompt_tokens",
        "fail, saturated",
        "490 485 to 495",
        "The knee is the smallest concurrency within 5 %",
        "Note: a note",
    ):
        assert words in text
    titles = re.findall(r"<h2>(.*?)</h2>", path.read_text(encoding="utf-8"))
    assert titles == [
        "Latency against request rate",
        "The engine over time",
        "Throughput against request rate",
        "Throughput against concurrency",
        "Inter-token latency",
        "Probed rates",
        "Run context",
        "Provenance",
        "Assumptions",
    ]


def test_the_page_is_self_contained_safe_and_the_same_each_time(plan: Plan, run: Run, tmp_path: Path) -> None:
    first = write_plan_page(tmp_path / "a.html", plan, context=CONTEXT, run=run).read_bytes()
    assert write_plan_page(tmp_path / "b.html", plan, context=CONTEXT, run=run).read_bytes() == first
    page = first.decode()
    assert "<script>" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))
    assert "@import" not in page
    drawn = page[page.index("<body>") :]
    assert not [color for color in (*drawing.SERIES, drawing.INK, drawing.BAD) if color in drawn]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"state": "infeasible", "max_request_rate": None, "interval": (None, 1.0)},
            "No rate meets TTFT p95",
        ),
        (
            {"state": "inconclusive", "max_request_rate": None, "interval": (None, None)},
            "No rate could be shown",
        ),
        ({"state": "inconclusive"}, "more replications or longer runs would narrow it"),
        ({"state": "unbounded", "interval": (4.0, None), "knee": None}, "no rate that was tried fails"),
        ({"binding": Binding("unknown", ())}, "Unknown"),
    ],
)
def test_every_state_has_its_words(plan: Plan, tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = write_plan_page(tmp_path / "report.html", replace(plan, **change), context=CONTEXT)  # type: ignore[arg-type]
    assert words in text_of(path)


def test_every_limit_that_the_search_names_has_words() -> None:
    steps = "compute memory_bandwidth interconnect host"
    queues = "front_end kv_blocks kv_loads passed_over kv_link max_num_seqs token_budget"
    assert set(LIMITS) == set(f"{steps} {queues} none unknown".split())


def test_figures_are_labelled_svg_of_bounded_size(plan: Plan, run: Run) -> None:
    for svg in (
        drawing.picture("latency", "Latency", 2, lambda axes: figures.draw_latency(plan, axes)),
        figures.throughput_by_rate(plan),
        drawing.picture("engine", "Engine", 2, lambda axes: run_figures.draw_engine(run, axes)),
        run_figures.itl_histogram(run),
    ):
        panels = list(ElementTree.fromstring(svg))  # side by side where there is room
        assert panels
        for panel in panels:
            assert panel.attrib["role"] == "img"
            assert panel.attrib["aria-label"]
            assert "width" not in panel.attrib
        assert len(svg) < 60_000  # 5,000 steps are thinned


def test_thinning_keeps_the_peaks() -> None:
    values = pd.Series(np.zeros(10_000), index=np.arange(10_000) / 10)
    values.iloc[7777] = 9.0
    times, heights = run_figures._thinned(values)
    assert len(times) == len(heights) <= run_figures.MAX_POINTS
    assert heights.max() == 9.0
    assert abs(times[heights.argmax()] - 777.7) <= 2.0


def test_a_rate_far_above_the_plot_does_not_stretch_it(plan: Plan) -> None:
    left, right = figures._rate_range(plan)
    assert left == 0.0
    assert 8.0 < right < 16.0
    assert math.isclose(figures._rate_range(replace(plan, knee=None, interval=(16.0, None)))[1], 1.02 * 16.0)
