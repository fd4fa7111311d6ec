"""A real vLLM behind a real LiteLLM proxy, and scraped by a real Prometheus server. All of them start here
and stop here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metronome_setup import FLAGS, ROOFLINE, metronome_environment, metronome_gpu, metronome_model
from places import HELPERS
from places import REPOSITORY as ROOT
from running import running
from timing import Machine, judge, until_right

from servecast.calibrate.measure.vllm.server import HOST, VllmServer, free_port
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.metrics.metrics import statistic
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import load
from servecast.sim.traffic.draw import replayed
from servecast.sim.traffic.traces import FORMATS, read_trace
from servecast.validate.compare.series import growth
from servecast.validate.live.target import Target
from servecast.validate.live.telemetry import Prometheus, get, scraper
from servecast.validate.live.truth import read_truth
from servecast.validate.parity.vllm_process import ENVIRONMENT

pytestmark = pytest.mark.live

LITELLM = ROOT / ".venv-litellm" / "bin" / "litellm"
PROMETHEUS = shutil.which("prometheus") or shutil.which(ROOT / ".prometheus" / "usr" / "bin" / "prometheus")
KEY = "sk-a-virtual-key-that-nobody-else-has"
KEY_CHECK_S = 0.3
BLOCKS, RATE = 64, 4.0
GPU_USE, GPU_MEMORY_MIB = 37.0, 1234.0
SCRAPE_S = 1.0  # from scrape to scrape, and what one may take at most
STEP_S = 0.5  # between the times for which Prometheus is asked
SCENARIO = f"""
schema_version: 1
name: metronome
model: {{config: model/config.json}}
gpu: {{file: gpu.json}}
profile: profile.json
engine: {{version: "0.32", max_model_len: 1024, max_num_seqs: 64, max_num_batched_tokens: 512,
  block_size: 128, num_gpu_blocks_override: {BLOCKS}, enforce_eager: true, async_scheduling: false}}
workload:
  prompt_tokens: {{kind: uniform, tokens: 200, range_ratio: 0.5}}
  output_tokens: {{kind: uniform, tokens: 20, range_ratio: 0.5}}
  arrivals: {{kind: poisson, request_rate: {RATE}}}
  num_requests: 100
"""


def wait_for_scrapes(url: str, targets: int, within_s: float = 600.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = json.loads(get(f"{url}/api/v1/query?query=sum(up)"))["data"]["result"]
        if found and float(found[0]["value"][1]) == targets:
            return
        time.sleep(0.2)
    raise AssertionError(f"Prometheus did not reach its {targets} targets")


def wait_for_scrape(url: str, unix_s: float, within_s: float = 600.0) -> None:
    """Until every target was scraped since a time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        (found,) = json.loads(get(f"{url}/api/v1/query?query=min(timestamp(up))"))["data"]["result"]
        if float(found["value"][1]) > unix_s:
            return
        time.sleep(0.2)
    raise AssertionError("Prometheus scrapes no more")


