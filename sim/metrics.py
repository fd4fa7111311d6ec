"""Every number shown to a person, as a pure function of a run's tables.

The definitions are those of ``vllm bench serve`` (vllm/benchmarks/serve.py, calculate_metrics), so that a
simulated run, a live one and a published report are compared like with like. Times are seconds here;
only `summary` turns them into the milliseconds of vLLM's result JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from servecast.sim.confidence import mser5, wilson
from servecast.sim.errors import InputError
from servecast.sim.records import Run

Floats = NDArray[np.float64]
PercentileLaw = Literal["linear", "exclusive"]

METRICS = {  # vLLM's keys, and the name and the header under which it prints them
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}


def latencies(requests: pd.DataFrame) -> pd.DataFrame:
    """The latencies of the finished requests, a row each, in seconds; the index is that of ``requests``.

    ttft = first_token - sent; e2el = finish - sent; tpot = (e2el - ttft) / (output_tokens - 1), NaN for
    a request of one token; client_queue_time = sent - arrival; e2el_including_client_queue = their sum.
    """
    done = requests[requests["status"] == "finished"]
    ttft, e2el, queue = (
        done["first_token"] - done["sent"],
        done["finish"] - done["sent"],
        done["sent"] - done["arrival"],
    )
    gaps = (done["output_tokens"] - 1).where(done["output_tokens"] > 1).astype("float64")
    return pd.DataFrame(
        {
            "ttft": ttft,
            "tpot": (e2el - ttft) / gaps,
            "e2el": e2el,
            "client_queue_time": queue,
            "e2el_including_client_queue": e2el + queue,
        }
    )


def samples(run: Run, metric: str) -> tuple[Floats, Floats | None]:
    """The values of a metric in seconds and their weights (None: each counts once)."""
    if metric == "itl":
        return run.itl["gap"].to_numpy(dtype=float), run.itl["weight"].to_numpy(dtype=float)
    if metric not in METRICS:
        raise InputError(
            f"unknown metric {metric!r}", where="metric", fix=f"Use one of {', '.join(METRICS)}."
        )
    values = latencies(run.requests)[metric].to_numpy(dtype=float)
    return values[~np.isnan(values)], None


def percentiles(
    values: ArrayLike,
    ranks: Sequence[float],
    *,
    weights: ArrayLike | None = None,
    law: PercentileLaw = "linear",
) -> list[float]:
    """Percentiles of values, each of which counts ``weight`` times (whole numbers; None: once).

    ranks: in percent. law "linear" is NumPy's default (what vllm bench serve reports); "exclusive" is
    that of ``statistics.quantiles(n=100)``, which places rank q at position q/100 * (n + 1) and goes past
    the largest value when the sample is too small for the rank. NaN for an empty sample, and under
    "exclusive" for a single value.
    """
    data = np.asarray(values, dtype=float)
    order = np.argsort(data, kind="stable")
    data = data[order]
    ends = np.arange(1, len(data) + 1) if weights is None else np.cumsum(np.asarray(weights)[order])
    n = int(ends[-1]) if len(data) else 0
    if n == 0 or (n == 1 and law == "exclusive"):
        return [math.nan] * len(ranks)
    results = []
    for rank in ranks:
        if law == "linear":
            position = rank / 100 * (n - 1)
            lower = min(math.floor(position), n - 1)
        else:
            position = rank / 100 * (n + 1) - 1
            lower = min(max(math.floor(position), 0), n - 2)
        below, above = data[np.searchsorted(ends, [lower, min(lower + 1, n - 1)], side="right")]
        part = position - lower
        # NumPy's own interpolation, bit for bit: from the nearer end
        step = above - below
        results.append(float(below + step * part if part < 0.5 else above - step * (1 - part)))
    return results


def statistic(run: Run, metric: str, name: str, *, law: PercentileLaw = "linear") -> float:
    """One statistic of a metric in seconds: "mean", "median", "std" (population), "max" or "p95", "p99.9".

    Raises InputError for a name that is none of these.
    """
    values, weights = samples(run, metric)
    return _statistics(values, weights, [name], law)[0]


def _statistics(
    values: Floats, weights: Floats | None, names: Sequence[str], law: PercentileLaw
) -> list[float]:
    """Several statistics of one sample, sorted once. NaN for an empty sample."""
    ranks = {name: rank for name in names if (rank := _rank(name)) is not None}
    found = dict(zip(ranks, percentiles(values, list(ranks.values()), weights=weights, law=law), strict=True))
    if len(values):
        mean = float(np.average(values, weights=weights))
        found["mean"] = mean
        found["std"] = math.sqrt(float(np.average((values - mean) ** 2, weights=weights)))
        found["max"] = float(values.max())
    return [found.get(name, math.nan) for name in names]


def _rank(name: str) -> float | None:
    """The rank in percent that a statistic's name asks for, None for a moment."""
    if name in ("mean", "std", "max"):
        return None
    if name == "median":
        return 50.0
    try:
        rank = float(name.removeprefix("p")) if name.startswith("p") else math.nan
    except ValueError:
        rank = math.nan
    if not 0 <= rank <= 100:
        raise InputError(
            f"unknown statistic {name!r}",
            where="statistic",
            fix="Use mean, median, std, max or p and a rank: p95.",
        )
    return rank


