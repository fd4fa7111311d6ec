"""Result files: vllm bench serve's keys, what produced them, and the tables beside them."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from servecast.sim.fleet.spec import Fleet
from servecast.sim.inputs.errors import InputError, reason
from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.fleet_load import fleet_load, rank_load
from servecast.sim.metrics.kv_offload import offload_summary
from servecast.sim.metrics.metrics import latencies, summary
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.spec_decode import draft_summary
from servecast.sim.metrics.turns import session_summary
from servecast.sim.metrics.warmup import Warmup, select
from servecast.sim.report.text import facts_text, plain
from servecast.sim.run.disaggregated import pools_facts, pools_lines
from servecast.sim.run.loading import loading_facts, loading_text
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.serve_flags import kv_cache_dtype, resolved_flags

SCHEMA_VERSION = 1
TABLES = (".csv", ".parquet")

_MEASURED = (  # besides what ends in _ms
    *("completed", "failed", "duration", "request_throughput", "request_goodput", "goodput_share"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    *("max_concurrent_requests", "kv_cache_usage_peak", "max_num_running", "max_num_waiting"),
    *("num_preemptions", "prefix_cache_hit_rate", "spec_decode_acceptance_rate"),
    "spec_decode_acceptance_length",
)
_OFFLOADED = ("external_hit_rate", "kv_offload_load_bytes", "kv_offload_store_bytes")
_OTHERS = (  # by their fields
    ({"aiperf_version"}, "aiperf"),
    ({"input_config"}, "aiperf or genai-perf"),
    ({"benchmarks"}, "guidellm"),
    ({"load_summary", "successes"}, "inference-perf"),
    ({"version", "run", "results"}, "an llm-d Benchmark Report"),
    ({"version", "scenario", "metrics"}, "an llm-d Benchmark Report"),
)
_VLLM_KEYS = ("completed", "duration", "output_throughput")  # in every result of vllm bench serve


def context(deployment: Deployment, *, seed: int) -> dict[str, Any]:
    """What produced a result: the same for a simulation, a plan and a sweep.

    ``what_if`` in it are the scenario's changes; ``run_context`` is that of the benchmark which the scenario
    describes, before these changes.
    """
    scenario, config = deployment.scenario, asdict(deployment.config)
    flags, drafts = scenario.engine, deployment.speculating
    del config["speculation"]
    speculation = {} if drafts is None else {"speculation": drafts.facts()}
    unset = {"command", "assume_rules"} | ({"speculative_config"} if drafts is None else set())
    offloaded = {}
    if deployment.offloading is not None:
        facts = deployment.offloading.facts()
        offloaded["kv_offload"] = {**facts, "break_even": loading_facts(deployment)}
    return {
        "schema_version": SCHEMA_VERSION,
        "servecast_version": version("servecast"),
        "backend": "servecast",
        "scenario": scenario.name,
        "what_if": scenario.changes,
        "seed": seed,
        "profile": scenario.profile,
        "engine_version": flags.version,
        "model_id": deployment.model.name,
        "gpu": deployment.gpu.name,
        "engine": {
            **flags.model_dump(mode="json", exclude=unset),
            "rules": config.pop("version"),
            **config,
            "kv_cache_dtype": kv_cache_dtype(deployment),
        },
        "flags": resolved_flags(deployment),
        "fleet": scenario.fleet.facts(),
        "run_context": None if scenario.run_context is None else scenario.run_context.model_dump(),
        "assumptions": [each.model_dump() for each in scenario.assumptions],
        "provenance": deployment.provenance(),
        "error_band": deployment.error_band,
        "error_bands": asdict(deployment.bands),
        "kv_cache": deployment.memory.facts(),
        **offloaded,
        **speculation,
        "notes": list(deployment.notes),
    } | ({} if not scenario.fleet.prefill else {"pools": pools_facts(deployment)})


def engine_lines(document: Mapping[str, Any]) -> list[str]:
    """The size of the KV cache as vLLM logs it, its groups where they are several, and
    the flags that were resolved, of a result's context."""
    kv, engine = document["kv_cache"], document["engine"]
    between = ""
    if kv["lowest_tokens"] != kv["highest_tokens"]:
        between = f"; {kv['lowest_tokens']:,} to {kv['highest_tokens']:,} by the account of memory"
    size = f"{kv['tokens']:,} tokens, {kv['max_concurrency']:.2f}x of max_model_len {kv['max_model_len']:,}"
    if (cores := engine.get("data_parallel_size", 1)) > 1:
        size += f", each of {cores} engine cores"
    if "pools" in document:
        return pools_lines(document["pools"])
    groups = [f"KV cache groups: {', '.join(kv['groups'])}"] if kv.get("groups") else []
    if (dummies := document.get("dummy_steps")) is not None:
        groups.append(
            f"Lockstep: {dummies['steps']:,} dummy steps, {dummies['share']:.1%} of the cores' time; "
            f"{dummies['waves']} waves ended"
        )
    return [f"GPU KV cache size: {size}{between}", *groups, f"Flags: {shlex.join(document['flags'])}"]


