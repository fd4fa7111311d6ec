"""``servecast validate live``: a server driven and judged against what was predicted of it before."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from servecast.calibrate.measure.folder import say
from servecast.calibrate.measure.vllm.ending import sigterm_as_ctrl_c
from servecast.sim.cli.options import WhatIf, numbers
from servecast.sim.cli.output import print_json
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.results import check_output, write_result
from servecast.validate.compare.load import LoadComparison
from servecast.validate.compare.page import write_comparison_page
from servecast.validate.compare.sweep import Comparison
from servecast.validate.compare.text import comparison_text
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.live.own_server import OwnServer, model_folder
from servecast.validate.live.result import document, facts, judge, new_result
from servecast.validate.live.session import Session
from servecast.validate.live.target import Target
from servecast.validate.live.telemetry import Prometheus

RUNNING = Parameter(
    name="*", group=Group("Server that runs already", sort_key=12), show_default=False, negative=()
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A server that is started here.

    Attributes:
        serve: folder of the model to serve.
        recorder: with --serve, record every step of the scheduler: tells where an error comes from.
        vllm_python: Python of an environment with vLLM, for the server and for vllm bench serve; the one that
            runs this without it.
    """

    serve: Path | None = None
    recorder: bool = False
    vllm_python: Path | None = None

    @property
    def python(self) -> str:
        """The Python with vLLM."""
        return str(self.vllm_python or sys.executable)

    def server(self, flags: tuple[str, ...], running: Target | None) -> OwnServer | Target:
        """The server to start with further flags, or that which runs: one of the two.

        Raises:
            InputError: both are given or none, or what is for the other.
        """
        if self.serve is not None and running is not None:
            fix = "Give either --serve, or --base-url and what belongs to it."
            raise InputError("the server cannot be started here and run already", where="--serve", fix=fix)
        if self.serve is not None:
            return OwnServer(model_folder(self.serve), flags, self.python, recorder=self.recorder)
        if running is None or not running.base_url:
            fix = "Give one of the two: start it, or attach."
            raise InputError("there is no server", where="--serve, --base-url", fix=fix)
        if not running.model:
            raise InputError(
                "no model is named", where="--model", fix="Give the name that the server serves."
            )
        if self.recorder or flags:
            raise InputError(
                "is for a server that is started here",
                where="--recorder" if self.recorder else flags[0],
                fix="Remove it, or use --serve.",
            )
        _ = running.key  # refused here where its variable is not set
        return running


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is run, and watched meanwhile.

    Attributes:
        plan: what to run, separated by commas: rate (a sweep across the predicted largest rate), slo (search
            the largest rate at the scenario's SLOs, to 3 %), knee (search the largest rate that does not fall
            behind, to 3 %), concurrency (closed loops), kv (a server with few KV blocks, for --serve only),
            prefix (shared prefixes), mixed (long prompts beside short ones).
        rates: requests/s of the sweep, separated by commas.
        concurrency: levels of the closed loops, separated by commas.
        duration: seconds over which an open-loop load sends.
        seeds: replications of a prediction.
        time_budget: seconds: a load that would end later is not started, one that has not ended is cut.
        prometheus_url: a Prometheus server that scrapes the engine, asked instead of /metrics.
        prometheus_label: NAME=VALUE that picks the engine's series. Can be repeated.
    """

    plan: str = "rate"
    rates: str | None = None
    concurrency: str | None = None
    duration: float = 60.0
    seeds: int = 5
    time_budget: float | None = None
    prometheus_url: str | None = None
    prometheus_label: list[str] | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of a session.

        Raises:
            InputError: one cannot be, or Prometheus does not answer.
        """
        if self.seeds < 1:
            raise InputError(f"{self.seeds} seeds", where="--seeds", fix="Give at least 1.")
        if not 0 < self.duration < float("inf"):
            fix = "Give seconds above 0."
            raise InputError(f"{self.duration:g} s is no time", where="--duration", fix=fix)
        levels = [] if self.concurrency is None else numbers(self.concurrency, where="--concurrency")
        if any(level != int(level) for level in levels):
            fix = "Give whole numbers from 1."
            raise InputError(f"{self.concurrency!r}", where="--concurrency", fix=fix)
        labels = dict(label.partition("=")[::2] for label in self.prometheus_label or ())
        if labels and (self.prometheus_url is None or not all(labels.values())):
            fix = "Write NAME=VALUE, beside --prometheus-url."
            raise InputError(f"{(self.prometheus_label or [''])[0]!r}", where="--prometheus-label", fix=fix)
        rates = [] if self.rates is None else numbers(self.rates, where="--rates")
        return {
            "kinds": tuple(dict.fromkeys(self.plan.split(","))),
            "rates": tuple(dict.fromkeys(rates)),
            "concurrency": tuple(dict.fromkeys(map(int, levels))),
            "duration_s": self.duration,
            "seeds": self.seeds,
            "time_budget_s": self.time_budget,
            "prometheus": None if self.prometheus_url is None else Prometheus(self.prometheus_url, labels),
        }