@dataclass(frozen=True, slots=True)
class Warmup:
    """What to leave out at the start of a run: exactly one of these.

    seconds: what was sent before this time; requests: the first so many sent; share: the first part of
    all requests; auto: what MSER-5 cuts from the TTFT or the E2E series, whichever is more.
    """

    seconds: float | None = None
    requests: int | None = None
    share: float | None = None
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> Warmup:
        """ "30s", "100" (requests), "20%" or "auto"."""
        text = text.strip()
        try:
            if text == "auto":
                return cls(auto=True)
            if text.endswith("s") and 0 <= (seconds := float(text[:-1])) < math.inf:
                return cls(seconds=seconds)
            if text.endswith("%") and 0 <= (percent := float(text[:-1])) < 100:
                return cls(share=percent / 100)
            if text.isdecimal():
                return cls(requests=int(text))
        except ValueError:
            pass
        raise InputError(
            f"cannot read {text!r}", where="--warmup", fix="Give 30s, a number of requests, 20% or auto."
        )


def select(run: Run, *, stage: int | str | None = None, warmup: Warmup | None = None) -> Run:
    """The part of a run that counts: one stage of it, without its warm-up.

    The requests are those of the stage that were sent after the warm-up, the steps those that began
    between its end and the last finish. Inter-token gaps carry no time, so the warm-up stays in them.
    ``meta["start_s"]`` says where the part begins: at the end of the warm-up, else at the stage's start
    (``meta["stage_starts_s"]``, or its first arrival where that is not recorded).
    """
    requests, itl, start = run.requests, run.itl, float(run.meta.get("start_s", 0.0))
    if stage is not None:
        index = _stage_index(run, stage)
        requests, itl = requests[requests["stage"] == index], itl[itl["stage"] == index]
        starts = run.meta.get("stage_starts_s")
        start = float(starts[index] if starts else requests["arrival"].min())
    if warmup is not None:
        in_order = requests.sort_values("sent", kind="stable")
        cut = _warmup_requests(in_order, warmup, start)
        if cut >= len(in_order):
            raise InputError(
                f"the warm-up leaves none of {len(in_order)} requests",
                where="warmup",
                fix="Cut less, or run longer.",
            )
        requests = in_order.iloc[cut:].sort_index()
        start = start + warmup.seconds if warmup.seconds is not None else float(requests["sent"].min())
    steps = run.steps
    if (stage is not None or warmup is not None) and len(steps):
        steps = steps[(steps["start"] >= start) & (steps["start"] <= requests["finish"].max())]
    return replace(run, requests=requests, steps=steps, itl=itl, meta={**run.meta, "start_s": start})


def _stage_index(run: Run, stage: int | str) -> int:
    if stage in run.stages:
        return run.stages.index(str(stage))
    if isinstance(stage, int) and 0 <= stage < max(len(run.stages), 1):
        return stage
    raise InputError(f"no stage {stage!r}", where="stage", fix=f"The run has {', '.join(run.stages)}.")


