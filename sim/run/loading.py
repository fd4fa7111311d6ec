"""When loading KV cache pays: what it takes to load a prompt's, and what to compute it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from servecast.sim.metrics.binding import StepRow
from servecast.sim.report.text import table
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.kv_offload import Offloading

LENGTHS = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Loading:
    """Of a prompt of so many tokens, alone on the server. Times in seconds.

    Attributes:
        recompute_s: its prefill, chunk by chunk. load_s: from host memory, as large copies.
        break_even_gb_per_s: of the link to one GPU, at which both take as long.
        least_reuse: share of the stored prompts that must be loaded again, for what is saved to make up for
            storing all: 0 where stores do not delay a step; None where loading takes longer anyway.
    """

    tokens: int
    recompute_s: float
    load_s: float
    break_even_gb_per_s: float
    least_reuse: float | None

    @property
    def gain(self) -> float:
        """How many times as long computing takes."""
        return self.recompute_s / self.load_s


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second that a busy server computes in full steps, and that its link loads."""

    computed: float
    loaded: float


def prefill_s(deployment: Deployment, tokens: int) -> float:
    """Seconds of a prompt's steps, alone, without what it waits for."""
    budget, done, seconds = deployment.config.max_num_batched_tokens, 0, 0.0
    while done < tokens:
        chunk = min(budget, tokens - done)
        step = StepRow([(chunk, done)], 0, 0, int(done + chunk == tokens))
        seconds += deployment.step_time.seconds(step)
        done += chunk
    return seconds


def loading(deployment: Deployment, lengths: Sequence[int] = LENGTHS) -> tuple[Loading, ...]:
    """A row a length that fits into ``max_model_len``. The deployment offloads."""
    found = deployment.offloading
    assert found is not None
    block_bytes = found.block_bytes / found.block_size
    rows = []
    for tokens in lengths:
        if tokens >= deployment.config.max_model_len:
            break
        recompute, load = prefill_s(deployment, tokens), tokens * found.load_s_per_token
        fixed = tokens / found.block_size * found.link.block_s
        bandwidth = tokens * block_bytes / max(recompute - fixed, 1e-12)
        rows.append(Loading(tokens, recompute, load, bandwidth / 1e9, _reuse(found, recompute, load)))
    return tuple(rows)


def _reuse(found: Offloading, recompute: float, load: float) -> float | None:
    if load >= recompute:
        return None
    return load / (recompute - load) if found.stores_delay else 0.0


def rates(deployment: Deployment) -> Rate:
    """What a full step computes, at no context, and what the link to a GPU moves meanwhile."""
    assert deployment.offloading is not None
    budget = deployment.config.max_num_batched_tokens
    seconds = deployment.step_time.seconds(StepRow([(budget, 0)], 0, 0, 1))
    return Rate(budget / seconds, 1 / deployment.offloading.load_s_per_token)


def loading_facts(deployment: Deployment) -> dict[str, Any]:
    """The same as plain values."""
    rate = rates(deployment)
    return {
        "prompts": [asdict(row) for row in loading(deployment)],
        "computed_tokens_per_s": rate.computed,
        "loaded_tokens_per_s": rate.loaded,
    }


def loading_text(facts: dict[str, Any]) -> str:
    """A row a length."""
    rows = [
        [
            f"{row['tokens']:,}",
            1e3 * row["recompute_s"],
            1e3 * row["load_s"],
            row["recompute_s"] / row["load_s"],
            row["break_even_gb_per_s"],
            "never" if row["least_reuse"] is None else f"{row['least_reuse']:.0%}",
        ]
        for row in facts["prompts"]
    ]
    names = ["prompt", "compute ms", "load ms", "gain", "break-even GB/s", "reuse needed"]
    text = table(names, rows, title="\nLoading a prompt's KV cache against computing it, alone")
    return (
        f"{text}\nA busy server computes {facts['computed_tokens_per_s']:,.0f} prompt tokens a second, and "
        f"loads {facts['loaded_tokens_per_s']:,.0f}"
    )
