"""``servecast validate live``: a server driven and judged against what was predicted of it before."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from servecast.sim.cli.options import WhatIf, numbers
from servecast.sim.cli.output import print_json
from servecast.sim.inputs.errors import InputError

if TYPE_CHECKING:
    from servecast.validate.compare.load import LoadComparison
    from servecast.validate.compare.sweep import Comparison
    from servecast.validate.live.own_server import OwnServer
    from servecast.validate.live.target import Target
    from servecast.validate.live.telemetry import Prometheus


@Parameter(name="*", group=Group("Server that runs already", sort_key=12))
@dataclass(frozen=True, kw_only=True, slots=True)
class Attach:
    """Where it is.

    Attributes:
        base_url: of the server: vLLM itself, or a proxy in front of it.
        model: the name that it serves.
        tokenizer: the model's, a folder or a name; the model's name without it.
        endpoint: of completions.
        api_key_env: the variable that holds the server's key.
        engine_url: of vLLM itself behind a proxy: what the proxy adds is then a figure of its own.
    """

    base_url: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    endpoint: str = "/v1/completions"
    api_key_env: str | None = None
    engine_url: str | None = None


def live(
    scenario: str,
    /,
    *vllm_flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    serve: Path | None = None,
    plan: str = "rate",
    rates: str | None = None,
    concurrency: str | None = None,
    duration: float = 60.0,
    seeds: int = 5,
    time_budget: float | None = None,
    prometheus_url: str | None = None,
    prometheus_label: list[str] | None = None,
    recorder: bool = False,
    vllm_python: Path | None = None,
    tolerances: Path | None = None,
    out: Path | None = None,
    report: Path | None = None,
    json: bool = False,
    attach: Attach = Attach(),
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
        serve: folder of the model to serve.
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
        recorder: with --serve, record every step of the scheduler: tells where an error comes from.
        vllm_python: Python of an environment with vLLM, for the server and for vllm bench serve; the one that
            runs this without it.
        tolerances: a YAML file instead of the shipped tolerances.
        out: folder for predictions, traces, results and logs (out/live-NAME), without an earlier result.
        report: HTML file to write (report.html in that folder).
        json: print one JSON object and nothing else.
    """
    if seeds < 1:
        raise InputError(f"{seeds} seeds", where="--seeds", fix="Give at least 1.")
    if not 0 < duration < float("inf"):
        raise InputError(f"{duration:g} s is no time", where="--duration", fix="Give seconds above 0.")
    python = str(vllm_python or sys.executable)
    if serve is None:
        server = _running(attach, vllm_flags, recorder=recorder)
    else:
        server = _to_start(serve, vllm_flags, python, attach, recorder=recorder)

    from servecast.calibrate.measure.vllm.ending import sigterm_as_ctrl_c
    from servecast.sim.run.results import check_output, write_result
    from servecast.validate.compare.page import write_comparison_report
    from servecast.validate.compare.verdict import Tolerances
    from servecast.validate.live.result import document, facts, judge, new_result
    from servecast.validate.live.session import Campaign

    loaded, changes = what_if.load(scenario)
    limits = Tolerances.load(tolerances)
    folder = out or Path("out") / f"live-{loaded.name}"
    path, page = new_result(folder), report or folder / "report.html"
    check_output(page, where="--report")

    known: dict[str, LoadComparison] = {}

    def keep(campaign: Campaign) -> tuple[Comparison, dict[str, Any]]:
        comparison = judge(campaign, limits, known)
        kept = document(campaign, comparison, what_if=changes, tolerances=limits)
        write_result(path, kept)
        return comparison, kept

    campaign = Campaign(
        loaded,
        server,
        folder,
        plans=tuple(dict.fromkeys(plan.split(","))),
        duration_s=duration,
        rates=() if rates is None else tuple(dict.fromkeys(numbers(rates, where="--rates"))),
        concurrency=_levels(concurrency),
        seed=loaded.seed,
        seeds=seeds,
        time_budget_s=time_budget,
        prometheus=_prometheus(prometheus_url, prometheus_label or []),
        python=python,
        say=_say,
        after_load=keep,
    )
    with sigterm_as_ctrl_c():
        campaign.run()
    comparison, kept = keep(campaign)
    write_comparison_report(
        page,
        comparison,
        title=f"{loaded.name} against a live server",
        question="Did the server do what was predicted of it?",
        facts={name.replace("_", " "): value for name, value in (facts(campaign) | _ends(kept)).items()},
    )
    if json:
        print_json(kept)
    else:
        _print(comparison, kept)
        print(f"written: {path}\nwritten: {page}")
    return comparison.verdict.exit_code


