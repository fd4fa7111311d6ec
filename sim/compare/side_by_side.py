"""Results side by side: their metrics, and what differs between the runs that may explain the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.yaml_file import parse_yaml
from servecast.sim.metrics.confidence import Interval, t_interval
from servecast.sim.report.text import cell_text, table
from servecast.sim.run.results import measured

Document = Mapping[str, Any]

_SHOWN = (
    *("request_throughput", "output_throughput", "goodput_share", "median_ttft_ms", "p95_ttft_ms"),
    *("p99_ttft_ms", "median_tpot_ms", "p95_tpot_ms", "p99_tpot_ms", "p95_itl_ms", "median_e2el_ms"),
    *("p95_e2el_ms", "kv_cache_usage_peak", "max_num_waiting", "num_preemptions"),
    "prefix_cache_hit_rate",
)
_LOAD = ("request_rate", "burstiness", "max_concurrency", "num_prompts")
_TOP = ("backend", "servecast_version", "scenario", "profile", "seed", "engine_version", "model_id", "gpu")


@dataclass(frozen=True, slots=True)
class Side:
    """One thing to compare: its label, and its results, one a seed (or the one there is)."""

    label: str
    results: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A metric on every side: means over the seeds, None where not known.

    ratios: to the first side. differences: mean over seeds of this side less the first, which saw the same
    seed, with its interval; None where the sides are not paired.
    """

    stage: str | None
    metric: str
    values: tuple[float | None, ...]
    ratios: tuple[float | None, ...]
    differences: tuple[Interval | None, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of the run contexts that is not the same on every side, and what it may explain."""

    field: str
    values: tuple[Any, ...]
    may_explain: str


@dataclass(frozen=True, slots=True)
class SideBySide:
    """unstated: fields that at least one side gives and at least one does not."""

    labels: tuple[str, ...]
    seeds: int
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    unstated: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_text(self, *, all_metrics: bool = False) -> str:
        """The metrics, a table a stage; what differs between the runs; and what not all sides state."""
        stages = dict.fromkeys(row.stage for row in self.rows)
        parts = [
            table(*self.stage_rows(stage, all_metrics=all_metrics), title=f"\n{stage}" if stage else "")
            for stage in stages
        ]
        if self.differences:
            facts = [
                [each.field, *(cell_text(value) for value in each.values), each.may_explain]
                for each in self.differences
            ]
            header = ["differs", *self.labels, "may explain"]
            parts.append(table(header, facts, title="\nWhat differs between the runs"))
        if self.unstated:
            parts.append(f"\nnot stated on every side: {', '.join(self.unstated)}")
        return "\n".join(parts)

    def shown(self, *, all_metrics: bool = False) -> list[Row]:
        """The main metrics, or all of them."""
        return [row for row in self.rows if all_metrics or row.metric in _SHOWN]

    def stage_rows(self, stage: str | None, *, all_metrics: bool) -> tuple[list[str], list[list[object]]]:
        """Header and rows of a stage's table."""
        first, *others = self.labels
        header = ["metric", first]
        for label in others:
            header += [label, "ratio"] if self.seeds == 1 else [label, "ratio", "difference (95%)"]
        rows: list[list[object]] = []
        for row in self.shown(all_metrics=all_metrics):
            if row.stage != stage:
                continue
            cells: list[object] = [row.metric, row.values[0]]
            for value, ratio, gap in zip(row.values[1:], row.ratios[1:], row.differences[1:], strict=True):
                cells += [value, ratio]
                if self.seeds > 1:
                    cells.append(None if gap is None else f"{gap.low:+.3g}..{gap.high:+.3g}")
            rows.append(cells)
        return header, rows


def side_by_side(sides: Sequence[Side], *, stage: str | None = None) -> SideBySide:
    """Put results side by side.

    Stages of the same name are compared; results without stages as a whole.

    Args:
        stage: of the results that have stages, this one alone.

    Raises:
        InputError: some results have stages and others have not, or none in common, and none is chosen.
    """
    parts = [[_parts(side, each, stage) for each in side.results] for side in sides]
    names = [name for name in parts[0][0] if all(name in of_side[0] for of_side in parts)]
    if not names:
        none = "no stages"
        have = "; ".join(
            f"{side.label}: {none if None in of[0] else ', '.join(map(str, of[0]))}"
            for side, of in zip(sides, parts, strict=True)
        )
        fix = "Choose one stage of the results that have several."
        raise InputError(f"there is no stage that all have ({have})", where="--stage", fix=fix)
    paired = len({len(side.results) for side in sides}) == 1 and len(sides[0].results) > 1
    rows = []
    for name in names:
        metrics = [[measured(seed[name]) for seed in of_side] for of_side in parts]
        for metric in metrics[0][0]:
            if sum(metric in of_side[0] for of_side in metrics) > 1:
                samples = [[seed.get(metric) for seed in of_side] for of_side in metrics]
                rows.append(_row(name, metric, samples, paired))
    differences, unstated = _context_differences([side.results[0] for side in sides])
    labels = tuple(side.label for side in sides)
    return SideBySide(labels, len(sides[0].results), tuple(rows), differences, unstated)


def _parts(side: Side, document: Document, stage: str | None) -> dict[str | None, Document]:
    stages = {each["stage"]: each for each in document.get("stages") or ()}
    if stage is None or not stages:
        return stages or {None: document}
    if stage not in stages:
        what = f"{side.label} has no stage {stage!r}"
        raise InputError(what, where="--stage", fix=f"It has {', '.join(stages)}.")
    return {None: stages[stage]}


def _row(stage: str | None, metric: str, samples: Sequence[Sequence[float | None]], paired: bool) -> Row:
    values = [_mean(of_side) for of_side in samples]
    first = values[0]
    ratios = [value / first if value is not None and first else None for value in values]
    differences: list[Interval | None] = [None]
    for of_side in samples[1:]:
        pairs = [
            ours - base
            for ours, base in zip(of_side, samples[0], strict=False)
            if ours is not None and base is not None
        ]
        differences.append(t_interval(pairs) if paired and len(pairs) > 1 else None)
    return Row(stage, metric, tuple(values), tuple(ratios), tuple(differences))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _context_differences(
    documents: Sequence[Document],
) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    facts = [_facts(document) for document in documents]
    for field in dict.fromkeys(field for document in documents for field in document.get("what_if") or ()):
        if field.partition(".")[0] in ("workload", "sweep", "plan"):  # the others show in what was run
            for fact, document in zip(facts, documents, strict=True):
                if "what_if" in document:
                    fact[field] = document["what_if"].get(field, "as in the scenario")
    fields, explains = list(dict.fromkeys(field for each in facts for field in each)), _explains()
    differences, unstated = [], []
    for field in fields:
        values = tuple(each.get(field) for each in facts)
        stated = [value for value in values if value is not None]
        if any(value != stated[0] for value in stated):
            differences.append(Difference(field, values, explains.get(field.rpartition(".")[2], "")))
        elif len(stated) < len(values) and not all(field in each for each in facts):
            unstated.append(field)
    return tuple(differences), tuple(unstated)


def _explains() -> Mapping[str, str]:
    text = resources.files("servecast.sim.compare").joinpath("explains.yaml").read_text("utf-8")
    return parse_yaml(text, source="explains.yaml")


def _facts(document: Document) -> dict[str, Any]:
    """What was run, by flat names. None is vLLM's default, or not stated."""
    facts = {name: document[name] for name in (*_TOP, *_LOAD) if name in document}
    for kind in ("engine", "fleet", "run_context"):
        facts |= {f"{kind}.{name}": value for name, value in (document.get(kind) or {}).items()}
    if "provenance" in document:
        facts["basis"] = document["provenance"]["basis"]
    done = document["completed"]
    if done:
        facts["mean_input_tokens"] = round(document["total_input_tokens"] / done, 1)
        facts["mean_output_tokens"] = round(document["total_output_tokens"] / done, 1)
    return facts