def _warmup_requests(in_order: pd.DataFrame, warmup: Warmup, start: float) -> int:
    """How many leading requests of a table in sending order are warm-up."""
    if warmup.seconds is not None:
        return int((in_order["sent"] < start + warmup.seconds).sum())
    if warmup.requests is not None:
        return warmup.requests
    if warmup.share is not None:
        return int(warmup.share * len(in_order))
    done = latencies(in_order)
    cut = max(mser5(done["ttft"])[0], mser5(done["e2el"])[0])
    return int(in_order.index.get_indexer(done.index[cut : cut + 1])[0]) if cut else 0


def duration(run: Run) -> float:
    """Seconds from the start of the run (or of the selected part) to the last completion, as vLLM has it."""
    done = run.requests.loc[run.requests["status"] == "finished", "finish"]
    return float(done.max()) - float(run.meta.get("start_s", 0.0)) if len(done) else math.nan


def good_requests(run: Run, limits_ms: Mapping[str, float]) -> int:
    """How many finished requests meet every limit (metric to milliseconds), each limit included.

    A request of one token has no TPOT and meets any limit on it.
    """
    values = latencies(run.requests)
    good = np.ones(len(values), dtype=bool)
    for metric, limit in limits_ms.items():
        good &= values[metric].fillna(0.0).to_numpy() <= limit / 1000
    return int(good.sum())


