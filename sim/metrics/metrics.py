"""Every number shown to a person, as a pure function of a run's tables.

The definitions are those of ``vllm bench serve`` (vllm/benchmarks/serve.py, calculate_metrics), so that a
simulated run, a live one and a published report are compared like with like. Times are seconds here;
only `summary` turns them into the milliseconds of vLLM's result JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.confidence import wilson
from servecast.sim.metrics.records import Run, engines_of
from servecast.sim.metrics.slo import Goodput

Floats = NDArray[np.float64]
PercentileLaw = Literal["linear", "exclusive"]

_BLOCK = 1 << 15  # requests that are counted at a time, which bounds the memory that this takes
_GAP_S = 1e-3  # between two steps of a busy engine, at most

METRICS = {  # vLLM's keys, and the name and the header under which it prints them
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}


LATENCIES = ("ttft", "tpot", "e2el", "client_queue_time", "e2el_including_client_queue")


def finished(requests: pd.DataFrame) -> NDArray[np.bool_] | slice:
    """Which requests have finished; all of them as a slice, which takes no copies."""
    rows = (requests["status"] == "finished").to_numpy()
    return slice(None) if rows.all() else rows


def latency(requests: pd.DataFrame, name: str) -> Floats:
    """One of ``LATENCIES`` of each finished request, in seconds.

    ttft = first_token - sent; e2el = finish - sent; tpot = (e2el - ttft) / (output_tokens - 1), NaN for
    a request of one token; client_queue_time = sent - arrival; e2el_including_client_queue = e2el and it.
    """
    rows = finished(requests)

    def between(start: str, end: str) -> Floats:
        seconds: Floats = requests[end].to_numpy()[rows] - requests[start].to_numpy()[rows]
        return seconds

    if name == "ttft":
        return between("sent", "first_token")
    if name == "client_queue_time":
        return between("arrival", "sent")
    found = between("sent", "finish")
    if name == "tpot":
        found -= between("sent", "first_token")
        gaps = requests["output_tokens"].to_numpy()[rows] - 1.0
        gaps[gaps <= 0] = np.nan
        found /= gaps
    elif name != "e2el":
        found += between("arrival", "sent")
    return found


def latencies(requests: pd.DataFrame) -> pd.DataFrame:
    """All of them; the index is that of ``requests``."""
    columns = {name: latency(requests, name) for name in LATENCIES}
    return pd.DataFrame(columns, index=requests.index[finished(requests)], copy=False)


def samples(run: Run, metric: str) -> tuple[Floats, Floats | None]:
    """The values of a metric in seconds and their weights (None: each counts once)."""
    if metric == "itl":
        return run.itl["gap"].to_numpy(dtype=float), run.itl["weight"].to_numpy(dtype=float)
    if metric not in METRICS:
        what = f"unknown metric {metric!r}"
        raise InputError(what, where="metric", fix=f"Use one of {', '.join(METRICS)}.")
    values = latency(run.requests, metric)
    known = ~np.isnan(values)
    return values if known.all() else values[known], None


def percentiles(
    values: ArrayLike,
    ranks: Sequence[float],
    *,
    weights: ArrayLike | None = None,
    law: PercentileLaw = "linear",
) -> list[float]:
    """Percentiles of values, each of which counts ``weight`` times (None: once).

    ranks: in percent. weights: their sum is taken as a whole number. law "linear" is NumPy's default (what
    vllm bench serve reports); "exclusive" is that of ``statistics.quantiles(n=100)``, which places rank q
    at position q/100 * (n + 1) and goes past the largest value when the sample is too small for the rank.
    NaN for an empty sample, and under "exclusive" for a single value.
    """
    data = np.asarray(values, dtype=float)
    ends: Floats | None = None
    n = len(data)
    if weights is None:
        data = np.sort(data)
    else:
        order = np.argsort(data, kind="stable")
        ends = np.asarray(weights)[order]
        np.cumsum(ends, out=ends)  # in place: of long runs these columns are the most that is held at once
        data = data[order]
        del order
        n = round(float(ends[-1])) if n else 0
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
        places: Any = [lower, min(lower + 1, n - 1)]
        below, above = data[places if ends is None else np.searchsorted(ends, places, side="right")]
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
    return statistics_of(values, weights, [name], law)[0]


def statistics_of(
    values: Floats, weights: Floats | None, names: Sequence[str], law: PercentileLaw
) -> list[float]:
    """Several statistics of one sample, sorted once. NaN for an empty sample."""
    ranks = {name: rank for name in names if (rank := _rank(name)) is not None}
    found = dict(zip(ranks, percentiles(values, list(ranks.values()), weights=weights, law=law), strict=True))
    if len(values):
        mean = float(np.average(values, weights=weights))
        found["mean"] = mean
        apart = values - mean
        apart **= 2
        found["std"] = math.sqrt(float(np.average(apart, weights=weights)))
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
        fix = "Use mean, median, std, max, or p and a rank as in p95."
        raise InputError(f"unknown statistic {name!r}", where="statistic", fix=fix)
    return rank


def duration(run: Run) -> float:
    """Seconds from the start of the run (or of the selected part) to the last completion, as vLLM has it."""
    done = run.requests["finish"].to_numpy()[finished(run.requests)]
    return float(done.max()) - float(run.meta.get("start_s", 0.0)) if len(done) else math.nan


def counted(run: Run) -> tuple[Run, float]:
    """What rates count: the run, and its `duration`; of a closed loop of a given duration its steady middle
    (see `steady_s`), with the requests that finished in it."""
    window = steady_s(run)
    if window is None:
        return run, duration(run)
    finish = run.requests["finish"]
    inside = run.requests[(finish > window[0]) & (finish <= window[1])]
    return replace(run, requests=inside), window[1] - window[0]


def steady_s(run: Run) -> tuple[float, float] | None:
    """The steady middle of a closed loop of a given duration: from when each client had its first answer (at
    most half of the duration) until no more is sent. None for another run, for one of several stages, and
    where fewer requests than clients finish in it."""
    stages = run.requests["stage"].unique()
    loop = (run.meta.get("closed_loops") or {}) and len(stages) == 1 and run.meta["closed_loops"][stages[0]]
    if not loop:
        return None
    clients, seconds = loop
    start = float(run.meta["stage_starts_s"][stages[0]])
    first = run.requests.sort_values("sent", kind="stable")["finish"].iloc[:clients].max()
    begin = max(min(float(first), start + seconds / 2), float(run.meta.get("start_s", 0.0)))
    finish = run.requests["finish"]
    if ((finish > begin) & (finish <= start + seconds)).sum() < clients:
        return None
    return begin, start + seconds


def good_requests(run: Run, goodput: Goodput) -> int:
    """How many finished requests meet every limit, each limit included.

    A request of one token has no TPOT and meets any limit on it.
    """
    values = latencies(run.requests)
    good = np.ones(len(values), dtype=bool)
    for metric, limit_ms in goodput.limits_ms:
        good &= values[metric].fillna(0.0).to_numpy() <= limit_ms / 1000
    return int(good.sum())


def series(steps: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column of the step table over time (index: seconds).

    Over several engine cores it is their sum (for kv_usage their mean), where each keeps its last value
    until its next step.
    """
    cores = engines_of(steps)
    if cores.nunique() <= 1:
        return pd.Series(steps[column].to_numpy(dtype=float), index=steps["start"].to_numpy())
    table = (
        steps.assign(core=cores)
        .pivot_table(index="start", columns="core", values=column, aggfunc="last")
        .ffill()
        .fillna(0.0)
    )
    return table.mean(axis=1) if column == "kv_usage" else table.sum(axis=1)


