"""A real vLLM with two data-parallel engine cores of a dense model, whose steps last what a law says."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import pytest
from metronome_law import Law
from metronome_setup import ROOFLINE, metronome_environment, metronome_model, share_late
from timing import Machine, until_right

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
MOST_LATE = 0.01  # of a load's time, by which a core's steps were longer than their law
LATE = "late"
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
    (folder / LATE).mkdir()
    with VllmServer(
        model,
        [*FLAGS, "--served-model-name", "m"],
        log=folder / "log",
        python=python,
        env=metronome_environment(LAW, folder / LATE),
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


class Load:
    """A span of time in which the server serves requests."""

    def __init__(self, server: VllmServer) -> None:
        self._server, self._before, self._machine = server, by_rank(server), Machine()
        self._began = time.monotonic()

    def ended(self) -> tuple[float, list[float], bool]:
        """How long it took, the requests of each core, and whether this machine kept time meanwhile."""
        now = time.monotonic()
        late = share_late(self._server.log.parent / LATE, self._began, now)
        print(f"steps were late by {late:.2%} of the time")
        quiet = self._machine.quiet() and late < MOST_LATE
        return now - self._began, (by_rank(self._server) - self._before).tolist(), quiet


def test_two_dense_ranks_serve_what_is_predicted(server: VllmServer) -> None:
    """A closed loop of twelve clients on two cores of eight seats. Which core gets the next request hangs
    on milliseconds there, so its counts are shown only."""
    requests = [Request(i, 0.0, prompt, output, output) for i, (prompt, output) in enumerate(CLOSED)]
    run = predicted(requests, CLIENTS)
    expected = run.requests["finish"].max()
    counts = run.requests.groupby("rank").size().tolist()

    def serve(_: int) -> tuple[str, bool, bool]:
        load = Load(server)
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda sizes: ask(server, *sizes), CLOSED))
        took, ranks, quiet = load.ended()
        what = f"{took:.2f} s, predicted {expected:.2f} s; ranks {ranks}, predicted {counts}"
        print(what)
        return what, abs(expected / took - 1) < WITHIN, quiet

    until_right(serve)


@pytest.mark.parametrize("name", TIMED)
def test_the_ranks_get_the_requests_that_vllm_gives_them(server: VllmServer, name: str) -> None:
    """Requests at given times, some of which last longer: the core with fewer in flight gets the next one, so
    that its share is not a half."""
    gap, outputs = TIMED[name]
    timed = [(gap * i, 64, outputs[i % len(outputs)]) for i in range(30)]
    requests = [Request(i, at, prompt, output, output) for i, (at, prompt, output) in enumerate(timed)]
    counts = predicted(requests, None).requests.groupby("rank").size().tolist()
    assert counts[0] != counts[1]

    def serve(_: int) -> tuple[str, bool, bool]:
        load, began, threads = Load(server), time.monotonic(), []
        for at, prompt, output in timed:
            time.sleep(max(0.0, began + at - time.monotonic()))
            threads.append(threading.Thread(target=ask, args=(server, prompt, output)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        _, ranks, quiet = load.ended()
        print(f"ranks {ranks}, predicted {counts}")
        return f"ranks {ranks} instead of {counts}", sorted(ranks) == sorted(counts), quiet

    until_right(serve)
