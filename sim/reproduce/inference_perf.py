"""What inference-perf reports of a run, as its version of September 2025 (and v0.2.0) computed it, and the
true values beside it.

- It takes a time for each line of a streamed answer, and an answer of n events has 2 n + 2 lines: each event
  is followed by an empty line, and the last is [DONE]. So n + 2 of its 2 n + 1 inter-token gaps are zero, its
  median gap is 0, and its mean gap and its TPOT are half the true ones.
- Its output tokens a second are counted by encoding the answers again, over the time from the first send to
  the last end: the drain after the last send is in it, which makes a short stage look slow.
- "Requests/s" is the rate at which requests were sent.
"""

from __future__ import annotations

import numpy as np

from servecast.sim.metrics.metrics import latencies, samples, statistics_of
from servecast.sim.metrics.records import Run
from servecast.sim.scenario.reported import Column

METRICS = ("itl", "tpot", "output_throughput", "request_throughput")  # those that it has its own way with


def measure(run: Run, column: Column, *, output_tokens_each: float) -> float:
    """What it reports for one of METRICS, in seconds or a second.

    run: one stage. output_tokens_each: what a generated token counts when its text is encoded again.
    """
    done = run.requests[run.requests["status"] == "finished"]
    lines = 2 * done["output_tokens"] + 2
    if column.metric == "itl":
        gaps, weights = samples(run, "itl")
        zeros = float((done["output_tokens"] + 2).sum())
        weights = np.ones(len(gaps)) if weights is None else weights
        return _statistic(column, np.append(gaps, 0.0), np.append(weights, zeros))
    if column.metric == "tpot":
        values = latencies(run.requests)
        return _statistic(column, ((values["e2el"] - values["ttft"]) / (lines - 1)).to_numpy(), None)
    if column.metric == "output_throughput":
        seconds = float(done["finish"].max() - done["sent"].min())
        return float(done["output_tokens"].sum()) * output_tokens_each / seconds
    return send_rate(run)


def true_value(run: Run, column: Column) -> float:
    """The same without these peculiarities: gaps between tokens, tokens generated a second while requests
    were being sent, and requests served a second up to the end of the last."""
    sent = run.requests["sent"]
    if column.metric in ("itl", "tpot"):
        return _statistic(column, *samples(run, column.metric))
    if column.metric == "output_throughput":
        ends = run.steps["start"] + run.steps["duration"]
        emitted = run.steps.loc[(ends > sent.min()) & (ends <= sent.max()), "emitted"]
        return float(emitted.sum()) / float(sent.max() - sent.min())
    done = run.requests[run.requests["status"] == "finished"]
    return len(done) / float(done["finish"].max() - sent.min())


def send_rate(run: Run) -> float:
    """Requests over the time from the first to the last send."""
    sent = run.requests["sent"]
    return len(sent) / float(sent.max() - sent.min())


def _statistic(column: Column, values: np.ndarray, weights: np.ndarray | None) -> float:
    assert column.statistic is not None
    return statistics_of(values, weights, [column.statistic], "linear")[0]