def gauges_at(run: Run, column: str, times: Floats) -> Floats:
    """A column of the step table as each replica shows it at given times (s): replicas x times, of several
    engine cores their sum (of kv_usage their mean). It keeps its value while one step follows another, and
    is 0 while the engine has nothing to do."""
    rows = []
    for replica in range(int(run.meta["replicas"])):
        steps = run.steps[run.steps["replica"] == replica]
        cores = [_gauge(core, column, times) for _, core in steps.groupby(engines_of(steps))]
        cores = cores or [np.zeros(len(times))]
        rows.append(np.mean(cores, axis=0) if column == "kv_usage" else np.sum(cores, axis=0))
    return np.array(rows)


def _gauge(steps: pd.DataFrame, column: str, times: Floats) -> Floats:
    start, seconds = steps["start"].to_numpy(), steps["duration"].to_numpy()
    at = np.searchsorted(start, times, side="right") - 1
    busy = (at >= 0) & (times < (start + seconds)[at] + _GAP_S)
    return np.where(busy, steps[column].to_numpy(dtype=float)[at], 0.0)


def peaks(requests: pd.DataFrame) -> tuple[float, int]:
    """The most output tokens and the most requests in flight in any second, counted as vLLM does.

    Seconds count from the first send; a request is in flight in every second that it touches. Its tokens
    are taken as evenly spaced between its first and its last, since records hold no time a token.
    """
    rows = finished(requests)
    names = ("sent", "first_token", "finish", "output_tokens")
    columns = [requests[name].to_numpy()[rows] for name in names]
    if not len(columns[0]):
        return math.nan, 0
    origin = columns[0].min()
    seconds = math.ceil(columns[2].max() - origin) + 2
    edges, per_second = np.zeros(seconds), np.zeros(seconds)
    for start in range(0, len(columns[0]), _BLOCK):
        sent, first, finish, tokens = (column[start : start + _BLOCK] for column in columns)
        edges += np.bincount((sent - origin).astype(int), minlength=seconds)
        edges -= np.bincount((finish - origin).astype(int) + 1, minlength=seconds)
        gap = (finish - first) / np.maximum(tokens - 1, 1)
        per_second += _by_second(first - origin, gap, tokens, seconds)
    return float(per_second.max()), int(np.cumsum(edges).max())


