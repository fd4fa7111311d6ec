"""How many drafts are accepted: the law that a scenario gives, or what a server's own counters say, and by
how much requests differ.

A law is a probability for each position: that the first 1, 2, .. k drafts are all accepted (vLLM's
``synthetic_acceptance_rates``). 1 + their sum tokens come from a step on average.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from servecast.sim.engine.speculation import Kind, Kinds
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, InputFile, Model, invalid
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.scenario.acceptance_spread import of_beta, of_records, together

Share = Annotated[float, Field(ge=0, le=1)]
Origin = Literal["given", "measured", "assumed"]
ASSUMED_RATE, ASSUMED_BAND = 0.7, 0.25
"""Between the geometric laws that the shipped curves come to, 0.66 to 0.89 at 3 drafts of code, and what
prose makes of them; the tokens of a step at rates of 0.5 and 0.85 lie that far away."""
GOLDEN_BAND = 0.1  # assumed: other traffic than the code that the curve was measured with
_MEASURE = (
    "Measure it: acceptance.metrics takes a file with the server's /metrics or the JSON of vllm bench serve. "
    "Or give acceptance as a rate (0.7), a list by position, or {length: 2.5}; acceptance: assumed takes "
    f"{ASSUMED_RATE:g}, and widens the error band by {ASSUMED_BAND:.0%}."
)


@dataclass(frozen=True, slots=True)
class Law:
    """Of k drafts: that the first 1 to k are all accepted; that 0 to k are proposed, () always k; kinds of
    requests, None where all are alike. Where it comes from, in words too, and by how much it widens the error
    band."""

    rates: tuple[float, ...]
    proposed: tuple[float, ...] = ()
    origin: Origin = "given"
    note: str = "in the scenario"
    band: float = 0.0
    kinds: Kinds | None = None

    @property
    def mean(self) -> Kind:
        """Of all requests together."""
        return self.rates, self.proposed

    @property
    def length(self) -> float:
        """Tokens of a step on average, if k drafts are proposed."""
        return 1.0 + sum(self.rates)


class Acceptance(Model):
    """How many drafts are accepted: one of the first seven. A number stands for ``rate``, a list for
    ``rates``, and ``assumed`` for a guess with a wide error band."""

    rate: Share | None = None
    """Of each draft, those before it accepted: a geometric law."""
    requests: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    """Rates of single requests: each request has one of them, all equally often."""
    rates: tuple[Share, ...] | None = None
    """That the first 1, 2, .. drafts are all accepted."""
    length: Annotated[float, Field(ge=1)] | None = None
    """Mean tokens of a step, with the least variance: vLLM's synthetic law."""
    accepted: tuple[Share, ...] | None = None
    """Shares of steps in which 0, 1, .. drafts are accepted."""
    golden: str | None = None
    """A curve that InferenceX measured, as ``minimax-m3-eagle3/thinking_on``."""
    metrics: InputFile | None = None
    """What a server counted: its /metrics as text, or the JSON of ``vllm bench serve``, which tells requests
    apart if it was saved with ``--save-detailed``."""
    assumed: bool = False
    """Take a rate that nothing here supports."""
    spread: Annotated[float, Field(gt=0, lt=1)] | None = None
    """By how much the requests' own rates differ around ``rate``: the standard deviation of a beta
    distribution."""
    proposed: tuple[Share, ...] | Share | None = None
    """Of drafts that are looked up (ngram, suffix): the share of steps in which all k are proposed, and none
    in the others, or the shares of 0, 1, .. k."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if data == "assumed":
            return {"assumed": True}
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"rate": data}
        return {"rates": data} if isinstance(data, list | tuple) else data

    @model_validator(mode="after")
    def _one(self) -> Acceptance:
        laws = ("rate", "requests", "rates", "length", "accepted", "golden", "metrics")
        given = [name for name in laws if getattr(self, name) is not None] + ["assumed"] * self.assumed
        if len(given) != 1:
            said = " and ".join(given) or "nothing"
            raise invalid(f"acceptance is told by {said}", f"Give one of {', '.join(laws)}.")
        if self.spread is not None and (self.rate is None or self.spread**2 >= self.rate * (1.0 - self.rate)):
            fix = "Give rate, and less than sqrt(rate x (1 - rate)), which is all or nothing."
            raise invalid(f"a spread of {self.spread:g} around {self.rate}", fix, at="spread")
        if self.rates is not None and list(self.rates) != sorted(self.rates, reverse=True):
            fix = "Give the probability that all drafts up to a position are accepted, which cannot rise."
            raise invalid(f"rates {list(self.rates)} rise", fix, at="rates")
        if self.accepted is not None and abs(sum(self.accepted) - 1.0) > 1e-6:
            fix = "Give the shares of steps with 0, 1, .. accepted drafts."
            raise invalid(f"accepted comes to {sum(self.accepted):g}, not 1", fix, at="accepted")
        return self

    def law(self, drafts: int, folder: Path, where: str) -> Law:
        """For so many drafts a step; golden curves lie in ``folder``.

        Raises:
            InputError: it says nothing about so many, or a file is not what it should be.
        """
        law = self._law(drafts, folder, where)
        if self.proposed is None:
            return law
        shares = self.proposed if isinstance(self.proposed, tuple) else ()
        if not shares:
            shares = (1.0 - float(self.proposed), *[0.0] * (drafts - 1), float(self.proposed))  # type: ignore[arg-type]
        if len(shares) != drafts + 1 or abs(sum(shares) - 1.0) > 1e-6:
            fix = f"Give {drafts + 1} shares, of 0 to {drafts} drafts, with the sum 1."
            raise InputError(f"proposed {list(shares)}", where=f"{where}.proposed", fix=fix)
        if law.kinds is None:
            return replace(law, proposed=shares)
        kinds = replace(law.kinds, laws=tuple((rates, shares) for rates, _ in law.kinds.laws))
        return replace(law, rates=together(kinds.laws), proposed=shares, kinds=kinds)

    def _law(self, drafts: int, folder: Path, where: str) -> Law:
        if self.metrics is not None:
            return _counted(self.metrics, drafts)
        if self.golden is not None:
            return _golden(self.golden, drafts, folder, f"{where}.golden")
        if self.length is not None:
            if self.length > drafts + 1:
                fix = f"Give 1 to {drafts + 1}."
                raise InputError(
                    f"{self.length:g} tokens of {drafts} drafts", where=f"{where}.length", fix=fix
                )
            return Law(least_variance(self.length, drafts))
        if self.requests is not None or (self.rate is not None and self.spread is not None):
            each = self.requests or of_beta(self.rate, self.spread)  # type: ignore[arg-type]
            kinds = Kinds(tuple((geometric(rate, drafts), ()) for rate in each))
            return Law(together(kinds.laws), note="in the scenario, by request", kinds=kinds)
        if self.rate is not None:
            return Law(geometric(self.rate, drafts))
        if self.assumed:
            note = f"acceptance assumed at {ASSUMED_RATE:g} a draft: nothing here was measured"
            return Law(geometric(ASSUMED_RATE, drafts), (), "assumed", note, ASSUMED_BAND)
        rates = self.rates
        if self.accepted is not None:
            rates = tuple(min(1.0, sum(self.accepted[at:])) for at in range(1, len(self.accepted)))
        assert rates is not None
        if len(rates) < drafts:
            fix = f"Give {drafts} of them, or a rate."
            raise InputError(f"{len(rates)} positions of {drafts} drafts", where=where, fix=fix)
        return Law(rates[:drafts])


def missing(method: str) -> InputError:
    """That nothing says how many drafts are accepted."""
    extra = (
        " Drafts that are looked up need acceptance.proposed, too." if method in ("ngram", "suffix") else ""
    )
    return InputError(
        f"nothing says how many of the drafts of {method} are accepted",
        where="acceptance",
        fix=_MEASURE + extra,
    )


def geometric(rate: float, drafts: int) -> tuple[float, ...]:
    """Each draft is accepted with that probability, if those before it are."""
    return tuple(rate**position for position in range(1, drafts + 1))


def least_variance(length: float, drafts: int) -> tuple[float, ...]:
    """A mean of tokens a step, as vLLM turns it into rates (_acceptance_length_to_rates)."""
    whole = int(length - 1.0)
    return tuple([1.0] * whole + [length - 1.0 - whole] + [0.0] * (drafts - whole - 1))[:drafts]


def rate_of(length: float, drafts: int) -> float:
    """The geometric rate whose steps come to so many tokens on average; 1 where that cannot be reached."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if 1.0 + sum(geometric(middle, drafts)) < length else (low, middle)
    return high


