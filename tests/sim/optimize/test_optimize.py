"""The cheapest of several deployments: what theory gives, and what planning all of them finds."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from mm1 import mm1
from small_scenarios import MINIMAL, small

import servecast
from servecast.__main__ import main
from servecast.sim.metrics.records import Run
from servecast.sim.optimize import race
from servecast.sim.optimize.candidates import Choices
from servecast.sim.optimize.offer import Demand, Offer, ranked
from servecast.sim.optimize.optimize import Optimum
from servecast.sim.optimize.prices import read_prices
from servecast.sim.optimize.race import planned
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.size import Unit
from servecast.sim.plan.traffic import Traffic
from servecast.sim.run.kept import kept
from servecast.sim.run.simulate import RateProbe
from servecast.sim.run.workers import Workers
from servecast.sim.scenario.scenario import Scenario

ONE = Workers(jobs=1)
PRICES = "date: 2026-01-31\ncurrency: EUR\ngpu_hour_cost: {L4: 1.0, A6000: 1.5, L40S: 2.0, H100: 5.0}\n"


class Queue(RateProbe):
    """An M/M/1 queue in the place of a server: 10, 15, 19 and 60 requests/s on an L4, an A6000, an L40S and
    an H100, 1.6 times as much on two of them. Its p95 is ln 20 / (service rate - rate), so that at 1 s it
    takes 7.00, 12.0, 16.0 and 57.0 requests/s, on two 13.0, 21.0, 27.4 and 93.0."""

    def __call__(self, request_rate: float, seed: int, num_requests: int) -> Run:
        shard = self.deployment.shard
        rate = {"L4": 10.0, "A6000": 15.0, "L40S": 19.0, "H100": 60.0}[shard.gpu.name]
        return mm1(request_rate, seed, num_requests, rate * 1.6 ** (shard.tensor_parallel_size - 1))


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "RateProbe", Queue)


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    return path


CHOICES: dict[str, Any] = {"gpus": ["l4", "l40s", "h100"], "tensor_parallel": [1, 2]}
EFFORT = Effort(replications=(4,), tolerance=0.03, max_requests=2000)


def brute_force(
    scenario: Scenario, objectives: Objectives, found: Optimum, choices: dict[str, Any], effort: Effort
) -> tuple[list[Offer], int]:
    """Every candidate planned, best first, and how many requests that took."""
    offers = []
    for number, each in enumerate(Choices(**choices).of(scenario)):
        document = planned(each.scenario, objectives, effort)
        unit = Unit.of(each.scenario, found.prices[0].of(each.gpu, ""))
        offers.append(Offer(number, each, unit, found.demand, document))
    return ranked(offers), sum(offer.document["simulated"] for offer in offers)


@pytest.mark.usefixtures("queues")
@pytest.mark.parametrize(
    ("target", "label", "units"),
    [
        (6.5, ("L4", 1), 1),  # at 1 an hour, nothing is cheaper
        (30.0, ("L40S", 1), 2),  # 4; five L4s are 5, an H100 is 5, two L40S together 4 but for 27.4
        (50.0, ("H100", 1), 1),  # 5; four L40S are 8, eight L4s are 8
        (72.0, ("H100", 1), 2),  # 10; five L40S are 10, too, but carry 80, not 114
    ],
)
def test_the_cheapest_is_the_one_that_theory_gives(
    target: float, label: tuple[str, int], units: int, tmp_path: Path, prices: Path
) -> None:
    """Without a margin, by hand from the rates of ``Queue``."""
    found = servecast.optimize(
        small(tmp_path),
        "ttft:p95:1000",
        target_rate=target,
        margin=0.0,
        choices=Choices(**CHOICES, prices=prices),
        out=tmp_path / "out",
        effort=EFFORT,
        workers=ONE,
    )
    assert found.best is not None
    assert tuple(found.best.candidate.label.values()) == label
    assert found.best.size.units == units
    assert found.best.stage == "planned"
    rates = {tuple(offer.candidate.label.values()): offer.rate for offer in found.offers}
    assert rates["L4", 1] == pytest.approx(10 - math.log(20), rel=0.25)  # a short run tells it roughly


@pytest.mark.usefixtures("queues")
def test_it_finds_what_planning_all_finds_with_a_third_of_the_work(tmp_path: Path, prices: Path) -> None:
    scenario, objectives = small(tmp_path), Objectives.asked(small(tmp_path), "ttft:p95:1000", None, 0.95)
    choices = CHOICES | {"gpus": ["l4", "a6000", "l40s", "h100"]}
    found = servecast.optimize(
        scenario,
        objectives,
        target_rate=50.0,
        choices=Choices(**choices, prices=prices),
        out=tmp_path / "out",
        effort=EFFORT,
        workers=ONE,
    )
    offers, work = brute_force(scenario, objectives, found, choices, EFFORT)
    assert found.best is not None
    assert found.best.candidate.label == offers[0].candidate.label
    assert found.best.rate == offers[0].rate
    assert found.simulated <= work / 3


@pytest.mark.slow
def test_so_it_does_with_simulated_servers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f'{MINIMAL}slo: ["ttft:p95:400", "tpot:p95:30"]\n')
    scenario = servecast.load(path)
    choices = {"gpus": ["l40s", "a100", "h100"], "tensor_parallel": [1, 2], "max_num_seqs": [8, 64]}
    effort = Effort(tolerance=0.1, replications=(4, 8), max_requests=1000)
    found = servecast.optimize(
        scenario,
        target_rate=60,
        choices=Choices(**choices),
        out=tmp_path / "out",
        effort=effort,
        workers=ONE,
    )
    objectives = Objectives.of(scenario)
    assert objectives is not None
    offers, work = brute_force(scenario, objectives, found, choices, effort)
    assert found.best is not None
    assert (found.best.candidate.label, found.best.rate) == (offers[0].candidate.label, offers[0].rate)
    assert found.simulated <= work / 3
    plan = servecast.plan(
        found.best.candidate.scenario, tolerance=0.1, replications=(4, 8), max_requests=1000, jobs=1
    )
    assert plan.max_request_rate == found.best.rate


def offer(number: int, rate: float, price: float, target: float = 35.0) -> Offer:
    document = {"max_request_rate": rate, "interval": [rate, 1.1 * rate]}
    candidate = Choices(tensor_parallel=[1]).of(servecast.load("l4-qwen2.5-0.5b"))[0]
    demand = Demand(target, 0.0, Traffic("poisson", 100.0, 200.0, 10.0, 20.0))
    return Offer(number, candidate, Unit(1, 1, price), demand, document)


def test_what_a_candidate_must_serve_to_be_better() -> None:
    """The best is 4 units of 10 requests/s at 3: 12 an hour for 35 requests/s, 40 carried. At 5 two are
    cheaper, and need 17.5 each. At 4 two are cheaper (17.5), three cost the same and must carry more than 40:
    13.33 each is less. At 12 one costs the same and must carry 40. At 13 none can."""
    best = offer(0, 10.0, 3.0)
    assert best.size.hour_cost == 12.0
    assert offer(1, 1.0, 5.0).rate_to_beat(best) == 17.5
    assert offer(1, 1.0, 4.0).rate_to_beat(best) == pytest.approx(40 / 3)
    assert offer(1, 1.0, 12.0).rate_to_beat(best) == 40.0
    assert offer(1, 1.0, 13.0).rate_to_beat(best) is None
    assert ranked([offer(2, 11.0, 3.0), best])[0].number == 2  # as dear, and carries more


@pytest.mark.usefixtures("queues")
def test_the_files_run_what_was_found(tmp_path: Path, prices: Path) -> None:
    """The flags of a pasted command stay, with what was chosen in the place of what it had."""
    pasted = "vllm serve org/M-1.5 --port 8001 -tp 4 --max-num-seqs=32 --served-model-name m --enforce-eager"
    scenario = small(tmp_path, engine={"version": "0.23", "command": pasted})
    found = servecast.optimize(
        scenario,
        "ttft:p95:1000",
        target_rate=20.0,
        choices=Choices(gpus=["l40s"], tensor_parallel=[2], prices=prices),
        out=tmp_path / "out",
        effort=EFFORT,
        workers=ONE,
    )
    serve, deployment, values = (path.read_text() for path in found.write_files(tmp_path / "best"))
    line = "--tensor-parallel-size 2 --max-num-seqs 32 --enforce-eager --port 8001 --served-model-name m"
    assert serve.splitlines()[1] == f"vllm serve org/M-1.5 {line}"
    assert servecast.load(scenario.source, {"engine.command": serve.splitlines()[1]})
    pod = yaml.safe_load(deployment)["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    assert pod["replicas"] == 1
    assert container["image"] == "vllm/vllm-openai:v0.23.0"
    assert container["args"] == ["org/M-1.5", *line.split()]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert container["ports"][0]["containerPort"] == 8001
    chart = yaml.safe_load(values)
    assert chart["modelArtifacts"] == {"name": "m", "uri": "hf://org/M-1.5", "size": "10Gi"}
    assert chart["decode"]["parallelism"] == {"tensor": 2}
    assert chart["decode"]["containers"][0]["args"] == ["--max-num-seqs", "32", "--enforce-eager"]


def asked(scenario: str, out: Path, *options: str) -> list[str]:
    """The words of a quick command."""
    fast = ("--tolerance", "0.3", "--max-num-requests", "300", "--jobs", "1")
    demand = ("--slo", "ttft:p95:100", "--target-rate", "90")
    return ["optimize", scenario, "--out", str(out), *demand, *fast, *options]


def test_the_command_says_what_to_buy(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's 14 heads cannot be split over four GPUs."""
    out = tmp_path / "out"
    choices = ("--gpus", "l40s", "--tensor-parallel", "1,4", "--variants", "fp8=engine.quantization=fp8")
    assert main(asked(tiny, out, *choices)) == 0
    text = capsys.readouterr().out
    assert text.startswith("Cheapest for 90 requests/s at ttft:p95:100: L40S TP1 fp8\n  ")
    assert "1.55 USD an hour, 1,132 a month\n" in text  # 730 hours
    assert "Left out:\n  L40S TP4 fp8: " in text
    page = (out / "best" / "optimize.html").read_text()
    for words in ("The cheapest way to serve Qwen/Qwen2.5-0.5B-Instruct", "<h2>deployment.yaml</h2>", "<svg"):
        assert words in page
    assert main(asked(tiny, out, *choices, "--resume", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["simulated"], len(document["offers"]), len(document["left_out"])) == (0, 1, 1)
    assert document["prices"]["date"] == "2025-12-11"


def test_nothing_serves_an_objective_that_a_lone_request_misses(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slo = ("--slo", "ttft:p95:0.01", "--gpus", "l40s", "--target-rate", "5", "--jobs", "1")
    assert main(["optimize", tiny, "--out", str(tmp_path / "out"), *slo]) == 1
    text = capsys.readouterr().out
    assert text.startswith("Nothing serves 5 requests/s at ttft:p95:0.01\n")
    assert "L40S: no rate meets the objectives: at " in text


def test_it_goes_on_where_it_was_killed(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, choices = tmp_path / "out", ("--gpus", "l40s,a100,h100", "--json")
    command = [sys.executable, "-c", "import sys; from servecast.__main__ import main; sys.exit(main())"]
    process = subprocess.Popen([*command, *asked(tiny, out, *choices)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list(out.glob("*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert not (out / "best").exists()
    found = []
    for folder, more in ((out, ["--resume"]), (tmp_path / "whole", [])):
        assert main(asked(tiny, folder, *choices, *more)) == 0
        found.append(json.loads(capsys.readouterr().out))
    again, whole = found
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again["reused"] == len(kept)
    assert 0 < again["simulated"] < whole["simulated"]
    assert again["offers"] == whole["offers"]


def test_a_kept_result_that_is_cut_off_is_computed_again(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"max_request_rate": 1', "utf-8")
    (tmp_path / "whole.json").write_text('{"max_request_rate": 1}', "utf-8")
    assert kept(tmp_path / "cut.json") is None
    assert kept(tmp_path / "whole.json") == {"max_request_rate": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "h1000"], "--gpus: GPU 'h1000' is not in the catalogue. Use "),
        (["--gpus", "l40s,L40S"], "--gpus: L40S comes twice. Name each choice once."),
        (["--gpus", "l40s,,h100"], "--gpus: 'l40s,,h100' is no list. Separate the names by commas."),
        (["--tensor-parallel", "1,2,1"], "--tensor-parallel: 1 comes twice. Name each choice once."),
        (["--tensor-parallel", "1,0"], "--tensor-parallel: '1,0' is no list of numbers above 0. Write "),
        (["--variants", "fp8"], "--variants: 'fp8' is not of the form NAME=CONFIG, or comes twice. Write "),
        (["--variants", "a=none-such"], "model.config: there is no model 'none-such'. Shipped are "),
        (["--routers", "fastest"], "fleet.router: router cannot be 'fastest'. Known: "),
        (["--target-rate", "0"], "--target-rate: 0 is not positive and finite. Give "),
        (["--margin", "-1"], "--margin: -1 is no share. Give for example 0.2 for 20 %."),
        (["--slo", "ttft:p95"], "slo: 'ttft:p95' is not an SLO."),
        (["--gpus", "mi300x"], "gpu_hour_cost: there is no price for 'MI300X'. Copy the file, "),
        (["--prices", "none.yaml"], "--prices none.yaml: there is no such file. Check the path."),
        (
            ["--set", "fleet.replicas=[{count: 2}]"],
            "fleet.replicas: a list of replicas has no number to choose.",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_message(
    options: Sequence[str], message: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in ("--slo", "--target-rate") if word not in options]
    others = [part for word in given for part in (word, {"--slo": "ttft:p95:100"}.get(word, "5"))]
    gpu = [] if "--gpus" in options else ["--gpus", "l40s"]
    assert main(["optimize", tiny, "--out", str(tmp_path / "out"), *others, *gpu, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_prices_are_dated_and_positive(tmp_path: Path) -> None:
    prices, source = read_prices(None)
    assert source.endswith("prices.yaml")
    assert prices.of("h100", source) == 2.99
    for text, message in (
        (PRICES.replace("2026-01-31", "soon"), "date"),
        (PRICES.replace("1.0", "-1.0"), "gpu_hour_cost.L4"),
        (PRICES + "vat: 0.2\n", "vat"),
    ):
        path = tmp_path / "prices.yaml"
        path.write_text(text)
        with pytest.raises(servecast.InputError, match=message):
            read_prices(path)
