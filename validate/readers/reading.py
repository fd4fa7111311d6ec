"""What a saved result says: a run like a simulated one, the load it was under, and the tool's own figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.metrics.metrics import summary
from servecast.sim.metrics.records import Run

RANKS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Context:
    """What the file says of the run; None is not said.

    request_rate: requests/s, inf where only the concurrency bounds it. burstiness: shape of the gamma law
    of the gaps between arrivals. ramp: the rates between which the rate rose, which then is None.
    """

    tool: str
    tool_version: str | None = None
    backend: str | None = None
    model: str | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None
    burstiness: float | None = None
    date: str | None = None
    ramp: tuple[float, float] | None = None

    @property
    def load(self) -> str:
        """The load in words: "4 requests/s", "concurrency 8"."""
        parts = []
        if self.request_rate is not None and math.isfinite(self.request_rate):
            parts.append(f"{self.request_rate:.4g} requests/s")
        if self.ramp is not None:
            parts.append("ramp {:.4g}->{:.4g}/s".format(*self.ramp))
        if self.max_concurrency is not None:
            parts.append(f"concurrency {self.max_concurrency}")
        if not parts:
            parts.append("all at once" if self.request_rate is not None else "load not stated")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Reading:
    """One run under one load, out of a result file.

    Attributes:
        source: file, and which of its runs where it has several.
        run: without requests where the file has only totals. Times are seconds from the start of the
            benchmark; ``arrival`` is NaN where the tool does not say when it meant to send, ``preemptions``
            and ``steps`` are never known to a client.
        reported: the tool's own figures, under the keys of vllm bench serve.
        planned: whether ``arrival`` is when the tool meant to send, and not when a request began to wait
            for its turn in the client.
        notes: what was put right, and what means something else than in vllm bench serve.
        halved: whether its ITL and TPOT were half of what they should be, and were put right.
    """

    source: str
    context: Context
    run: Run
    reported: Mapping[str, float]
    notes: tuple[str, ...] = ()
    planned: bool = False
    halved: bool = False

    @property
    def label(self) -> str:
        """Which run it is, in short: its load."""
        return self.context.load

    @property
    def has_requests(self) -> bool:
        """Whether the file says what happened to each request."""
        return len(self.run.requests) > 0

    def figures(self) -> dict[str, Any]:
        """The run's figures under the keys of vllm bench serve: computed from its requests, or those
        reported where there are none."""
        return summary(self.run, ranks=RANKS) if self.has_requests else dict(self.reported)


class Reader(Protocol):
    """Reads one format."""

    name: str

    def recognises(self, value: Any) -> bool:
        """Whether a JSON value (of a file, or of a line of JSONL) is of this format."""
        ...

    def read(self, values: Sequence[Any], path: Path) -> list[Reading]:
        """The runs in a file's values, all of which it recognises.

        Raises:
            InputError: something that the format promises is missing or contradicts itself.
        """
        ...


class Part(BaseModel):
    """A part of a result file: the fields that we read; others are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def at(*paths: str, default: Any = None) -> Any:
    """A field that lies deeper in a file: at the first of these paths ("load.args.rate", "engines.0.name")
    that leads anywhere. ``default``: where none does; ``...`` refuses the file."""
    choices = []
    for path in paths:
        first, *rest = path.split(".")
        choices.append(AliasPath(first, *(int(step) if step.isdigit() else step for step in rest)))
    return Field(default, validation_alias=AliasChoices(*choices))


Rate = Annotated[float, Field(gt=0, allow_inf_nan=True)]  # inf: no bound
Requests = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Slots = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]


class Statistics(Part):
    """What a tool says of a sample, each under whichever name it uses."""

    mean: float = Field(validation_alias=AliasChoices("mean", "avg"))
    std: float | None = Field(None, validation_alias=AliasChoices("std", "stddev", "std_dev"))
    min: float | None = None
    median: float | None = Field(None, validation_alias=AliasChoices("median", "p50"))
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p99_9: float | None = Field(None, validation_alias=AliasChoices("p99.9", "p99p9", "p999"))
    max: float | None = None

    def named(self, metric: str, *, to_ms: float = 1000.0) -> dict[str, float]:
        """Under vllm bench serve's keys for a latency."""
        said = ((name, getattr(self, name)) for name in Statistics.model_fields)
        return {
            f"{name.replace('_', '.')}_{metric}_ms": value * to_ms
            for name, value in said
            if value is not None
        }


P = TypeVar("P", bound=BaseModel)


def expect(model: type[P], value: Any, *, source: str, form: str) -> P:
    """The part of a file that was recognised as ``form``.

    Raises:
        InputError: a field is missing or not what the format has there.
    """
    try:
        return parse(model, value, source=source)
    except InputError as error:
        raise broken(error.what, form, where=error.where) from None


def broken(what: str, form: str, *, where: str) -> InputError:
    """The error about a file that begins like a format and does not keep to it."""
    return InputError(
        f"this is a result of {form}, but {what}",
        where=where,
        fix="Is the file cut off or edited? Save it again with the tool.",
    )


def sampled(figures: Mapping[str, float]) -> dict[str, float]:
    """Without the zeros that stand for the latency of no request, or the gap after a single token."""
    completed, tokens = figures.get("completed"), figures.get("total_output_tokens")
    if completed == 0:
        empty: tuple[str, ...] = ("_ms",)
    elif completed is not None and tokens is not None and tokens <= completed:
        empty = ("_tpot_ms", "_itl_ms")
    else:
        empty = ()
    return {key: value for key, value in figures.items() if value or not key.endswith(empty)}
