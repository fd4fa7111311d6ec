"""A real vLLM with two data-parallel engine cores of a dense model, whose steps last what a law says."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import repeat

import numpy as np
import pytest
from metronome_law import Law
from metronome_setup import ROOFLINE, metronome_environment, metronome_model
from timing import Machine, judge

from servecast.calibrate.measure.vllm.server import VllmServer
from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.data_parallel import DataParallel
from servecast.sim.engine.request import Request, Stage, Stream
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.fleet.client import Client
from servecast.sim.fleet.fleet import Fleet
from servecast.sim.fleet.replica import Replica
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.metrics.records import Run
from servecast.sim.routing.options import RouterOptions
from servecast.sim.routing.routers import ROUTERS
from servecast.validate.parity.vllm_process import ENVIRONMENT

pytestmark = pytest.mark.live
LAW = ROOFLINE | {"fixed_s": 0.060}  # long steps: what vLLM itself takes on this machine hardly counts
WITHIN = 0.03
SEATS, BUDGET, LENGTH = 8, 512, 1024
FLAGS = (
    *("--worker-cls", "metronome.MetronomeWorker", "--enforce-eager", "--load-format", "dummy"),
    *("--distributed-executor-backend", "uni", "--data-parallel-size", "2", "--api-server-count", "1"),
    *("--max-model-len", str(LENGTH), "--max-num-seqs", str(SEATS), "--no-enable-prefix-caching"),
    *("--max-num-batched-tokens", str(BUDGET), "--num-gpu-blocks-override", "128"),
)
CLIENTS = 12
CLOSED = [(64, 10 + 7 * (i % 6)) for i in range(72)]  # prompt and output tokens
TIMED = {  # seconds from one arrival to the next, and output tokens in turn; longer steps change no count
    "short and long": (0.43, (12, 60)),
    "fewer at once": (0.61, (12, 60)),
}


class LawTime:
    """The law as a step-time model."""

    def __init__(self) -> None:
        self._law = Law(json.dumps(LAW))

    def seconds(self, step: object) -> float:
        return self._law.seconds(step.chunks, step.decodes, step.decode_context)  # type: ignore[attr-defined]

    def roofline_seconds(self, step: object) -> float:
        return 0.0


def predicted(requests: list[Request], clients: int | None) -> Run:
    config = EngineConfig(
        version="0.32",
        max_num_seqs=SEATS,
        max_num_batched_tokens=BUDGET,
        max_model_len=LENGTH,
        num_gpu_blocks=128,
        block_size=128,
        enable_prefix_caching=False,
        async_scheduling=False,
        data_parallel=DataParallel(size=2, local=2, api_servers=1, lockstep=False),
    )
    rng, costs = np.random.default_rng(0), FrontEndCosts(latency_s=0.004, delivery_s=0.004)

    def make(index: int, client: Client) -> Replica:
        engines = [Scheduler(config), Scheduler(config)]
        return Replica(index, engines, LawTime(), repeat(1.0), costs, rng, client)

    router = ROUTERS["round_robin"](RouterOptions(), rng)
    stage = Stage("all", [Stream("all", requests, max_concurrency=clients)])
    return Fleet(make, 1, router, Client(costs), rng).run([stage])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    if not ENVIRONMENT.exists():
        pytest.skip("needs vLLM: run tools/install_vllm.sh")
    folder = tmp_path_factory.mktemp("ranks")
    python = ENVIRONMENT / "bin" / "python"
    model = metronome_model(folder / "model")
    with VllmServer(
        model,
        [*FLAGS, "--served-model-name", "m"],
        log=folder / "log",
        python=python,
        env=metronome_environment(LAW),
    ) as up:
        ask(up, 8, 2)
        yield up


def ask(server: VllmServer, prompt: int, output: int) -> None:
    body = {"model": "m", "prompt": [7] * prompt, "max_tokens": output, "min_tokens": output}
    body |= {"ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == output


def by_rank(server: VllmServer) -> np.ndarray:
    """Requests that each engine core has finished, by vLLM's own counters."""
    with urllib.request.urlopen(f"{server.base_url}/metrics") as answer:
        text = answer.read().decode()
    found = np.zeros(2)
    for engine, count in re.findall(r'vllm:request_success_total\{engine="(\d)".*\} ([\d.e+]+)', text):
        found[int(engine)] += float(count)
    return found


def test_two_dense_ranks_serve_what_is_predicted(server: VllmServer) -> None:
    """A closed loop of twelve clients on two cores of eight seats. Which core gets the next request hangs
    on milliseconds there, so its counts are shown only."""
    work, lock, before, machine = iter(CLOSED), threading.Lock(), by_rank(server), Machine()

    def client() -> None:
        while True:
            with lock:
                mine = next(work, None)
            if mine is None:
                return
            ask(server, *mine)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, ranks, quiet = time.monotonic() - began, by_rank(server) - before, machine.quiet()
    requests = [Request(i, 0.0, prompt, output, output) for i, (prompt, output) in enumerate(CLOSED)]
    run = predicted(requests, CLIENTS)
    expected = run.requests["finish"].max()
    counts = run.requests.groupby("rank").size().tolist()
    print(f"{took:.2f} s, predicted {expected:.2f} s; ranks {ranks.tolist()}, predicted {counts}")
    judge(f"{took:.2f} s instead of {expected:.2f} s", abs(expected / took - 1) < WITHIN, quiet=quiet)


@pytest.mark.parametrize("name", TIMED)
def test_the_ranks_get_the_requests_that_vllm_gives_them(server: VllmServer, name: str) -> None:
    """Requests at given times, some of which last longer: the core with fewer in flight gets the next one, so
    that its share is not a half."""
    gap, outputs = TIMED[name]
    timed = [(gap * i, 64, outputs[i % len(outputs)]) for i in range(30)]
    before, machine, began = by_rank(server), Machine(), time.monotonic()
    threads = []
    for at, prompt, output in timed:
        time.sleep(max(0.0, began + at - time.monotonic()))
        threads.append(threading.Thread(target=ask, args=(server, prompt, output)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    ranks, quiet = by_rank(server) - before, machine.quiet()
    requests = [Request(i, at, prompt, output, output) for i, (at, prompt, output) in enumerate(timed)]
    counts = predicted(requests, None).requests.groupby("rank").size().tolist()
    print(f"ranks {ranks.tolist()}, predicted {counts}")
    assert counts[0] != counts[1]
    judge(f"ranks {ranks.tolist()} instead of {counts}", sorted(ranks) == sorted(counts), quiet=quiet)
