"""A real prefill and a real decode server behind a real proxy: vLLM with its ExampleConnector, whose steps
last what a law says. TTFT and TPOT as the client sees them, against a prediction that knows the law, and of
the proxy and the HTTP servers what single requests took.

Two servers, their workers, the proxy and the client share the cores of one machine, so that times are judged
where others left it alone, and the load is run again where they did not. Judged always: that the profile's
steps are the law's, and that every request's KV cache came from the other server.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.request import Request as Http
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from metronome_law import Law
from metronome_setup import FLAGS, ROOFLINE, metronome_environment, metronome_gpu, metronome_model
from numpy.typing import NDArray
from places import HELPERS
from running import running, together
from timing import Machine, until_right

from servecast.calibrate.measure.vllm.server import HOST, VllmServer, free_port
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario, load
from servecast.sim.traffic.draw import draw
from servecast.validate.parity.vllm_process import ENVIRONMENT

pytestmark = pytest.mark.live

TTFT, TPOT = 0.15, 0.08  # twice what a quiet machine of two cores showed: 7.7 and 4.0 % of the means
LAW = ROOFLINE | {"kv_request_s": 0.010, "kv_moved_token_s": 1e-4}
BLOCK, SINGLE = 128, 12
SCENARIO = """
schema_version: 1
name: two-servers
model: {{config: model/config.json}}
gpu: {{file: gpu.json}}
profile: profile.json
engine: {{version: "0.32", max_model_len: 1024, max_num_seqs: 64, max_num_batched_tokens: 4096, block_size:
  128, num_gpu_blocks_override: 400, enforce_eager: true, async_scheduling: false, enable_prefix_caching:
  false, kv_transfer_config: {{kv_connector: ExampleConnector, kv_role: kv_both}}}}
fleet:
  prefill: 1
  decode: 1
  proxy: {{hop_s: {hop}}}
  kv_link: {{kind: storage, gb_per_s: {rate}, latency_us: 10000}}
prompts: token_ids
workload:
  prompt_tokens: {{kind: uniform, tokens: 400, range_ratio: 0.4}}
  output_tokens: {{kind: uniform, tokens: 30, range_ratio: 0.5}}
  arrivals: {{kind: poisson, request_rate: 1}}
  num_requests: 40