def live(
    scenario: str,
    /,
    *vllm_flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    start: Started = Started(),
    asked: Asked = Asked(),
    tolerances: Path | None = None,
    out: Path | None = None,
    report: Path | None = None,
    json: bool = False,
    attach: Annotated[Target | None, RUNNING] = None,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Predict what a live vLLM will show, then drive it with vllm bench serve, and compare.

    Either starts a server (--serve) or attaches to one (--base-url). What the server says of itself replaces
    what the scenario says; predictions are on disk before their loads run. Exits 0 when every judged figure
    lies within its tolerance, 1 when one does not, 3 when it cannot be told. What was measured is in
    result.json after each load, whatever comes later.

    Args:
        scenario: a shipped scenario's name, or a YAML file: what is predicted.
        vllm_flags: after --, further flags of vllm serve for --serve.
        tolerances: a YAML file instead of the shipped tolerances.
        out: folder for predictions, traces, results and logs (out/live-NAME), without an earlier result.
        report: HTML file to write (report.html in that folder).
        json: print one JSON object and nothing else.
    """
    options, server = asked.options(), start.server(vllm_flags, attach)
    loaded = what_if.load(scenario)
    limits = Tolerances.load(tolerances)
    folder = out or Path("out") / f"live-{loaded.name}"
    path, page = new_result(folder), report or folder / "report.html"
    check_output(page, where="--report")
    known: dict[str, LoadComparison] = {}

    def keep(session: Session) -> tuple[Comparison, dict[str, Any]]:
        comparison = judge(session, limits, known)
        kept = document(session, comparison, tolerances=limits)
        write_result(path, kept)
        return comparison, kept

    session = Session(
        loaded, server, folder, seed=loaded.seed, python=start.python, say=say, after_load=keep, **options
    )
    with sigterm_as_ctrl_c():
        session.run()
    comparison, kept = keep(session)
    _write_page(page, session, comparison, kept)
    if json:
        print_json(kept)
    else:
        _print(comparison, kept)
        print(f"written: {path}\nwritten: {page}")
    return comparison.verdict.exit_code


def _write_page(page: Path, session: Session, comparison: Comparison, kept: dict[str, Any]) -> None:
    told = {name.replace("_", " "): value for name, value in facts(session).items()}
    write_comparison_page(
        page,
        comparison,
        title=f"{session.scenario.name} against a live server",
        question="Did the server do what was predicted of it?",
        facts=told | _ends(kept),
    )


def _ends(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a result besides the comparison."""
    server, added = kept["server"] or {}, kept["proxy_added_latency_ms"]
    return {
        "vllm": server.get("version"),
        "kv blocks": server.get("num_gpu_blocks"),
        "gpu": kept["machine"]["gpu"],
        "date": kept["date"],
        **{
            f"predicted {each['metric'].replace('_', ' ')}": "{} to {} requests/s".format(
                *("-" if end is None else f"{end:.4g}" for end in each["between"])
            )
            for each in kept["searches"]
        },
        **({} if added is None else {"latency that the proxy adds": f"{added:.3g} ms"}),
        "servecast": kept["servecast_version"],
    }


def _print(comparison: Comparison, kept: Mapping[str, Any]) -> None:
    """The comparison, what it rests on, and the hashes of what was predicted before."""
    print(comparison_text(comparison))
    print()
    for name, value in _ends(kept).items():
        print(f"{name}: {'-' if value is None else value}")
    hashes = {f"prediction of {load['name']}": load["prediction_sha256"] for load in kept["loads"]}
    hashes |= {f"search of {each['plan']}": each["sha256"] for each in kept["searches"]}
    for name, sha256 in hashes.items():
        print(f"{name}: sha256 {sha256}")