def falling(rates: list[float]) -> tuple[float, ...]:
    """The nearest rates that do not rise, with the same sum (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for rate in rates:
        total, count = rate, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            before, several = pools.pop()
            total, count = total + before, count + several
        pools.append((total, count))
    return tuple(min(1.0, max(0.0, total / count)) for total, count in pools for _ in range(count))


def golden_curves(folder: Path) -> list[str]:
    """The names that ``golden`` may have."""
    files = sorted(folder.glob("*.yaml"))
    return [f"{file.stem}/{mode}" for file in files for mode in read_yaml(file) if mode != "method"]


def _golden(name: str, drafts: int, folder: Path, where: str) -> Law:
    file, _, mode = name.partition("/")
    if name not in golden_curves(folder):
        known = ", ".join(golden_curves(folder))
        raise InputError(f"there is no golden curve {name!r}", where=where, fix=f"Known: {known}.")
    curve: dict[int, float] = read_yaml(folder / f"{file}.yaml")[mode]
    if drafts not in curve:
        fix = f"Use {', '.join(map(str, curve))} drafts, or a rate."
        raise InputError(f"{name} was not measured with {drafts} drafts", where=where, fix=fix)
    note = f"acceptance of {name}, which InferenceX measured on code: {curve[drafts]:g} tokens a step"
    lengths = [1.0, *(curve.get(at, 0.0) for at in range(1, drafts + 1))]
    if 0.0 in lengths:
        rates = geometric(rate_of(curve[drafts], drafts), drafts)
    else:
        rates = falling([after - before for before, after in itertools.pairwise(lengths)])
    return Law(rates, (), "measured", note, GOLDEN_BAND)


class Counts(Model):
    """What a server counted: see ``vllm:spec_decode_*``.

    drafts: steps of a request with drafts. draft_tokens, accepted: summed. by_position: accepted at each.
    tokens: generated in all; None where not known. requests: that got a first token. lengths, chunks: tokens
    of each request, and the steps that brought them but for the first; empty where not told.
    """

    drafts: Amount
    draft_tokens: Amount
    accepted: Amount
    by_position: tuple[Amount, ...]
    tokens: Amount | None = None
    requests: Amount = 0
    lengths: tuple[Amount, ...] = ()
    chunks: tuple[Amount, ...] = ()

    @property
    def steps(self) -> int | None:
        """Steps in which requests decoded: each came to a token more than it accepted, and a request's first
        token to none."""
        return None if self.tokens is None else max(self.drafts, self.tokens - self.accepted - self.requests)

    def law(self, drafts: int, note: str) -> Law:
        """Per position among the drafts that were as long, and the lengths that were proposed: none, and the
        two whole numbers around the mean."""
        mean = self.draft_tokens / self.drafts
        whole = min(int(mean), drafts - 1) if mean < drafts else drafts
        longer = mean - whole if whole < drafts else 0.0
        any_ = self.drafts / self.steps if self.steps else 1.0
        shares = [1.0 - any_] + [0.0] * drafts
        shares[whole] += any_ * (1.0 - longer)
        if longer:
            shares[whole + 1] += any_ * longer
        there = [sum(shares[at:]) / any_ for at in range(1, drafts + 1)]
        each = [*self.by_position, *[0] * drafts][:drafts]
        rates = [
            count / (self.drafts * share) if share else 0.0 for count, share in zip(each, there, strict=True)
        ]
        always = abs(mean - drafts) < 1e-9 and any_ > 1.0 - 1e-9
        law = falling(rates), () if always else tuple(shares)
        kinds = of_records(law, self.lengths, self.chunks) if self.chunks else None
        if kinds:
            note += f", by {len(self.chunks):,} requests of their own"
        return Law(*law, "measured", note, kinds=kinds)


def read_counts(file: Path) -> Counts:
    """From a server's /metrics, or the JSON of ``vllm bench serve``.

    Raises:
        InputError: it is neither, or counts no drafts.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = (
            counts_of_result(json.loads(text)) if text.lstrip().startswith("{") else counts_of_metrics(text)
        )
    except ValueError as error:
        fix = "Give the text of /metrics, or the JSON of vllm bench serve."
        raise InputError(f"cannot read it ({error})", where=str(file), fix=fix) from None
    if found is None or not found.drafts:
        fix = "Give counters of a server that speculates, after some traffic."
        raise InputError("it counts no drafts (vllm:spec_decode_num_drafts_total)", where=str(file), fix=fix)
    return found


