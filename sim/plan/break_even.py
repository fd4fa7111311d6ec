"""When speculation stops to pay: by requests in a step, and by how many drafts are accepted.

Steps of decodes alone are compared, of requests that all stand at one context, with and without drafts. A
step with drafts lasts longer and brings more tokens; it pays while the tokens outweigh the time. Prompt work
beside the decodes is the same in both and brings them closer to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from servecast.sim.metrics.binding import StepRow
from servecast.sim.report.drawing import BAD, FIRST, INK, MUTED, SECOND, mark
from servecast.sim.report.text import table
from servecast.sim.scenario.acceptance import rate_of
from servecast.sim.scenario.deployment import Deployment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OFF = {"engine.speculative_config": None, "acceptance": None}


@dataclass(frozen=True, slots=True)
class Level:
    """A number of requests in a step.

    Attributes:
        requests: that decode. drafts: that each verifies, on average. tokens: a request gets from a step.
        tpot_s, plain_s: time of a token with drafts and without. least_tokens: of a step, from which on
            drafts pay. least_rate: the geometric rate of acceptance that this takes; None: no rate does.
    """

    requests: int
    drafts: float
    tokens: float
    tpot_s: float
    plain_s: float
    least_tokens: float
    least_rate: float | None

    @property
    def gain(self) -> float:
        """How many times as fast tokens come."""
        return self.plain_s / self.tpot_s


@dataclass(frozen=True, slots=True)
class BreakEven:
    """When a deployment's speculation pays.

    Attributes:
        method, num_tokens: of its drafts. acceptance: where its law comes from, in words. context: KV tokens
            of a request. levels: by requests, rising.
        pays_up_to: the most requests of a step with which it pays: none beyond does. 0: with no number.
        most: requests that the engine runs, or its KV cache holds, at most.
    """

    method: str
    num_tokens: int
    acceptance: str
    context: int
    levels: tuple[Level, ...]
    pays_up_to: int
    most: int

    @property
    def sentence(self) -> str:
        """The answer in a line."""
        said = f"{self.method} with {self.num_tokens} drafts"
        if self.pays_up_to == 0:
            return f"{said} never pays here"
        if self.pays_up_to >= self.most:
            return f"{said} pays at every batch, up to {self.most} requests"
        return f"{said} pays up to {self.pays_up_to} requests in a step, and costs beyond"

    def to_json(self) -> dict[str, Any]:
        """Plain values; times in ms."""
        levels = [asdict(level) | {"gain": level.gain} for level in self.levels]
        for level in levels:
            for name in ("tpot", "plain"):
                level[f"{name}_ms"] = 1e3 * level.pop(f"{name}_s")
        return asdict(self) | {"levels": levels}

    def to_text(self) -> str:
        """The sentence, and a row a number of requests."""
        rows = [
            [
                each.requests,
                f"{each.tokens:.2f}",
                1e3 * each.tpot_s,
                1e3 * each.plain_s,
                f"{each.gain:.2f}",
                f"{each.least_tokens:.2f}",
                "none" if each.least_rate is None else f"{each.least_rate:.2f}",
            ]
            for each in self.levels
        ]
        head = [
            "requests",
            "tokens/step",
            "TPOT ms",
            "plain ms",
            "gain",
            "even at tokens/step",
            "at a rate of",
        ]
        title = f"Speculation: {self.sentence} ({self.acceptance}; context {self.context:,})"
        return table(head, rows, title=title)


def break_even(deployment: Deployment, context: int) -> BreakEven | None:
    """When a deployment's speculation pays, at a context of so many KV tokens a request; None without any.

    Raises:
        InputError: the same without speculation cannot be made concrete.
    """
    found, config = deployment.speculating, deployment.config
    if found is None:
        return None
    plain = Deployment.of(deployment.scenario.changed(OFF))
    most = max(1, min(config.max_num_seqs, deployment.memory.kv_tokens // max(1, context)))

    def at(requests: int) -> Level:
        drafts, proposed, tokens = _drafted(deployment, requests)
        verified = round(requests * proposed)
        step = StepRow(
            (), requests, requests * context, requests + verified, verified, requests, draft_length=drafts
        )
        step_s = deployment.step_time.seconds(step)
        plain_s = plain.step_time.seconds(StepRow((), requests, requests * context, requests))
        least = step_s / plain_s
        reached = 1.0 < least <= 1 + found.config.num_tokens
        rate = rate_of(least, found.config.num_tokens) if reached else 0.0 if least <= 1.0 else None
        return Level(requests, proposed, tokens, step_s / tokens, plain_s, least, rate)

    levels = [1 << power for power in range(most.bit_length())]
    levels += [most] if levels[-1] != most else []
    pays = next((requests for requests in range(most, 0, -1) if at(requests).gain > 1.0), 0)
    law = found.law
    return BreakEven(
        method=found.config.method,
        num_tokens=found.config.num_tokens,
        acceptance=f"acceptance {law.origin}: {law.note}",
        context=context,
        levels=tuple(at(requests) for requests in levels),
        pays_up_to=pays,
        most=most,
    )


def _drafted(deployment: Deployment, requests: int) -> tuple[int, float, float]:
    """Of a step of so many requests: drafts at most, proposed on average, and tokens that a request gets."""
    assert deployment.speculating is not None
    config = deployment.speculating.config
    most = deployment.speculating.length(requests)
    shares = config.proposed or (0.0,) * config.num_tokens + (1.0,)
    lengths = [min(length, most) for length in range(len(shares))]
    accepted = [sum(config.acceptance[:length]) for length in lengths]
    looked_up = config.proposed and deployment.config.async_scheduling  # async verifies placeholders, too
    proposed = most if looked_up else sum(s * n for s, n in zip(shares, lengths, strict=True))
    tokens = 1.0 + sum(share * each for share, each in zip(shares, accepted, strict=True))
    return most, float(proposed), tokens


def draw_break_even(found: BreakEven, axes: Sequence[Axes]) -> None:
    """Time of a token, and the tokens of a step from which drafts pay, against requests in a step."""
    levels = [each.requests for each in found.levels]
    times, tokens = axes
    times.plot(
        levels, [1e3 * each.plain_s for each in found.levels], "o-", color=SECOND, label="without drafts"
    )
    times.plot(levels, [1e3 * each.tpot_s for each in found.levels], "o-", color=FIRST, label="with drafts")
    times.set(ylabel="TPOT, ms", ylim=(0, None), title="Time of a token")
    least = [each.least_tokens for each in found.levels]
    tokens.fill_between(
        levels, least, 1 + found.num_tokens, color=FIRST, alpha=0.12, lw=0, label="drafts pay"
    )
    tokens.plot(levels, least, "o-", color=BAD, label="breaks even")
    tokens.plot(levels, [each.tokens for each in found.levels], "--", color=INK, label="accepted here")
    title = "Tokens a request gets from a step"
    tokens.set(title=title, ylabel="tokens a step", ylim=(1.0, 1 + found.num_tokens))
    ticks = levels[:: 1 + len(levels) // 8]
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.minorticks_off()
        ax.set_xlabel("requests in a step")
        ax.legend(loc="best")
        if 0 < found.pays_up_to < found.most:
            mark(ax, found.pays_up_to, "even", MUTED, 0.98)