"""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The proxy's URL, and the folder with the model."""
    if not ENVIRONMENT.exists():
        pytest.skip("needs vLLM: run tools/install_vllm.sh")
    folder = tmp_path_factory.mktemp("two-servers")
    metronome_gpu(ROOFLINE, metronome_model(folder / "model")).save(folder / "gpu.json")
    python = ENVIRONMENT / "bin" / "python"
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
    }
    (folder / "kv").mkdir()
    flags = [
        *("--worker-cls", "metronome_kv.ConnectedWorker", *FLAGS[2:5], "--max-model-len", "1024"),
        *("--max-num-seqs", "64", "--max-num-batched-tokens", "4096", "--num-gpu-blocks-override", "400"),
        *("--no-enable-prefix-caching", "--load-format", "dummy", "--served-model-name", "model"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    servers = [
        VllmServer(
            folder / "model", flags, log=folder / f"{name}.log", python=python, env=metronome_environment(LAW)
        )
        for name in ("prefill", "decode")
    ]
    url = f"http://{HOST}:{(port := free_port())}"
    command = [str(python), str(HELPERS / "two_servers_proxy.py"), str(port), *(s.base_url for s in servers)]
    with together(servers), running(command, url=f"{url}/health", log=folder / "proxy.log", env={}):
        yield url, folder


def scenario(folder: Path, hop: float, front: FrontEndCosts) -> Scenario:
    """What predicts it. A token's KV takes 2 layers x 2 x 64 x 2 bytes on one rank."""
    Profile(
        servecast_version="0.1.0",
        gpu="metronome",
        model="metronome",
        engine_version="0.32.0",
        efficiencies=Efficiencies(
            compute=0.75, bandwidth=0.9, overlap_exponent=3.0, host_fixed_s=0.0198, host_per_seq_s=5e-5
        ),
        front_end=front,
    ).save(folder / "profile.json")
    file = folder / "two-servers.yaml"
    rate = 2 * 2 * 64 * 2 / LAW["kv_moved_token_s"] / 1e9
    file.write_text(SCENARIO.format(hop=hop, rate=rate))
    return load(file)


def ask(url: str, number: int, prompt: int, output: int) -> tuple[float, float]:
    """TTFT and TPOT of one streamed completion, in s."""
    rng = np.random.default_rng(number)
    body = {
        "model": "model",
        "prompt": rng.integers(5, 200, prompt).tolist(),
        "max_tokens": output,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    began, times = time.perf_counter(), list[float]()
    http = Http(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(http, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - began)
    return times[0], (times[-1] - times[0]) / max(len(times) - 1, 1)


def predicted_single(made: Scenario, prompt: int, output: int) -> float:
    alone = made.changed(
        {
            "workload.prompt_tokens": prompt,
            "workload.output_tokens": output,
            "workload.num_requests": 1,
        }
    )
    requests = simulate(alone).requests
    return float((requests["first_token"] - requests["sent"]).iloc[0])


def beside_the_law(steps: pd.DataFrame) -> float:
    """By how much the predicted steps differ from the law at most, relative. A step stores the KV of whole
    blocks of a prompt and computes all of it, or loads it and computes the rest."""
    law, off = Law(json.dumps(LAW)), 0.0
    for step in steps[steps["prefill_requests"] <= 1].itertuples():
        lasts = list[float]()
        for moved in range(0, 641, BLOCK) if step.prefill_requests else (0,):
            loaded = moved if step.prefill_tokens <= BLOCK else 0
            chunks = [(step.prefill_tokens, loaded)] * step.prefill_requests
            seconds = law.seconds(chunks, step.decodes, step.decode_context)
            lasts.append(seconds + len(chunks) * (LAW["kv_request_s"] + moved * LAW["kv_moved_token_s"]))
        off = max(off, min(abs(step.duration / each - 1) for each in lasts))
    return off


def test_ttft_and_tpot_of_two_servers(proxy: tuple[str, Path]) -> None:
    url, folder = proxy
    for number in range(3):
        ask(url, 10_000 + number, 300, 4)  # the first requests start what is started late
    bare = scenario(folder, 0.0, FrontEndCosts())

    def serve(again: int) -> tuple[str, bool, bool]:
        machine = Machine()
        single = [ask(url, 20_000 + 100 * again + number, 400, 8)[0] for number in range(SINGLE)]
        rest = float(np.median(single)) - predicted_single(bare, 400, 8)
        print(f"single requests: TTFT {np.median(single):.4f} s, {rest:.4f} s of it outside the engines")
        hop = rest / 5  # 2 servers, 3 hops: a fifth each
        made = scenario(folder, hop, FrontEndCosts(latency_s=hop))
        requests = list(draw(made.stages(), again)[0].streams[0].requests)
        run = simulate(made, stages=[Stage("all", [Stream("requests", requests)])])
        assert beside_the_law(run.steps) < 0.005
        wrong = compared(run.requests, driven(url, 1000 * again, requests))
        return "; ".join(wrong), not wrong, machine.quiet()

    until_right(serve)
    said = (folder / "decode.log").read_text()
    assert said.count("Inject KV cache of") >= bare.workload.num_requests - 3


def driven(url: str, first: int, requests: Sequence[Request]) -> NDArray[np.float64]:
    """(n, 2) TTFT and TPOT of requests, sent when they arrive; their prompts are numbered from ``first``."""
    found, began = np.full((len(requests), 2), np.nan), time.perf_counter() + 1.0

    def client(number: int, asked: Request) -> None:
        time.sleep(max(0.0, began + asked.arrival_s - time.perf_counter()))
        found[number] = ask(url, first + number, asked.prompt_tokens, asked.output_tokens)

    threads = [threading.Thread(target=client, args=each) for each in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def compared(predicted: pd.DataFrame, found: NDArray[np.float64]) -> list[str]:
    """What is further off than it may be."""
    wrong = list[str]()
    answering = predicted["finish"] - predicted["first_token"]
    foreseen = predicted["first_token"] - predicted["sent"], answering / (predicted["output_tokens"] - 1)
    names = ("TTFT", TTFT), ("TPOT", TPOT)
    for (name, within), measured, expected in zip(names, found.T, foreseen, strict=True):
        for word, statistic in (("mean", np.mean), ("median", np.median)):
            off = float(statistic(expected) / statistic(measured) - 1)
            print(what := f"{name} {word}: measured {statistic(measured):.4f} s, {off:+.1%} predicted")
            wrong += [what] if abs(off) >= within else []
    return wrong