def _by_second(first: Floats, gap: Floats, tokens: NDArray[np.int64], seconds: int) -> Floats:
    """How many tokens fall into each second, of requests whose token k comes at ``first + k * gap``, rounded
    as floats are. A request costs the seconds that it touches, not its tokens."""
    start = first.astype(int)
    spans = (first + (tokens - 1) * gap).astype(int) - start  # full seconds that begin between two tokens
    owner = np.repeat(np.arange(len(first)), spans)
    edge = start[owner] + 1 + np.arange(len(owner)) - np.repeat(np.cumsum(spans) - spans, spans)
    first, gap = first[owner], gap[owner]
    before = np.ceil((edge - first) / gap)  # tokens before that second, but for rounding
    while (late := first + (before - 1) * gap >= edge).any():
        before -= late
    while (early := first + before * gap < edge).any():
        before += early
    left = tokens[owner] - before
    counts: Floats = np.bincount(start, weights=tokens, minlength=seconds).astype(np.float64)
    counts += np.bincount(edge, weights=left, minlength=seconds)
    counts -= np.bincount(edge - 1, weights=left, minlength=seconds)
    return counts


def prefix_hit_rate(requests: pd.DataFrame) -> float:
    """Share of prompt tokens that came out of the prefix cache, over the requests for which it is known."""
    cached, prompts = requests["cached_tokens"], requests["prompt_tokens"].to_numpy()
    prompt = int(prompts.sum(where=cached.notna().to_numpy()))
    return float(cached.sum()) / prompt if prompt else math.nan


def _totals(requests: pd.DataFrame) -> tuple[int, int, int]:
    """Finished requests, and their prompt and output tokens."""
    rows = finished(requests)
    prompt, output = (requests[name].to_numpy()[rows] for name in ("prompt_tokens", "output_tokens"))
    return len(prompt), int(prompt.sum()), int(output.sum())


