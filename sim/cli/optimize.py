"""``servecast optimize``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cyclopts import Group, Parameter

from servecast.sim.cli.options import Change, assignment, check_jobs
from servecast.sim.cli.output import show, today
from servecast.sim.cli.plan import Certainty, Objectives
from servecast.sim.cli.sweep import WorkersFlags
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import file_or_name
from servecast.sim.optimize import optimize as optimizing
from servecast.sim.optimize.candidates import Choices as Chosen
from servecast.sim.plan.judge import Objectives as Judged
from servecast.sim.run.results import check_output
from servecast.sim.run.workers import Workers


@Parameter(name="*", group=Group("Choices", sort_key=7))
@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What to choose from, separated by commas; without a flag the scenario's own.

    Attributes:
        gpus: names of GPUs, or files that describe one, as h100,h200,b200.
        tensor_parallel: GPUs of an engine core, as 1,2,4,8, or of each of its stages.
        pipeline_parallel: pipeline stages of an engine core, as 1,2.
        decode_context_parallel: of those GPUs the ones that share KV out, as 1,8.
        data_parallel: engine cores of a replica, as 1,2,4.
        expert_parallel: whole experts on each GPU, on,off or one of them.
        replicas: replicas that are simulated, and bought, together behind the router.
        max_num_seqs: sequences that may run together.
        max_num_batched_tokens: token budgets of a step.
        kv_offloading_size: GiB of host memory for the KV cache of a replica, as 0,128,512; 0 is none.
        variants: of the model, each with a name: fp8=CONFIG, with a shipped config's name or the path of a
            config.json, or fp8=engine.quantization=fp8, with a field of the scenario and its value.
        routers: routing policies, or files of an EndpointPickerConfig.
        prefill: prefill servers, of a scenario that has them.
        prefill_tensor_parallel: GPUs of one of them.
        decode: decode servers.
        decode_tensor_parallel: GPUs of one of them.
    """

    gpus: str | None = None
    tensor_parallel: str | None = None
    pipeline_parallel: str | None = None
    decode_context_parallel: str | None = None
    data_parallel: str | None = None
    expert_parallel: str | None = None
    replicas: str | None = None
    max_num_seqs: str | None = None
    max_num_batched_tokens: str | None = None
    kv_offloading_size: str | None = None
    variants: str | None = None
    routers: str | None = None
    prefill: str | None = None
    prefill_tensor_parallel: str | None = None
    decode: str | None = None
    decode_tensor_parallel: str | None = None

    def read(self) -> dict[str, Any]:
        """The lists by their names.

        Raises:
            InputError: one is no list of whole numbers, or no list of names with what they stand for.
        """
        given = {name: text for name, text in asdict(self).items() if text is not None}
        return {
            name: _READERS.get(name, _counts)(text, f"--{name.replace('_', '-')}")
            for name, text in given.items()
        }


def _words(text: str, where: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{text!r} is no list", where=where, fix="Separate the names by commas.")
    return words


def _files(text: str, where: str) -> list[str]:
    return [str(file_or_name(word)) for word in _words(text, where)]


def _counts(text: str, where: str, least: int = 1) -> list[int]:
    words = _words(text, where)
    if not all(word.isdecimal() and int(word) >= least for word in words):
        what = f"{text!r} is no list of numbers {'above 0' if least else 'from 0 on'}"
        raise InputError(what, where=where, fix="Write for example 1,2,4.")
    return [int(word) for word in words]


def _variants(text: str, where: str) -> dict[str, str | dict[str, Any]]:
    found: dict[str, str | dict[str, Any]] = {}
    for word in _words(text, where):
        name, _, value = word.partition("=")
        if not name or not value or name in found:
            fix = "Write for example bf16=Qwen3-8B,fp8=fp8/config.json."
            raise InputError(f"{word!r} is not of the form NAME=CONFIG, or comes twice", where=where, fix=fix)
        field, is_field, _ = value.partition("=")
        found[name] = dict([assignment(value, where=where)]) if is_field else str(file_or_name(field))
    return found


_READERS: dict[str, Callable[[str, str], Any]] = {
    "kv_offloading_size": partial(_counts, least=0),
    "gpus": _files,
    "expert_parallel": _words,
    "routers": _files,
    "variants": _variants,
}


@Parameter(name="*", group=Group("Money", sort_key=8))
@dataclass(frozen=True, kw_only=True, slots=True)
class Money:
    """What is to be served, and at what price.

    Attributes:
        target_rate: requests a second to serve.
        margin: share of the target rate to keep in hand.
        prices: YAML file of what GPUs cost an hour, instead of the one that is shipped.
    """

    target_rate: float
    margin: float = 0.1
    prices: Path | None = None


def optimize(
    scenario: str,
    /,
    *,
    money: Money,
    choices: Choices = Choices(),
    out: Path = Path("out/optimize"),
    resume: bool = False,
    json: bool = False,
    objectives: Objectives = Objectives(),  # noqa: B008
    certainty: Certainty = Certainty(),  # noqa: B008
    workers: WorkersFlags = Workers(),  # noqa: B008 (frozen)
    change: Change = Change(),  # noqa: B008
) -> int:
    """Find the cheapest deployment that serves a rate within its SLOs, and its runners-up.

    Looks at every combination of the choices in a short run, and plans the few that may win. Writes each
    result as soon as it is there, and at the end a page with the plot, a vllm serve line, a Kubernetes
    Deployment and values for llm-d's chart. Exits 1 if nothing serves the rate.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        out: folder for the results; the page and the files of the best one go to best/ in it.
        resume: take the results that are there.
        json: print one JSON object and nothing else.
    """
    check_jobs(workers.jobs)
    loaded = change.load(scenario)
    page = out / "best" / "optimize.html"
    check_output(page, where="--out")
    good = None if objectives.goodput is None else " ".join(objectives.goodput)
    found = optimizing.optimize(
        loaded,
        Judged.asked(loaded, objectives.slo, good, objectives.attainment),
        target_rate=money.target_rate,
        choices=Chosen(**choices.read(), prices=money.prices),
        margin=money.margin,
        out=out,
        resume=resume,
        progress=sys.stderr.isatty(),
        effort=certainty.effort,
        workers=workers,
    )
    found.to_html(page, date=today())
    files = [page, *found.write_files(page.parent)]
    return show(found, json=json, more=[f"Files: {', '.join(map(str, files))}"])
