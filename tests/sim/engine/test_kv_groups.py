"""Groups and pools: the examples of vLLM's own functions, and those functions beside ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cache_models import GIB, MODELS, CacheModel

from servecast.sim.engine.kv_groups import (
    CacheOptions,
    KVGroup,
    block_bytes,
    blocks_per_sequence,
    default_block_size,
    groups_of,
    in_flight_tokens,
    specs,
)
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.vllm_process import ENVIRONMENT

NAMED = {model.name: model for model in MODELS}
RELEASES = ("0.23", "0.32", "0.33")


def options(model: CacheModel, release: str) -> CacheOptions:
    return CacheOptions(
        release=release,
        ranks=model.ranks,
        context_ranks=model.context_ranks,
        kv_bytes=model.kv_bytes,
        block_size=model.block_size,
        max_model_len=model.max_model_len,
        mamba_mode=model.mode,  # type: ignore[arg-type]
        recurrent_bytes=model.recurrent_bytes,
        drafts=model.drafts,
    )


def groups(model: CacheModel, release: str = "0.32") -> tuple[KVGroup, ...]:
    return groups_of(specs(model.layers, options(model, release)), release, hybrid=model.hybrid)


def pool(model: CacheModel, release: str, available: int) -> dict[str, Any]:
    """What vLLM's log says of a pool of these bytes."""
    found = groups(model, release)
    in_flight = in_flight_tokens(release, model.budget, async_scheduling=model.asynchronous)
    needed = blocks_per_sequence(found, model.max_model_len, in_flight)
    blocks = available // block_bytes(found)
    null = 1 if release >= "0.32" else 0
    if (needed + null) * block_bytes(found) > available:
        return {"refused": needed}
    concurrency = blocks / needed
    return {
        "groups": [[group.layers, group.spec.block_size // model.context_ranks] for group in found],
        "blocks": blocks,
        "tokens": int(concurrency * model.max_model_len),
        "concurrency": concurrency,
    }


def test_layers_of_a_kind_are_spread_over_groups() -> None:
    """Gemma 3: every sixth layer is full, so groups have ten layers at most (grouping by pattern)."""
    sizes = [(group.layers, group.spec.kind) for group in groups(NAMED["gemma-3-27b"])]
    assert sizes == [(n, "sliding") for n in (9, 9, 9, 9, 8, 8)] + [(10, "full")]


def test_a_group_a_little_larger_sets_the_size() -> None:
    """13 layers beside 12 are less than half as many more: one group each, padded."""
    assert [group.layers for group in groups(NAMED["gpt-oss-20b and a drafter"])] == [12, 13]


@pytest.mark.parametrize(
    ("name", "release", "gib", "tokens", "concurrency"),
    [
        # vLLM's functions on the same specs: with a budget of 8,192, async
        ("gemma-3-27b", "0.32", 15, 46_918, 1.43),
        ("gemma-3-27b", "0.23", 15, 73_076, 2.23),
        ("gpt-oss-20b", "0.32", 55, 2_133_894, 16.28),
        ("gpt-oss-20b", "0.23", 55, 2_259_288, 17.24),
        ("gpt-oss-20b and a drafter", "0.32", 55, 1_969_745, 15.03),
        ("qwen3-next-80b TP4", "0.32", 20, 1_736_366, 6.62),
        ("qwen3-next-80b, no caching", "0.32", 20, 1_741_753, 6.64),
        ("deepseek-v3 fp8 TP8", "0.32", 8, 244_416, 1.86),
        ("deepseek-v3.2", "0.32", 8, 178_688, 1.36),
        ("llama-4-scout TP8", "0.32", 40, 1_747_616, 13.33),
        ("llama-4-scout by kind", "0.23", 40, 5_083_997, 38.79),
        ("mistral-7b-v0.1", "0.32", 50, 654_848, 19.98),
    ],
)
def test_logged_sizes(name: str, release: str, gib: float, tokens: int, concurrency: float) -> None:
    found = pool(NAMED[name], release, int(gib * GIB))
    assert (found["tokens"], round(found["concurrency"], 2)) == (tokens, concurrency)


def test_a_pool_too_small_for_one_sequence() -> None:
    """Gemma 3 with all layers managed as full ones needs 15.5 GiB for 32,768 tokens, and a null block."""
    assert "refused" in pool(NAMED["gemma-3-27b as full"], "0.32", 15 * GIB)


def test_older_releases_refuse_pages_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="one size"):
        groups(NAMED["windows whose pages do not divide"], "0.23")


def test_states_cannot_be_managed_as_attention() -> None:
    model = NAMED["qwen3-next-80b TP4"]
    with pytest.raises(InputError, match="cannot be managed as one kind"):
        groups_of(specs(model.layers, options(model, "0.32")), "0.32", hybrid=False)


@pytest.mark.vllm
@pytest.mark.parametrize("release", RELEASES)
def test_pools_are_vllms(release: str) -> None:
    """Groups, blocks, tokens and concurrency of every model in three sizes of memory, or the refusal."""
    models = [model for model in MODELS if model.only_since <= release]
    assert len(models) >= 20
    helper = Path(__file__).parents[2] / "helpers" / "vllm_pools.py"
    sources = ENVIRONMENT / f"vllm-{release}"
    environment = os.environ | ({"PYTHONPATH": str(sources)} if sources.is_dir() else {})
    cases = [
        model.case(release, default_block_size(model.layers, options(model, release))) for model in models
    ]
    answered = subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), str(helper)],
        input="\n".join(json.dumps(case) for case in cases),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in answered.stdout.splitlines() if line.startswith("[")]  # vLLM logs there, too
    answers = [json.loads(line) for line in lines]
    assert len(answers) == len(models), answered.stderr[-2000:]
    refused = 0
    for model, case, theirs in zip(models, cases, answers, strict=True):
        for available, one in zip(case["available"], theirs, strict=True):
            ours = pool(model, release, available)
            if "refused" in one:
                refused += 1
                assert "refused" in ours, (model.name, one)
            else:
                assert ours == one, model.name
    assert 0 < refused < len(models)