def _to_start(
    serve: Path, flags: tuple[str, ...], python: str, attach: Attach, *, recorder: bool
) -> OwnServer | Target:
    from servecast.validate.live.own_server import OwnServer

    if not (serve / "config.json").is_file():
        raise InputError("has no config.json", where=f"--serve {serve}", fix="Give the folder of a model.")
    if attach != Attach():
        raise InputError(
            "the server cannot be started here and run already",
            where="--serve",
            fix="Give either --serve, or --base-url and what belongs to it.",
        )
    return OwnServer(serve.absolute(), flags, python, recorder=recorder)


def _running(attach: Attach, flags: tuple[str, ...], *, recorder: bool) -> OwnServer | Target:
    from servecast.validate.live.target import Target

    if attach.base_url is None:
        raise InputError(
            "there is no server", where="--serve, --base-url", fix="Give one of the two: start it, or attach."
        )
    if recorder or flags:
        raise InputError(
            "is for a server that is started here",
            where="--recorder" if recorder else flags[0],
            fix="Remove it, or use --serve.",
        )
    if attach.model is None:
        raise InputError("no model is named", where="--model", fix="Give the name that the server serves.")
    target = Target(
        attach.base_url,
        attach.model,
        attach.tokenizer or attach.model,
        attach.endpoint,
        attach.engine_url,
        attach.api_key_env,
    )
    _ = target.key  # refused here where its variable is not set
    return target


def _levels(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    levels = numbers(text, where="--concurrency")
    if any(level != int(level) for level in levels):
        raise InputError(f"{text!r}", where="--concurrency", fix="Give whole numbers from 1.")
    return tuple(dict.fromkeys(map(int, levels)))


def _prometheus(url: str | None, labels: list[str]) -> Prometheus | None:
    from servecast.validate.live.telemetry import Prometheus

    pairs = dict(label.partition("=")[::2] for label in labels)
    if labels and (url is None or not all(pairs.values())):
        raise InputError(
            f"{labels[0]!r}", where="--prometheus-label", fix="Write NAME=VALUE, beside --prometheus-url."
        )
    return None if url is None else Prometheus(url, pairs)


def _ends(kept: dict[str, Any]) -> dict[str, Any]:
    """What the report says besides the comparison."""
    server, added = kept["server"] or {}, kept["proxy_added_latency_ms"]
    return {
        "vllm": server.get("version"),
        "kv_blocks": server.get("num_gpu_blocks"),
        "gpu": kept["machine"]["gpu"],
        "date": kept["date"],
        **{f"predicted_{each['metric']}": _between(each) for each in kept["searches"]},
        **({} if added is None else {"latency_that_the_proxy_adds": f"{added:.3g} ms"}),
        "servecast": kept["servecast_version"],
    }


def _between(search: dict[str, Any]) -> str:
    low, high = ("-" if each is None else f"{each:.4g}" for each in search["between"])
    return f"{low} to {high} requests/s"


def _print(comparison: Comparison, kept: dict[str, Any]) -> None:
    from servecast.validate.compare.text import print_comparison

    print_comparison(comparison)
    print()
    for name, value in _ends(kept).items():
        print(f"{name.replace('_', ' ')}: {'-' if value is None else value}")
    hashes = {f"prediction of {load['name']}": load["prediction_sha256"] for load in kept["loads"]}
    hashes |= {f"search of {each['plan']}": each["sha256"] for each in kept["searches"]}
    for name, sha256 in hashes.items():
        print(f"{name}: sha256 {sha256}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