def summary(
    run: Run,
    *,
    ranks: Sequence[float] = (95, 99),
    goodput: Goodput | None = None,
    law: PercentileLaw = "linear",
) -> dict[str, Any]:
    """The result of a run (or of the part that ``warmup.select`` gives) under vllm bench serve's JSON keys.

    ranks: percentiles to give, in percent. Besides vLLM's keys there are the engine's
    (kv_cache_usage_peak, max_num_running, max_num_waiting, num_preemptions, prefix_cache_hit_rate) and,
    with goodput, goodput_share (of all requests sent, a failed one is not good) with its 95 % Wilson
    interval. What is not known is None. The load's own keys (request_rate, burstiness,
    max_concurrency) come from ``run.meta``.
    """
    requests, steps, meta = run.requests, run.steps, run.meta
    done, prompt, output = _totals(requests)
    seconds = duration(run)
    part, middle_s = counted(run)
    middle, middle_prompt, middle_output = _totals(part.requests)
    tokens_peak, concurrency_peak = peaks(requests)
    rate, max_concurrency = meta.get("request_rate"), meta.get("max_concurrency")
    result: dict[str, Any] = {
        "num_prompts": len(requests),
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
        "burstiness": meta.get("burstiness"),
        "max_concurrency": max_concurrency,
        "duration": seconds,
        "completed": done,
        "failed": int(requests["status"].isin(("failed", "aborted")).sum()),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": middle / middle_s,
        "request_goodput": None,
        "output_throughput": middle_output / middle_s,
        "total_token_throughput": (middle_prompt + middle_output) / middle_s,
        "max_output_tokens_per_s": tokens_peak,
        "max_concurrent_requests": concurrency_peak,
    }
    if goodput is not None:
        share = wilson(good_requests(run, goodput), len(requests))
        result["request_goodput"] = good_requests(part, goodput) / middle_s
        result["goodput_share"] = share.estimate
        result["goodput_share_interval"] = [share.low, share.high]
    shown = ["ttft", "tpot", "itl", "e2el"]
    if max_concurrency is not None:
        shown.append("client_queue_time")
        if rate is not None and not math.isinf(rate):
            shown.append("e2el_including_client_queue")
    names = ["mean", "median", "std", *(f"p{rank:g}" for rank in ranks)]
    for metric in shown:
        for name, value in zip(names, statistics_of(*samples(run, metric), names, law), strict=True):
            result[f"{name}_{metric}_ms"] = value * 1000
    known = len(steps) > 0
    result["kv_cache_usage_peak"] = float(steps["kv_usage"].max()) if known else None
    result["max_num_running"] = int(series(steps, "running").max()) if known else None
    result["max_num_waiting"] = int(series(steps, "waiting").max()) if known else None
    preemptions = requests["preemptions"].sum(skipna=False)  # NaN: a client does not see them
    result["num_preemptions"] = None if math.isnan(preemptions) else int(preemptions)
    result["prefix_cache_hit_rate"] = prefix_hit_rate(requests)
    return known_or_none(result)


def known_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None where a value is NaN."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}


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
    if "spec_decode_num_drafts" in result:
        lines.append(f"{'Speculative Decoding':-^50}")
        line("Acceptance rate (%):", result["spec_decode_acceptance_rate"])
        line("Acceptance length:", result["spec_decode_acceptance_length"])
        line("Drafts:", result["spec_decode_num_drafts"], "<10")
        line("Draft tokens:", result["spec_decode_draft_tokens"], "<10")
        line("Accepted tokens:", result["spec_decode_accepted_tokens"], "<10")
        lines.append("Per-position acceptance (%):")
        for position, rate in enumerate(result["spec_decode_per_position_acceptance_rates"]):
            line(f"  Position {position}:", 100 * rate)
    lines.append("=" * 50)
    return "\n".join(lines)
