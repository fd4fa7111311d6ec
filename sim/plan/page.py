"""The single-file page of a plan: the answer, its plots, its probes, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from servecast.sim.metrics.records import Run
from servecast.sim.plan import closed_loop, figures
from servecast.sim.plan.break_even import BreakEven, draw_break_even
from servecast.sim.plan.capacity import Plan
from servecast.sim.plan.closed_loop import SweepPoint
from servecast.sim.report.drawing import picture
from servecast.sim.report.page import Plot, figure_text, write_page
from servecast.sim.run.figures import draw_engine, itl_histogram

LIMITS = {  # a binding limit in words, and what moves it
    "compute": ("Compute", "A GPU with more FLOP/s, a smaller or quantised model, or more replicas."),
    "memory_bandwidth": (
        "Memory bandwidth",
        "A GPU with more bandwidth, quantised weights or KV cache, or more replicas.",
    ),
    "interconnect": ("Interconnect", "Less tensor parallelism, or faster links."),
    "host": ("Host time of a step", "A faster CPU, CUDA graphs, or a larger batch."),
    "front_end": ("Front end", "More API server processes, more CPU, or a lighter client."),
    "kv_blocks": ("KV cache blocks", "A higher gpu_memory_utilization, more memory, or a shorter context."),
    "kv_loads": ("Loads of KV cache", "A faster link to what keeps it, or less that is loaded."),
    "passed_over": ("Slots of adapters, or grammars", "A higher max_loras, or more cores for grammars."),
    "kv_link": ("The link to what keeps KV cache", "A faster one, or more replicas."),
    "max_num_seqs": ("max_num_seqs", "A higher max_num_seqs, as long as TPOT allows."),
    "token_budget": ("max_num_batched_tokens", "A higher max_num_batched_tokens, as long as ITL allows."),
    "none": ("Nothing found", "The search ended at its largest rate without a miss."),
    "unknown": ("Unknown", ""),
}


_LATENCY = (
    "Means over replications; the band is their interval at {0.confidence:.0%} confidence, corrected for "
    "repeated looks. Triangles lie above the plot. Beyond the knee the queue grows for as long as the load "
    "lasts, so latency there depends on the length of a run."
)


@dataclass(frozen=True, slots=True)
class PageContext:
    """What the page says beside the numbers. All values are shown as given, in the order given.

    title: of the page. question: one sentence. subtitle: lines on what is planned, on what, and when. band:
    how far the answer is to be believed ("TTFT p95 within 20 %, ..."). facts: beside those of the plan.
    run_context: model, GPU, engine version, flags, traffic, ... provenance: tool version, seed, profile, how
    the profile came about, ... assumptions: rows with the same keys each.
    """

    title: str
    question: str = ""
    subtitle: Sequence[str] = ()
    band: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    run_context: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    assumptions: Sequence[Mapping[str, object]] = ()


def write_plan_page(
    path: Path | str,
    plan: Plan,
    *,
    context: PageContext,
    run: Run | None = None,
    sweep: Sequence[SweepPoint] = (),
    loading: Mapping[str, Any] | None = None,
    speculation: BreakEven | None = None,
) -> Path:
    """Writes the page of a plan and returns its path.

    run: one replication at (or next to) the answer, for the plots over time and the token gaps.
    sweep: a closed-loop sweep, for throughput against concurrency. loading: what loading a prompt's KV
    cache takes, and computing it (``loading_facts``). speculation: when it pays. The file needs no network
    and is the same, byte for byte, for the same input; it is written whole or not at all.
    """
    panels = len(plan.probes[0].verdicts)
    draw = partial(figures.draw_latency, plan)
    latency = picture("latency", "Latency against request rate", panels, draw)
    plots = [Plot("Latency against request rate", latency, _LATENCY.format(plan), wide=True)]
    if run is not None and len(run.steps):
        rate = run.meta.get("request_rate")
        caption = (
            "Warm-up included." if rate is None else f"One run at {rate:.4g} requests/s, warm-up included."
        )
        plots.append(
            Plot(
                "The engine over time",
                picture("engine", "Requests and KV cache over time", 2, partial(draw_engine, run)),
                caption,
                wide=True,
            )
        )
    if speculation is not None:
        caption = (
            f"{speculation.sentence[0].upper()}{speculation.sentence[1:]}. Decodes alone, at a context of "
        )
        caption += f"{speculation.context:,} tokens; {speculation.acceptance}."
        label, draw = "When speculation pays, by requests in a step", partial(draw_break_even, speculation)
        svg = picture("speculation", label, 2, draw)
        plots.append(Plot("When speculation pays", svg, caption, wide=True))
    plots.append(Plot("Throughput against request rate", figures.throughput_by_rate(plan)))
    if sweep:
        plots.append(_sweep_plot(sweep))
    if run is not None and len(run.itl):
        svg = itl_histogram(run)
        plots.append(Plot("Inter-token latency", svg, "Pooled over all tokens of one run at the answer."))
    if loading is not None and loading["prompts"]:
        caption = "Of one prompt, alone on the server: from host memory, as large copies, and chunk by chunk."
        plots.append(Plot("Loading against computing", figures.loading(loading["prompts"]), caption))
    limit, remedy = LIMITS.get(plan.binding.limit, (plan.binding.limit, ""))
    return write_page(
        path,
        "servecast.sim.plan",
        plan=plan,
        best=plan.best,
        headline=_headline(plan),
        limit=limit,
        remedy=remedy,
        context=context,
        plots=plots,
        objectives=_objectives(plan),
        speculation=speculation,
    )


def _headline(plan: Plan) -> str:
    """The answer in a sentence, after its number."""
    objectives = " and ".join(_objectives(plan))
    confidence = f"with {plan.confidence:.0%} confidence"
    if plan.state == "infeasible":
        return f"No rate meets {objectives}: even a request that has the server to itself misses."
    if plan.max_request_rate is None:
        return f"No rate could be shown to meet {objectives} {confidence}."
    sentence = f"is the largest rate found to meet {objectives} {confidence}"
    fail = plan.interval[1]
    if fail is None:
        return f"{sentence}; no rate that was tried fails."
    return f"{sentence}; {figure_text(fail)} requests/s fails."


def _objectives(plan: Plan) -> list[str]:
    return [figures.spoken(verdict) for verdict in plan.probes[0].verdicts]


def _sweep_plot(sweep: Sequence[SweepPoint]) -> Plot:
    knee = closed_loop.knee(sweep)
    caption = (
        "The knee is the smallest concurrency within 5 % of the largest throughput."
        if knee is not None
        else "Throughput still rises at the last level: the knee lies beyond."
    )
    return Plot("Throughput against concurrency", figures.throughput_by_concurrency(sweep, knee), caption)
