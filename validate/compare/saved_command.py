"""``servecast validate result``: a saved benchmark result against what a scenario predicts."""

from __future__ import annotations

from pathlib import Path

from servecast.sim.cli.options import WhatIf
from servecast.sim.cli.output import print_json
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.results import check_output, context
from servecast.sim.scenario.deployment import Deployment
from servecast.validate.compare.page import write_comparison_page
from servecast.validate.compare.saved import Traffic, judge_result
from servecast.validate.compare.text import comparison_text
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.readers import read_all


def result(
    file: Path,
    /,
    *,
    scenario: str,
    tolerances: Path | None = None,
    traffic: Traffic | None = None,
    seeds: int = 5,
    report: Path | None = None,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Judge a prediction by a saved result of a load generator.

    Reads what vllm bench serve, guidellm, aiperf, inference-perf or an llm-d benchmark report says,
    simulates the same load, and compares. Exits 0 when every judged figure lies within its tolerance, 1
    when one does not, 3 when the result cannot tell.

    Args:
        file: the result, as JSON, JSONL or YAML; its format is recognised.
        scenario: a shipped scenario's name, or a YAML file: what the result was measured on.
        tolerances: a YAML file instead of the shipped tolerances.
        traffic: what to simulate: the result's own requests (times and lengths), or the scenario's
            traffic under the result's load. Without it, the requests if the file has them.
        seeds: replications, from --seed on.
        report: write an HTML report.
        json: print one JSON object and nothing else.
    """
    if seeds < 1:
        raise InputError(f"{seeds} seeds", where="--seeds", fix="Give at least 1.")
    check_output(report, where="--report")
    limits = Tolerances.load(tolerances)
    readings = read_all(file)
    loaded = what_if.load(scenario)
    deployment = Deployment.of(loaded)
    comparison = judge_result(readings, deployment, tolerances=limits, seeds=seeds, traffic=traffic)
    made_of = context(deployment, seed=loaded.seed)
    said = readings[0].context
    facts = {
        "result": f"{file.name}, {said.tool} {said.tool_version or '(version not stated)'}",
        "model measured": said.model or "not stated",
        "model predicted": made_of["model_id"],
        "scenario": loaded.name,
        "profile": made_of["profile"] or "none",
        "basis": made_of["provenance"]["basis"],
        "seeds": f"{loaded.seed} to {loaded.seed + seeds - 1}",
        "tolerances": "shipped" if tolerances is None else tolerances.name,
        "servecast": made_of["servecast_version"],
    }
    if json:
        print_json(comparison.to_json() | {"facts": facts, "prediction": made_of})
    else:
        print(comparison_text(comparison))
    if report is not None:
        title, question = f"{loaded.name} against {file.name}", "Does the prediction hold?"
        write_comparison_page(report, comparison, title=title, question=question, facts=facts)
        if not json:
            print(f"written: {report}")
    return comparison.verdict.exit_code