def series(steps: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column of the step table over time (index: seconds), over all replicas: their sum, for shares their mean.

    A replica keeps its last value until its next step.
    """
    if steps["replica"].nunique() <= 1:
        return pd.Series(steps[column].to_numpy(dtype=float), index=steps["start"].to_numpy())
    table = (
        steps.pivot_table(index="start", columns="replica", values=column, aggfunc="last").ffill().fillna(0.0)
    )
    return table.mean(axis=1) if column == "kv_usage" else table.sum(axis=1)


def peaks(requests: pd.DataFrame) -> tuple[float, int]:
    """The most output tokens and the most requests in flight in any second, counted as vLLM does.

    Seconds count from the first send; a request is in flight in every second that it touches. Its tokens
    are taken as evenly spaced between its first and its last, since records hold no time a token.
    """
    done = requests[requests["status"] == "finished"]
    if not len(done):
        return math.nan, 0
    sent, first, finish = (done[name].to_numpy() for name in ("sent", "first_token", "finish"))
    origin, tokens = sent.min(), done["output_tokens"].to_numpy()
    seconds = math.ceil(finish.max() - origin) + 2
    edges = np.bincount((sent - origin).astype(int), minlength=seconds).astype(float)
    edges -= np.bincount((finish - origin).astype(int) + 1, minlength=seconds)
    per_second = np.zeros(seconds)
    gap = (finish - first) / np.maximum(tokens - 1, 1)
    for at in range(0, len(done), 10_000):  # bounds the memory: a float a token
        part = slice(at, at + 10_000)
        number = np.arange(tokens[part].sum()) - np.repeat(
            np.cumsum(tokens[part]) - tokens[part], tokens[part]
        )
        times = np.repeat(first[part] - origin, tokens[part]) + number * np.repeat(gap[part], tokens[part])
        per_second += np.bincount(times.astype(int), minlength=seconds)[:seconds]
    return float(per_second.max()), int(np.cumsum(edges).max())


def prefix_hit_rate(requests: pd.DataFrame) -> float:
    """Share of prompt tokens that came out of the prefix cache, over the requests for which it is known."""
    known = requests[requests["cached_tokens"].notna()]
    prompt = int(known["prompt_tokens"].sum())
    return float(known["cached_tokens"].sum()) / prompt if prompt else math.nan


def summary(
    run: Run,
    *,
    ranks: Sequence[float] = (95, 99),
    goodput: Mapping[str, float] | None = None,
    law: PercentileLaw = "linear",
) -> dict[str, Any]:
    """The result of a run (or of the part that `select` gives) under the JSON keys of vllm bench serve.

    ranks: percentiles to give. goodput: limit in milliseconds by metric ("ttft", "tpot", "e2el").
    Besides vLLM's keys there are the engine's (kv_cache_usage_peak, max_num_running, max_num_waiting,
    num_preemptions, prefix_cache_hit_rate) and, with goodput, goodput_share (of all requests sent, a
    failed one is not good) with its 95 % Wilson interval. What is not known is None.
    The load's own keys (request_rate, burstiness, max_concurrency) come from ``run.meta``.
    """
    requests, steps, meta = run.requests, run.steps, run.meta
    done = requests[requests["status"] == "finished"]
    seconds, prompt, output = (
        duration(run),
        int(done["prompt_tokens"].sum()),
        int(done["output_tokens"].sum()),
    )
    tokens_peak, concurrency_peak = peaks(requests)
    rate, max_concurrency = meta.get("request_rate"), meta.get("max_concurrency")
    result: dict[str, Any] = {
        "num_prompts": len(requests),
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
        "burstiness": meta.get("burstiness"),
        "max_concurrency": max_concurrency,
        "duration": seconds,
        "completed": len(done),
        "failed": int(requests["status"].isin(("failed", "aborted")).sum()),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / seconds,
        "request_goodput": None,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "max_output_tokens_per_s": tokens_peak,
        "max_concurrent_requests": concurrency_peak,
    }
    if goodput is not None:
        good = good_requests(run, goodput)
        share = wilson(good, len(requests))
        result["request_goodput"] = good / seconds
        result["goodput_share"] = share.estimate
        result["goodput_share_interval"] = [share.low, share.high]
    shown = ["ttft", "tpot", "itl", "e2el"]
    if max_concurrency is not None:
        shown.append("client_queue_time")
        if rate is not None and not math.isinf(rate):
            shown.append("e2el_including_client_queue")
    names = ["mean", "median", "std", *(f"p{rank:g}" for rank in ranks)]
    for metric in shown:
        for name, value in zip(names, _statistics(*samples(run, metric), names, law), strict=True):
            result[f"{name}_{metric}_ms"] = value * 1000
    known = len(steps) > 0
    result["kv_cache_usage_peak"] = float(steps["kv_usage"].max()) if known else None
    result["max_num_running"] = int(series(steps, "running").max()) if known else None
    result["max_num_waiting"] = int(series(steps, "waiting").max()) if known else None
    result["num_preemptions"] = int(requests["preemptions"].sum())
    result["prefix_cache_hit_rate"] = prefix_hit_rate(requests)
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in result.items()}


def vllm_bench_text(result: Mapping[str, Any]) -> str:
    """The block that ``vllm bench serve`` prints at the end, line for line, from a `summary`."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def line(label: str, value: Any, form: str = "<10.2f") -> None:
        lines.append(f"{label:<40} " + ("n/a" if value is None else format(value, form)))

    line("Successful requests:", result["completed"], "<10")
    line("Failed requests:", result["failed"], "<10")
    if result["max_concurrency"] is not None:
        line("Maximum request concurrency:", result["max_concurrency"], "<10")
    if result["request_rate"] not in (None, "inf"):
        line("Request rate configured (RPS):", result["request_rate"])
    line("Benchmark duration (s):", result["duration"])
    line("Total input tokens:", result["total_input_tokens"], "<10")
    line("Total generated tokens:", result["total_output_tokens"], "<10")
    line("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        line("Request goodput (req/s):", result["request_goodput"])
    line("Output token throughput (tok/s):", result["output_throughput"])
    line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    line("Peak concurrent requests:", result["max_concurrent_requests"])
    line("Total token throughput (tok/s):", result["total_token_throughput"])
    for metric, (name, header) in METRICS.items():
        if f"mean_{metric}_ms" not in result:
            continue
        lines.append(f"{header:-^50}")
        line(f"Mean {name} (ms):", result[f"mean_{metric}_ms"])
        line(f"Median {name} (ms):", result[f"median_{metric}_ms"])
        for key, value in result.items():
            rank = key.removeprefix("p").removesuffix(f"_{metric}_ms")
            if key == f"p{rank}_{metric}_ms":
                line(f"P{rank} {name} (ms):", value)
    lines.append("=" * 50)
    return "\n".join(lines)