def listens(url: str) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, int(url.rpartition(":")[2]))) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario of a metronome, with a profile that is near enough to its law."""
    if not ENVIRONMENT.exists():
        pytest.skip("needs vLLM: run tools/install_vllm.sh")
    folder = tmp_path_factory.mktemp("proxied")
    metronome_gpu(ROOFLINE, metronome_model(folder / "model")).save(folder / "gpu.json")
    profile = Profile(
        servecast_version="0.1.0",
        gpu="metronome",
        model="metronome",
        engine_version="0.32.0",
        efficiencies=Efficiencies(
            compute=0.75, bandwidth=0.9, overlap_exponent=3.0, host_fixed_s=0.018, host_per_seq_s=5e-5
        ),
        front_end=FrontEndCosts(request_s=1e-3, token_s=5e-4, latency_s=7e-3),
    )
    profile.save(folder / "profile.json")
    (folder / "metronome.yaml").write_text(SCENARIO)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[str]:
    """URL of vLLM."""
    flags = [*FLAGS, "--max-model-len", "1024", "--num-gpu-blocks-override", str(BLOCKS)]
    server = VllmServer(
        folder / "model",
        [*flags, "--load-format", "dummy", "--served-model-name", "model"],
        log=folder / "engine.log",
        python=ENVIRONMENT / "bin" / "python",
        env=metronome_environment(ROOFLINE) | {"VLLM_SERVER_DEV_MODE": "1"},
    )
    with server:
        yield server.base_url
    assert not listens(server.base_url)


@pytest.fixture(scope="module")
def proxy(folder: Path, engine: str) -> Iterator[str]:
    """URL of LiteLLM, which has the engine as its only model."""
    if not LITELLM.exists():
        pytest.skip("needs LiteLLM: run tools/install_litellm.sh")
    config: dict[str, Any] = {
        "model_list": [
            {
                "model_name": "model",
                "litellm_params": {"model": "hosted_vllm/model", "api_base": engine, "api_key": "none"},
            }
        ],
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "custom_auth": "litellm_key.check",
        },
    }
    home = folder / "litellm"
    home.mkdir()
    (home / "config.yaml").write_text(json.dumps(config))
    shutil.copy(HELPERS / "litellm_key.py", home)
    url = f"http://{HOST}:{(port := free_port())}"
    command = [str(LITELLM), "--config", str(home / "config.yaml"), "--host", HOST, "--port", str(port)]
    env = {
        "LITELLM_MASTER_KEY": "sk-the-master-key",
        "VIRTUAL_KEY": KEY,
        "KEY_CHECK_S": str(KEY_CHECK_S),
        "VLLM_API_BASE": engine,  # of LiteLLM's route /vllm, which passes on what vLLM streams as it is
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it looks for prices on the internet
    }
    with running(command, url=f"{url}/health/liveliness", log=folder / "proxy.log", env=env):
        yield url
    assert not listens(url)


class Dcgm(BaseHTTPRequestHandler):
    """Answers as NVIDIA's exporter of GPU metrics does."""

    def do_GET(self) -> None:
        values = {"DCGM_FI_DEV_GPU_UTIL": GPU_USE, "DCGM_FI_DEV_FB_USED": GPU_MEMORY_MIB}
        lines = [f'# TYPE {name} gauge\n{name}{{gpu="0"}} {value}\n' for name, value in values.items()]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write("".join(lines).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def prometheus(folder: Path, engine: str) -> Iterator[str]:
    """URL of Prometheus, which scrapes the engine and a GPU."""
    if PROMETHEUS is None:
        pytest.skip("needs Debian's prometheus: run tools/install_prometheus.sh")
    gpu = ThreadingHTTPServer((HOST, 0), Dcgm)
    threading.Thread(target=gpu.serve_forever, daemon=True).start()
    targets = {"vllm": engine.removeprefix("http://"), "dcgm": f"{HOST}:{gpu.server_port}"}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S:g}s"},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target], "labels": {"node": "here"}}]}
            for job, target in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    url = f"http://{HOST}:{(port := free_port())}"
    command = [
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address={HOST}:{port}",
    ]
    try:
        with running(command, url=f"{url}/-/ready", log=folder / "prometheus.log", env={}):
            wait_for_scrapes(url, len(targets))
            yield url
        assert not listens(url)
    finally:
        gpu.shutdown()
        gpu.server_close()


def test_prometheus_tells_the_same_as_metrics(engine: str, prometheus: str) -> None:
    body = {"model": "model", "max_tokens": 100, "ignore_eos": True}

    def ask(number: int) -> None:
        prompt = [number] * 200  # 3 blocks in the end: 32 such requests start together, and 21 can end
        get(
            f"{engine}/v1/completions",
            body=json.dumps(body | {"prompt": prompt}).encode(),
            timeout_s=600,
        )

    def serve(_: int) -> tuple[str, bool, bool]:
        began, unix, machine = time.perf_counter(), time.time(), Machine()
        with scraper(f"{engine}/metrics", interval_s=0.1) as direct, ThreadPoolExecutor(40) as clients:
            time.sleep(2 * SCRAPE_S)
            list(clients.map(ask, range(40)))
            wait_for_scrape(prometheus, time.time())
            time.sleep(2 * STEP_S)  # so that a time that is asked for lies behind that scrape
        frame = Prometheus(prometheus, {"node": "here"}).frame(unix + SCRAPE_S, time.time(), STEP_S)
        asked = frame.assign(time_s=frame["time_s"] - unix + began)
        seen, quiet = direct.frame(), machine.quiet()
        known, agree = dict[str, float](), dict[str, float]()
        for column in ("running", "waiting", "kv_usage", "preemptions"):
            assert seen[column].max() > 0, column
            known[column] = asked[column].notna().mean()
            agree[column] = agreeing(asked, seen, column)
        for counter in ("preemptions", "prefix_queries", "queued"):
            assert growth(asked[counter].to_numpy()) == growth(seen[counter].to_numpy()) > 0, counter
        assert set(asked["gpu_util_pct"]) == {GPU_USE}
        assert set(asked["gpu_memory_mib"]) == {GPU_MEMORY_MIB}
        right = min(known.values()) == 1 and min(agree.values()) > 0.9
        return f"Prometheus knew {known} of the time, and {agree} agree", right, quiet

    until_right(serve)