def offload_text(offloaded: Mapping[str, Any]) -> str:
    """What was found and moved, and when loading pays, of a result's ``kv_offload``."""
    busy = {name.replace("_", " "): f"{share:.0%}" for name, share in offloaded["link_busy"].items()}
    tokens = offloaded["loaded_tokens"]
    facts = {
        "connector": ", ".join(offloaded.get("connectors", [offloaded["kv_connector"]])),
        "host memory, GiB a replica": offloaded["host_memory_bytes"] / (1 << 30),
        "host link, GB/s a GPU": offloaded["host_gb_per_s"],
        "prompt tokens found in the GPU": _share(offloaded["local_hit_rate"]),
        "of the others, found elsewhere": _share(offloaded["external_hit_rate"]),
        **{f"tokens loaded from {name}": count for name, count in tokens.items()},
        "loaded, GB": offloaded["kv_offload_load_bytes"] / 1e9,
        "stored, GB": offloaded["kv_offload_store_bytes"] / 1e9,
        "chunks evicted": offloaded["evicted_chunks"],
        "links busy": ", ".join(f"{name} {share}" for name, share in busy.items()),
    }
    text = facts_text("\nKV cache outside of the GPUs", facts)
    return f"{text}\n{loading_text(offloaded['break_even'])}"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def result(
    deployment: Deployment,
    run: Run,
    *,
    ranks: Sequence[float] = (95, 99),
    warmup: Warmup | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """The result of a run: its context, vllm bench serve's keys over the whole run, and each stage's own. Of
    a fleet its load, too, replica by replica.

    Args:
        ranks: percentiles to give. warmup: what to leave out at the start of each stage.
        detailed: add a value a request, under the keys of ``vllm bench serve --save-detailed``. Token
            gaps are not kept by request, so there are no ``itls``.

    Raises:
        InputError: the warm-up leaves nothing of a stage.
    """
    scenario = deployment.scenario
    goodput = scenario.goodput_limits
    several = len(run.stages) > 1
    fleet = scenario.fleet.size > 1 or deployment.endpoints > 1
    whole = run if several else select(run, warmup=warmup)
    document = context(deployment, seed=run.meta["seed"])
    document["notes"] += cautions(deployment, run)
    document |= summary(whole, ranks=ranks, goodput=goodput) | draft_summary(run)
    failures: Mapping[str, int] = run.meta.get("failures", {})
    document["notes"] += [f"{count} requests failed: {why}" for why, count in failures.items()]
    if scenario.fleet.autoscaler is not None:
        started = f"{scenario.fleet.autoscaler.kind}: {len(run.meta['lives'])} replicas in all"
        document["notes"].append(f"{started}; servecast day tells when")
    document |= run.meta.get("mm", {})
    if "kv_offload" in run.meta and "kv_offload" in document:
        document["kv_offload"] |= offload_summary(run.meta["kv_offload"])
    document["stages"] = []
    for index, name in enumerate(run.stages if several else ()):
        part = select(run, stage=index, warmup=warmup)
        document["stages"].append({"stage": name, **summary(part, ranks=ranks, goodput=goodput)})
        if fleet:
            document["stages"][-1]["fleet_load"] = fleet_load(part)
        if (sessions := session_summary(part, ranks)) is not None:
            document["stages"][-1]["sessions"] = sessions
    if fleet:
        document["fleet_load"] = fleet_load(whole)
    if rows := rank_load(whole):
        document["ranks"] = rows
    if "dummy_steps" in run.meta:
        document["dummy_steps"] = run.meta["dummy_steps"]
    sessions = session_summary(whole, ranks)
    if sessions is not None:
        document["sessions"] = sessions
    if detailed:
        document |= _detailed(whole)
    return document


def measured(part: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics among the keys of a result or of one of its stages."""
    found = {key: value for key, value in part.items() if key in _MEASURED or key.endswith("_ms")}
    found |= {key: value for key, value in part.get("kv_offload", {}).items() if key in _OFFLOADED}
    of_fleet = part.get("fleet_load", {}).items()
    return found | {key: value for key, value in of_fleet if key not in ("replicas", "pools")}


def cautions(deployment: Deployment, run: Run) -> list[str]:
    """What a reader of a run should know, in words: what of it lies beyond the data of its profile's fit, and
    a risk that the GPU's memory does not suffice, and what its router could not do."""
    steps, requests = run.steps, run.requests
    beyond = deployment.profile.outside_ranges(
        tokens=_least_and_most(steps, "prefill_tokens", "decodes", "drafts"),
        batch=_least_and_most(steps, "prefill_requests", "decodes"),
        context=(
            float(requests["prompt_tokens"].min()),
            _least_and_most(requests, "prompt_tokens", "output_tokens")[1],
        ),
    )
    risk = deployment.memory_risk(int(requests["prompt_tokens"].max()))
    routed = _routed(deployment.scenario.fleet, requests)
    return [text for text in (beyond, risk and risk.warning, *routed) if text]


def _least_and_most(table: pd.DataFrame, column: str, *columns: str) -> tuple[float, float]:
    """Of the sums of columns."""
    total = table[column]
    for name in columns:
        total = total + table[name]
    return float(total.min()), float(total.max())


def _routed(fleet: Fleet, requests: pd.DataFrame) -> list[str]:
    """What a router could not do with these requests."""
    said: list[str] = []
    if fleet.size < 2 or len(requests) < 2:
        return said
    replicas = requests["replica"].dropna().unique()
    if fleet.asks_sessions and requests["group"].isna().all():
        said.append(f"{fleet.router_name}: no request has a session or group, so there is nothing to hold to")
    if len(replicas) == 1 and not fleet.prefill:
        why = ""
        if fleet.router == "prefix_affinity":
            why = f": all prompts have the same first {fleet.router_options.prefix_tokens} tokens"
        what = f"all {len(requests):,} requests to replica {replicas[0]} of {fleet.size}"
        said.append(f"{fleet.router_name} sent {what}{why}")
    return said


def _detailed(run: Run) -> dict[str, Any]:
    requests = run.requests
    ttft = latencies(requests)["ttft"].reindex(requests.index)
    return {
        "input_lens": requests["prompt_tokens"].tolist(),
        "output_lens": requests["output_tokens"].tolist(),
        "ttfts": [None if math.isnan(value) else value for value in ttft.tolist()],
        "start_times": [None if math.isnan(value) else value for value in requests["sent"].tolist()],
        "errors": ["" if status == "finished" else status for status in requests["status"]],
    }


def to_text(document: Mapping[str, Any]) -> str:
    """A result as JSON; what is not finite is null."""
    return json.dumps(plain(document), indent=2, allow_nan=False) + "\n"


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all. Raises InputError if the file cannot be written."""
    write_whole(path, lambda partial: partial.write_text(to_text(document), encoding="utf-8"))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table of a run as CSV or Parquet (times in seconds), whole or not at all."""
    check_table(path, where=str(path))
    if path.suffix == ".parquet":
        write_whole(path, lambda partial: table.to_parquet(partial, index=False))
    else:
        write_whole(path, lambda partial: table.to_csv(partial, index=False, lineterminator="\n"))


def check_table(path: Path, *, where: str) -> None:
    """Refuse, before a long run, a table file that `write_table` could not write."""
    if path.suffix not in TABLES:
        raise InputError(f"{path.name!r} is no table", where=where, fix="End it in .csv or .parquet.")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        what = "Parquet needs pyarrow"
        raise InputError(what, where=where, fix="Install servecast[parquet], or write a .csv.")
    check_output(path, where=where)


def check_output(path: Path | None, *, where: str) -> None:
    """Refuse, before a long run, a file that could not be written, if one is asked for. Missing folders are
    made later."""
    if path is None:
        return
    folder = next(each for each in path.absolute().parents if each.exists())
    taken = path.is_dir() or (path.exists() and not os.access(path, os.W_OK))
    if taken or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written", where=where, fix="Give another path.")


def read_result(path: Path) -> dict[str, Any]:
    """A result of servecast or of ``vllm bench serve --save-result``.

    Raises:
        InputError: it cannot be read, is of another schema version, or is no result.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"cannot be read: {reason(error)}"
        raise InputError(what, where=str(path), fix="Give a result's JSON file.") from None
    if not isinstance(document, dict):
        raise InputError("is not a JSON object", where=str(path), fix="Give a result's JSON file.")
    ours = "servecast_version" in document
    other = None if ours else next((tool for keys, tool in _OTHERS if keys <= document.keys()), None)
    if other is not None:
        what = f"is a result of {other}; this reads those of servecast simulate and of vllm bench serve"
        fix = "servecast check asks whether it can be true, validate result whether it is predicted."
        raise InputError(what, where=str(path), fix=fix)
    found = document.get("schema_version") if ours else SCHEMA_VERSION
    if found != SCHEMA_VERSION:
        where, fix = f"{path}: schema_version", "Write the result again with this version of servecast."
        raise InputError(f"schema version {found!r}, this servecast reads {SCHEMA_VERSION}", where, fix)
    for key in _VLLM_KEYS:
        if key not in document:
            fix = "Give a result of servecast simulate or of vllm bench serve --save-result."
            raise InputError(f"there is no {key!r}", where=str(path), fix=fix)
    return document
