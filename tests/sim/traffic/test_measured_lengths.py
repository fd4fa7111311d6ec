"""Lengths from quantiles, histograms, Prometheus buckets and tables, and prompts that go with outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.traffic.draw import draw
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.lengths import Lengths
from servecast.sim.traffic.spec import StreamSpec

EXPOSITION = """\
# TYPE vllm:request_prompt_tokens histogram
vllm:request_prompt_tokens_bucket{le="100.0",model_name="m"} 10
vllm:request_prompt_tokens_bucket{le="200.0",model_name="m"} 40
vllm:request_prompt_tokens_bucket{le="500.0",model_name="m"} 100
vllm:request_prompt_tokens_bucket{le="+Inf",model_name="m"} 100
vllm:request_prompt_tokens_sum{model_name="m"} 21000
vllm:request_prompt_tokens_count{model_name="m"} 100
"""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def law(data: Any) -> Any:
    return TypeAdapter(Lengths).validate_python(data)


def stream(**fields: Any) -> dict[str, Any]:
    arrivals = {"kind": "poisson", "request_rate": 1.0}
    return {"arrivals": arrivals, "num_requests": 4000, "output_tokens": 1, "prompt_tokens": 1, **fields}


def refused(**fields: Any) -> str:
    with pytest.raises(InputError) as error:
        draw(expand(parse(StreamSpec, stream(**fields), source="s"), None), 0)
    return str(error.value)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "metrics.txt"
    path.write_text(text, "utf-8")
    return str(path)


def test_two_quantiles_are_met_by_a_lognormal() -> None:
    drawn = law({"p50": 800, "p95": 4000}).draw(200_000, rng())
    assert np.percentile(drawn, [50, 95]) == pytest.approx([800, 4000], rel=0.02)
    sigma = math.log(4000 / 800) / stats.norm.ppf(0.95)  # of the only lognormal law that has both
    assert np.percentile(drawn, [10, 99.9]) == pytest.approx(
        [800 * math.exp(sigma * stats.norm.ppf(q)) for q in (0.1, 0.999)], rel=0.05
    )


def test_more_quantiles_are_all_met() -> None:
    drawn = law({"p50": 800, "p90": 900, "p99": 9000, "p10": 100, "max_tokens": 10_000}).draw(200_000, rng())
    assert np.percentile(drawn, [10, 50, 90, 99]) == pytest.approx([100, 800, 900, 9000], rel=0.03)
    assert drawn.max() == 10_000


def test_bins_are_filled_evenly_up_to_their_edges() -> None:
    drawn = law({"edges": [0, 2, 10], "counts": [1, 3]}).draw(80_000, rng())
    shares = np.bincount(drawn, minlength=11) / len(drawn)
    assert shares[1:3] == pytest.approx([0.125] * 2, abs=0.01)  # a quarter over 1 and 2
    assert shares[3:] == pytest.approx([0.75 / 8] * 8, abs=0.01)


@pytest.mark.parametrize("mean", [170, 230, 330])
def test_a_known_mean_places_lengths_inside_their_bins(mean: float) -> None:
    histogram = {"edges": [0, 100, 200, 500], "counts": [10, 30, 60], "mean": mean}
    drawn = law(histogram).draw(200_000, rng())
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert [np.mean(drawn <= edge) for edge in (100, 200, 500)] == pytest.approx([0.1, 0.4, 1], abs=0.01)


def test_prometheus_buckets_of_a_scrape_are_not_cumulated_twice_and_meet_their_sum(tmp_path: Path) -> None:
    path = written(tmp_path, EXPOSITION)
    drawn = law({"path": path, "metric": "vllm:request_prompt_tokens"}).draw(200_000, rng())
    assert [np.mean(drawn <= edge) for edge in (100, 200, 500)] == pytest.approx([0.1, 0.4, 1], abs=0.01)
    assert drawn.mean() == pytest.approx(210, rel=0.01)  # sum / count


@pytest.mark.parametrize("ranged", [False, True])
def test_a_query_result_counts_increases(tmp_path: Path, ranged: bool) -> None:
    series = [("100", 10), ("200", 40), ("500", 100), ("+Inf", 100)]
    result = [
        {
            "metric": {"le": le},
            **({"values": [[0, "7"], [1, str(7 + n)]]} if ranged else {"value": [1, str(n)]}),
        }
        for le, n in series
    ]
    kind = "matrix" if ranged else "vector"
    document = {"status": "success", "data": {"resultType": kind, "result": result}}
    drawn = law({"kind": "histogram", "path": written(tmp_path, json.dumps(document))}).draw(100_000, rng())
    assert [np.mean(drawn <= edge) for edge in (100, 200, 500)] == pytest.approx([0.1, 0.4, 1], abs=0.01)
    assert drawn.mean() == pytest.approx(0.1 * 50 + 0.3 * 150 + 0.6 * 350 + 0.5, rel=0.01)


def test_lengths_above_the_last_bound_reach_to_max_tokens(tmp_path: Path) -> None:
    text = EXPOSITION.replace('le="+Inf",model_name="m"} 100', 'le="+Inf",model_name="m"} 125')
    text = text.replace('sum{model_name="m"} 21000', 'sum{model_name="m"} 40000').replace(
        '_count{model_name="m"} 100', '_count{model_name="m"} 125'
    )
    lengths = {"path": written(tmp_path, text), "metric": "vllm:request_prompt_tokens", "max_tokens": 900}
    drawn = law(lengths).draw(100_000, rng())
    assert np.mean(drawn > 500) == pytest.approx(0.2, abs=0.01)
    assert drawn.max() <= 900
    del lengths["max_tokens"]
    assert "25 of 125 lengths lie above the last bound, 500" in refused(prompt_tokens=lengths)


@pytest.mark.parametrize("rank", [-0.6, 0.5, 0.9])
def test_a_rank_correlation_leaves_both_laws_as_they_are(rank: float) -> None:
    laws = {"prompt_tokens": {"p50": 800, "p95": 4000}, "output_tokens": {"p50": 100, "p99": 900}}
    found = []
    for correlation in (None, rank):
        load = expand(parse(StreamSpec, stream(**laws, length_correlation=correlation), source="s"), None)
        requests = draw(load, 1)[0].streams[0].requests
        found.append(np.array([(each.prompt_tokens, each.output_tokens) for each in requests]))
    assert stats.spearmanr(*found[1].T).statistic == pytest.approx(rank, abs=0.03)
    assert stats.spearmanr(*found[0].T).statistic == pytest.approx(0, abs=0.05)
    assert (found[0][:, 0] == found[1][:, 0]).all()
    assert (np.sort(found[0][:, 1]) == np.sort(found[1][:, 1])).all()


def test_columns_of_one_file_are_drawn_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("prompt,answer\n10,1\n20,2\n30,3\n", "utf-8")
    columns = {name: {"path": str(path), "column": column} for name, column in
               (("prompt_tokens", "prompt"), ("output_tokens", "answer"))}  # fmt: skip
    load = expand(parse(StreamSpec, stream(**columns, length_correlation="rows"), source="s"), None)
    pairs = {(each.prompt_tokens, each.output_tokens) for each in draw(load, 0)[0].streams[0].requests}
    assert pairs == {(10, 1), (20, 2), (30, 3)}


@pytest.mark.parametrize(
    ("lengths", "what"),
    [
        ({"p50": 800, "p95": 400}, "prompt_tokens.p95: p95 400 is below p50 800"),
        ({"p50": 800}, "one quantile says nothing of the spread"),
        ({"p0": 1, "p50": 800}, "'p0' is no quantile between p0 and p100"),
        ({"p50": 1, "p100": 8}, "'p100' is no quantile"),
        ({"p50": 1, "p50.0": 8}, "p50 and p50.0 are one quantile"),
        ({"p50": 0.2, "p95": 8}, "p50 should be"),
        ({"p50": 2, "p95": 8, "max_token": 9}, "unknown field 'max_token'"),
        ({"p50": 2, "p95": 8, "max_tokens": 9, "min_tokens": 10}, "max_tokens 9 is below min_tokens 10"),
        ({"edges": [0, 10], "counts": [1, 2]}, "2 edges and 2 counts"),
        ({"edges": [0, 10, 10], "counts": [1, 2]}, "edges.2: the edges do not rise"),
        ({"edges": [0, 10], "counts": [0]}, "all counts are 0"),
        ({"edges": [0, 10], "counts": [1], "mean": 12}, "a mean of 12 does not fit bins"),
        ({"edges": [0, 10]}, "a histogram needs one source"),
        ({"edges": [0, 10], "counts": [1], "metric": "m"}, "metric or labels without a file"),
    ],
)
def test_what_cannot_be_lengths_is_refused(lengths: Any, what: str) -> None:
    assert what in refused(prompt_tokens=lengths)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('le="200.0",model_name="m"} 40', 'le="200.0",model_name="m"} 4', "4 at le=200 after 10 at le=100"),
        ('"} 100\n', '"} NaN\n', "a sample of vllm:request_prompt_tokens is nan"),
        ('le="200.0",model_name="m"', 'le="200.0",model_name="other"', "series of 2 models: m, other"),
        ('le="200.0"', 'lt="200.0"', "a series without the bound of its bucket (le)"),
        ("vllm:request_prompt", "vllm:other", "no buckets of vllm:request_prompt_tokens"),
        ('sum{model_name="m"} 21000', 'sum{model_name="m"} 99000', "a mean of 990 does not fit bins"),
        ("# TYPE", '{"data": ', "cannot be read"),
    ],
)
def test_what_is_no_histogram_is_refused(tmp_path: Path, old: str, new: str, what: str) -> None:
    path = written(tmp_path, EXPOSITION.replace(old, new))
    assert what in refused(prompt_tokens={"path": path, "metric": "vllm:request_prompt_tokens"})


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"length_correlation": 0.5}, "a fixed length goes with nothing"),
        ({"length_correlation": 1.5}, "length_correlation"),
        ({"length_correlation": "rows"}, "do not stand in the same rows"),
        (
            {
                "length_correlation": "rows",
                "prompt_tokens": {"kind": "empirical", "values": [1, 2]},
                "output_tokens": {"kind": "empirical", "values": [1, 2, 3]},
            },
            "do not stand in the same rows",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(fields: dict[str, Any], what: str) -> None:
    assert what in refused(**fields)