def agreeing(asked: pd.DataFrame, seen: pd.DataFrame, column: str) -> float:
    """Share of Prometheus' values that /metrics had too: from the scrape before to the end of that one."""
    times, values = seen["time_s"].to_numpy(), seen[column].to_numpy()
    good = []
    for time_s, value in asked[["time_s", column]].itertuples(index=False):
        first = max(np.searchsorted(times, time_s - SCRAPE_S) - 1, 0)
        around = values[first : np.searchsorted(times, time_s + SCRAPE_S) + 1]
        good.append(around.min() <= value <= around.max())
    return float(np.mean(good))


def test_a_proxy_is_a_line_of_its_own_and_its_key_stays_secret(
    folder: Path, engine: str, proxy: str, request: pytest.FixtureRequest
) -> None:
    out, flags = folder / "out", []
    if PROMETHEUS is not None:
        flags = ["--prometheus-url", request.getfixturevalue("prometheus"), "--prometheus-label", "node=here"]
    machine = Machine()
    with commands_meanwhile() as commands:
        done = drive(folder, engine, proxy, out, KEY, *flags)
    quiet = machine.quiet()
    print(done.stdout)
    assert done.returncode in (0, 1, 3), done.stderr
    result = json.loads((out / "result.json").read_text())
    added_ms = result["proxy_added_latency_ms"]
    assert added_ms > 1e3 * KEY_CHECK_S
    assert f"latency that the proxy adds: {added_ms:.3g} ms" in done.stdout

    (load,) = result["loads"]
    assert load["problem"] is None
    (ttft,) = [row for row in load["rows"] if row["metric"] == "median_ttft_ms"]
    without_ms = 1e3 * predicted_ttft_s(folder, engine, out / load["name"] / "trace.jsonl")
    assert ttft["predicted"] - without_ms == pytest.approx(added_ms, rel=1e-3)
    nearer = abs(ttft["measured"] - ttft["predicted"]) < abs(ttft["measured"] - without_ms)
    what = f"{ttft['measured']} ms are nearer to {without_ms} without the proxy than to {ttft['predicted']}"
    judge(what, nearer, quiet=quiet)
    trace = [json.loads(line) for line in (out / load["name"] / "trace.jsonl").read_text().splitlines()]
    bench = json.loads((out / load["name"] / "bench.json").read_text())
    assert bench["output_lens"] == [request["output_length"] for request in trace]
    if PROMETHEUS is not None:
        metrics = pd.read_csv(out / load["name"] / "metrics.csv")
        assert metrics["running"].max() > 0
        assert growth(metrics["queued"].to_numpy()) > 0
        assert metrics["gpu_util_pct"].iloc[-1] == GPU_USE

    assert any("bench serve" in command for command in commands)
    assert not any(KEY in command for command in commands)
    assert KEY not in done.stdout + done.stderr
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"result.json", "report.html", "prediction.json", "bench.json"} <= {file.name for file in files}
    assert not any(KEY.encode() in file.read_bytes() for file in files)


def test_a_wrong_key_gives_one_message(folder: Path, engine: str, proxy: str) -> None:
    done = drive(folder, engine, proxy, folder / "refused", "sk-wrong")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "401" in done.stderr
    assert "is the key right?" in done.stderr
    assert "sk-wrong" not in done.stdout + done.stderr
    assert not [file for file in (folder / "refused").rglob("*") if file.is_file()]


def drive(
    folder: Path, engine: str, proxy: str, out: Path, key: str, *flags: str
) -> subprocess.CompletedProcess[str]:
    """``servecast validate live`` on the proxy."""
    command = [
        *(str(Path(sys.executable).with_name("servecast")), "validate", "live"),
        *(str(folder / "metronome.yaml"), "--base-url", f"{proxy}/vllm", "--engine-url", engine),
        *("--model", "model", "--tokenizer", str(folder / "model"), "--api-key-env", "OUR_KEY"),
        *("--vllm-python", str(ENVIRONMENT / "bin" / "python"), "--rates", str(RATE), "--duration", "5"),
        *("--seeds", "1", "--out", str(out), *flags),
    ]
    env = os.environ | {"OUR_KEY": key}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)


@contextmanager
def commands_meanwhile() -> Iterator[set[str]]:
    """The command lines of all processes that are seen while the block lasts."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # it has ended
                    seen.add(file.read_text(errors="replace").replace("\0", " "))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def predicted_ttft_s(folder: Path, engine: str, trace: Path) -> float:
    """The median without a proxy."""
    truth = read_truth(Target(engine, "model", str(folder / "model")), {"gpu": "cpu"})
    scenario = load(str(folder / "metronome.yaml")).changed(truth.overrides())
    run = simulate(scenario, seed=scenario.seed, stages=replayed(read_trace(trace, FORMATS["timed_trace"])))
    return statistic(run, "ttft", "median")
