"""Whatever stands in a file that a user gives, it is read or refused with one message: 300 broken copies of a
good file for each reader."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from places import DATA, SAMPLES
from small_scenarios import MINIMAL

from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.profile import Profile
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.routing.llmd.config import read_epp
from servecast.sim.routing.llmd.endpoint_picker import EndpointPicker
from servecast.sim.routing.llmd.release import NEWEST
from servecast.sim.routing.options import RouterOptions
from servecast.sim.run.results import read_result
from servecast.sim.scenario.scenario import load, shipped_folder
from servecast.sim.traffic.draw import check_requests, draw
from servecast.sim.traffic.forms import expand
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.measured_lengths import Histogram
from servecast.sim.traffic.spec import StreamSpec
from servecast.sim.traffic.trace_spec import TraceSpec
from servecast.validate.check.check import check
from servecast.validate.readers import read_all

COPIES = 300
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2.5, -0.0, 1e308, 10**30, 10**400, math.nan, math.inf, "", "x", "1e999", "\x00",
    "é" * 300, "2024-13-45T99:00:00+99:00", [], {}, [[]], {"x": {}}, [None], ["a", 1], [-1], [10**20],
)  # fmt: skip


def trace_of(name: str) -> Callable[[Path], object]:
    """Reads a trace of a format, as far as its requests are drawn."""

    def read(path: Path) -> object:
        columns = None
        if name in ("csv", "jsonl"):
            columns = {"timestamp": "t", "input_tokens": "i", "output_tokens": "o", "session": "s"}
        spec = {"path": str(path), "format": name, "columns": columns}
        if name == "aiperf":
            trace = spec | {"block_tokens": 16}
            return draw(expand(parse(StreamSpec, {"trace": trace}, source="test"), None), 0)
        return parse(TraceSpec, spec, source="test").read()

    return read


def scenario(path: Path) -> object:
    """Loads a scenario and draws what it sends, but for very much of it."""
    loaded = load(path)
    workload = loaded.stages()
    streams = [stream for stage in workload.stages for stream in stage.streams]
    if all((stream.num_requests or 10**9) < 10_000 and stream.duration_s is None for stream in streams):
        check_requests(draw(workload, 0), 10**9, where="test")
    return loaded


def picker(path: Path) -> object:
    """An endpoint picker of a configuration."""
    return EndpointPicker(read_epp(path, NEWEST), RouterOptions(), np.random.default_rng(0), lambda: 0.0)


def hashed(**names: Any) -> str:
    """Three requests of a trace of JSON lines, with columns of these names."""
    rows = [(0.5, 40, 3, [1, 2, 3]), (1.5, 20, 2, [1, 4]), (2.0, 33, 9, [1, 2, 5])]
    lines = []
    for number, (time, prompt, output, ids) in enumerate(rows):
        values = {"time": time, "prompt": prompt, "output": output, "ids": ids, "number": number, "more": -1}
        lines.append(json.dumps({name: values[value] for name, value in names.items()}))
    return "\n".join(lines) + "\n"


def metrics(path: Path) -> object:
    """Lengths of a histogram of Prometheus."""
    fields = {"kind": "histogram", "path": str(path), "metric": "vllm:request_prompt_tokens"}
    return parse(Histogram, fields, source="test").draw(10, np.random.default_rng(0))


LENGTHS = {"timestamp": "time", "input_length": "prompt", "output_length": "output", "hash_ids": "ids"}
TEXTS: dict[str, tuple[str, str, Callable[[Path], object]]] = {  # name -> ending, good text, reader
    "mooncake": (
        "jsonl",
        "\n".join((DATA / "mooncake" / "conversation_trace.jsonl").read_text().splitlines()[:6]),
        trace_of("mooncake"),
    ),
    "bailian": ("jsonl", hashed(**LENGTHS, chat_id="number", parent_chat_id="more"), trace_of("bailian")),
    "aiperf": (
        "jsonl",
        hashed(timestamp="time", **{key: LENGTHS[key] for key in list(LENGTHS)[1:]}, session_id="number")
        + '{"session_id": 1, "delay": 5, "input_length": 9, "output_length": 3}\n',
        trace_of("aiperf"),
    ),
    "timed_trace": ("jsonl", hashed(**LENGTHS), trace_of("timed_trace")),
    "llmservingsim": (
        "jsonl",
        '{"arrival_time_ns": 5, "input_toks": 3, "output_toks": 2, "input_tok_ids": [1, 2, 3]}\n' * 3,
        trace_of("llmservingsim"),
    ),
    "jsonl": ("jsonl", hashed(t="time", i="prompt", o="output", s="number"), trace_of("jsonl")),
    "metrics": (
        "txt",
        "".join(
            f'vllm:request_prompt_tokens_bucket{{le="{le}",model_name="m"}} {count}\n'
            for le, count in (("1.0", 0), ("200.0", 4), ("500.0", 9), ("+Inf", 9))
        )
        + 'vllm:request_prompt_tokens_sum{model_name="m"} 2100\n'
        + 'vllm:request_prompt_tokens_count{model_name="m"} 9\n',
        metrics,
    ),
    "query": (
        "json",
        json.dumps(
            {
                "data": {
                    "result": [{"metric": {"le": le}, "value": [1, n]} for le, n in (("9", "2"), ("20", "5"))]
                }
            }
        ),
        metrics,
    ),
    "azure": (
        "csv",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,0,4808,10\n"
        "2023-11-16 18:17:04+00:00,2,3180,8\n2023-11-16 20:17:05+02:00,0,110,27\n",
        trace_of("azure"),
    ),
    "burstgpt": (
        "csv",
        "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,a,M,472,18,490,x\n45.0,,M,100,0,100,x\n118,b,M,1087,230,1317,x\n",
        trace_of("burstgpt"),
    ),
    "vidur": (
        "csv",
        "arrived_at,num_prefill_tokens,num_decode_tokens,session_id\n0.0,32,8,7\n1.5,16,4,7\n",
        trace_of("vidur"),
    ),
    "csv": ("csv", "t,i,o,s\n1764547200,100,20,a\n1764547201,100,3,b\n", trace_of("csv")),
    "table": (
        "csv",
        "concurrency,requests,ttft_mean_ms,p95 TPOT (ms),e2e_p50_s,req_s,output_tok_s,kv_usage\n"
        "1,40,80,9,0.5,2,200,0.1\n4,160,90,12,0.6,6.5,660,0.3\n",
        check,
    ),
    "sweep summary": (
        "csv",
        ",num_prompts,request_rate,max_concurrency,duration,completed,failed,request_throughput,mean_ttft_ms\n"
        "0,200,inf,8.0,100.0,200,0,2.0,100.0\n1,200,4.0,,60.0,200,0,3.333,100.0\n",
        check,
    ),
    "scenario": ("yaml", MINIMAL, scenario),
    "workload": (
        "yaml",
        yaml.safe_dump(
            {
                "load": {"type": "constant", "stages": [{"rate": 2, "duration": 5}]},
                "data": {"type": "shared_prefix", "shared_prefix": {"num_groups": 2}},
                "api": {"streaming": True},
                "server": {"ignore_eos": True},
            }
        ),
        lambda path: parse(InferencePerfWorkload, {"inference_perf": str(path)}, source="test").workload(),
    ),
    "endpoint picker of today": (
        "yaml",
        yaml.safe_dump(
            {
                "apiVersion": "llm-d.ai/v1alpha1",
                "kind": "EndpointPickerConfig",
                "featureGates": ["dataLayer"],
                "plugins": [
                    {"type": "token-producer", "parameters": {"vllm": {"url": "http://render:8000"}}},
                    {"type": "endpoint-notification-source"},
                    {
                        "type": "precise-prefix-cache-producer",
                        "parameters": {"tokenProcessorConfig": {"blockSize": 64}, "speculativeTTL": "2s"},
                    },
                    {
                        "type": "prefix-cache-affinity-filter",
                        "parameters": {
                            "prefixMatchInfoProducerName": "precise-prefix-cache-producer",
                            "affinityThreshold": 0.8,
                        },
                    },
                    {"type": "token-load-scorer"},
                ],
                "dataLayer": {
                    "sources": [
                        {
                            "pluginRef": "endpoint-notification-source",
                            "extractors": [{"pluginRef": "precise-prefix-cache-producer"}],
                        }
                    ]
                },
                "schedulingProfiles": [
                    {
                        "name": "default",
                        "plugins": [
                            {"pluginRef": "prefix-cache-affinity-filter"},
                            {"pluginRef": "token-load-scorer", "weight": 2},
                        ],
                    }
                ],
            }
        ),
        picker,
    ),
    "endpoint picker": (
        "yaml",
        (shipped_folder() / "llmd" / "precise.yaml").read_text(),
        lambda path: read_epp(path, "v1.2"),
    ),
    "model": (
        "json",
        (shipped_folder() / "models" / "Qwen3-30B-A3B.json").read_text(),
        lambda path: ModelShape.from_config(path, "m"),
    ),
    "profile": ("json", (shipped_folder() / "profiles" / "l4-qwen2.5-0.5b.json").read_text(), Profile.load),
    "gpu": (
        "yaml",
        "name: X\nbf16_flops: 1.0e+14\nbandwidth: 1.0e+12\nmemory_bytes: 25769803776\n",
        GPU.from_file,
    ),
}


def results() -> list[Path]:
    """A small result of each tool."""
    return [
        SAMPLES / "vllm" / "vllm-0.32.json",
        SAMPLES / "vllm" / "vllm-0.23.jsonl",
        SAMPLES / "guidellm" / "benchmarks.json",
        SAMPLES / "aiperf" / "profile_export.jsonl",
        SAMPLES / "aiperf" / "profile_export_aiperf.json",
        SAMPLES / "inference_perf" / "0.7.0" / "stage_0_lifecycle_metrics.json",
        SAMPLES / "inference_perf" / "0.7.0" / "per_request_lifecycle_metrics.json",
        SAMPLES / "benchmark_report" / "servecast.yaml",
    ]


def smaller(value: Any, most: int) -> Any:
    """A value whose lists have at most so many items."""
    if isinstance(value, dict):
        return {key: smaller(each, most) for key, each in value.items()}
    return [smaller(each, most) for each in value[:most]] if isinstance(value, list) else value


def spoil(value: Any, rng: random.Random) -> Any:
    """The value with one place in it missing, of another type, doubled, or with something unknown beside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if kind < 0.25:
            return {**value, rng.choice(("unknown", "", "kind", "version")): rng.choice(ODD)}
        return {**value, key: spoil(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:place] + value[place + 1 :] + [value[place]] * 3
        return [*value[:place], spoil(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def broken(text: str, ending: str, rng: random.Random) -> bytes:
    """A copy of a file's text with something wrong."""
    whole = text.encode()
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(
            (b"", b" \n", b"\n\n\n", b"null", b"[]", b"{}", b"\xff\xfe\x00", b"a,b\n", b"\x00" * 50)
        )
    if kind < 0.15:
        return whole[: rng.randrange(len(whole))]
    if kind < 0.22:
        place = rng.randrange(len(whole))
        return whole[:place] + bytes(rng.randrange(256) for _ in range(4)) + whole[place:]
    if kind < 0.27:
        return whole * 3 + whole[: len(whole) // 2]
    if kind < 0.3:
        return whole[: len(whole) // 2] + b"9" * 5000 + whole[len(whole) // 2 :]
    lines = text.splitlines()
    if ending == "csv":
        row = rng.randrange(len(lines))
        cells = lines[row].split(",")
        cells[rng.randrange(len(cells))] = str(rng.choice(ODD))
        lines[row] = ",".join(cells)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if ending == "jsonl":
        row = rng.randrange(len(lines))
        lines[row] = json.dumps(spoil(json.loads(lines[row]), rng))
        return "\n".join(lines).encode()
    if ending == "json":
        return json.dumps(spoil(json.loads(text), rng)).encode()
    return yaml.dump(spoil(yaml.load(text, yaml.CSafeLoader), rng), Dumper=yaml.CSafeDumper).encode()


def try_copies(text: str, ending: str, read: Callable[[Path], object], folder: Path, seed: str) -> None:
    rng, path = random.Random(seed), folder / f"mutated.{ending}"
    path.write_text(text)
    read(path)  # the good one
    for number in range(COPIES):
        path.write_bytes(broken(text, ending, rng))
        try:
            with contextlib.suppress(InputError):
                read(path)
        except Exception as error:  # what a user would see as a traceback
            shutil.copy(path, folder / f"failed.{ending}")
            raise AssertionError(f"copy {number} of {seed}: {path.read_bytes()[:2000]!r}") from error


@pytest.mark.parametrize("name", TEXTS)
def test_a_mutated_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    ending, text, read = TEXTS[name]
    try_copies(text, ending, read, tmp_path, name)


CALLS: list[tuple[Path, Callable[[Path], object]]] = [(results()[0], read_result)]
CALLS += [(file, check if "per_request" not in file.name else read_all) for file in results()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of huge numbers
@pytest.mark.parametrize(("file", "read"), CALLS, ids=lambda each: getattr(each, "name", "") or each.__name__)
def test_a_mutated_result_is_read_or_refused(
    file: Path, read: Callable[[Path], object], tmp_path: Path
) -> None:
    text = file.read_text()
    if file.suffix == ".yaml":
        text = json.dumps(yaml.safe_load(text))
    elif file.suffix == ".jsonl":
        text = "\n".join(text.splitlines()[:1]) + "\n"
    if file.suffix != ".jsonl":
        text = json.dumps(smaller(json.loads(text), 24 if file.parent.name == "vllm" else 1))
    ending = "jsonl" if file.suffix == ".jsonl" else "json"
    try_copies(text, ending, read, tmp_path, file.name)