def _counted(file: Path, drafts: int) -> Law:
    counts = read_counts(file)
    note = f"acceptance from {file.name}: {counts.accepted:,} of {counts.draft_tokens:,} drafts"
    positions = sum(1 for count in counts.by_position if count)
    if not counts.by_position:
        length = 1.0 + counts.accepted / counts.drafts
        return Law(geometric(rate_of(length, drafts), drafts), (), "measured", note, 0.05)
    if positions < drafts and len(counts.by_position) < drafts:
        fix = f"Measure with {drafts} drafts, or set num_speculative_tokens to {len(counts.by_position)}."
        what = f"it counts {len(counts.by_position)} positions, the engine drafts {drafts}"
        raise InputError(what, where=str(file), fix=fix)
    return counts.law(drafts, note)


def counts_of_metrics(text: str) -> Counts | None:
    """From Prometheus text, all engines together; None where it counts no drafts."""
    sums: dict[str, float] = {}
    positions: dict[int, float] = {}
    for name, labels, value in re.findall(r"^vllm:(\w+?)(?:_total)?(\{[^}]*\})?\s+([0-9.eE+-]+)", text, re.M):
        if name == "spec_decode_num_accepted_tokens_per_pos":
            at = re.search(r'position="(\d+)"', labels)
            if at:
                positions[int(at[1])] = positions.get(int(at[1]), 0.0) + float(value)
        else:
            sums[name] = sums.get(name, 0.0) + float(value)
    if "spec_decode_num_drafts" not in sums:
        return None
    tokens = sums.get("generation_tokens")
    return Counts(
        drafts=round(sums["spec_decode_num_drafts"]),
        draft_tokens=round(sums.get("spec_decode_num_draft_tokens", 0.0)),
        accepted=round(sums.get("spec_decode_num_accepted_tokens", 0.0)),
        by_position=tuple(round(positions[at]) for at in sorted(positions)),
        tokens=None if tokens is None else round(tokens),
        requests=round(sums.get("time_to_first_token_seconds_count", 0.0)),
    )


def counts_of_result(result: dict[str, Any]) -> Counts | None:
    """From the JSON of ``vllm bench serve``; None where it counts no drafts."""
    drafts = result.get("spec_decode_num_drafts")
    if drafts is None:
        return None
    rates = result.get("spec_decode_per_position_acceptance_rates") or []
    details = zip(*(result.get(name) or () for name in ("output_lens", "itls")), strict=False)
    served = [(tokens, len(gaps)) for tokens, gaps in details if tokens > 1 and gaps]
    return Counts(
        drafts=drafts,
        draft_tokens=result["spec_decode_draft_tokens"],
        accepted=result["spec_decode_accepted_tokens"],
        by_position=tuple(round(rate * drafts) for rate in rates),
        tokens=result.get("total_output_tokens"),
        requests=result.get("completed", 0),
        lengths=tuple(tokens for tokens, _ in served),
        chunks=tuple(chunks for _, chunks in served),
    )
