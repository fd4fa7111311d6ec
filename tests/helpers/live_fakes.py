"""A server and a load generator that only look like vLLM, to try the campaign around them."""

from __future__ import annotations

import json
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.profile import Profile
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import load
from servecast.sim.traffic.draw import replayed
from servecast.sim.traffic.traces import FORMATS, read_trace

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.7
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="tiny"} 2.0
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 4.0
vllm:request_queue_time_seconds_count{engine="0",model_name="tiny"} 4.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="tiny"} 0.2
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",enable_prefix_caching="True",engine="0",num_gpu_blocks="900"} 1.0
"""
SAYS_ONLY_ITS_BLOCKS = METRICS[METRICS.index("# TYPE vllm:cache_config_info") :]
SCENARIO = """
schema_version: 1
name: tiny
model: {config: tiny/config.json}
gpu: {file: gpu.json}
engine: {version: "0.32", max_num_seqs: 8, max_model_len: 1024, num_gpu_blocks_override: 900, block_size: 32,
  async_scheduling: false, enforce_eager: true}
workload:
  prompt_tokens: {kind: uniform, tokens: 100, range_ratio: 0.5}
  output_tokens: 100
  arrivals: {kind: poisson, request_rate: 10}
  num_requests: 100
slo: ["e2el:p95:50"]
"""


def tiny_scenario(folder: Path) -> Path:
    """The file of a scenario on a GPU that a file describes, which a machine without one may serve. Its steps
    are typical, and nothing random stands in front of them, so that two runs differ by their load alone."""
    write_tiny_model(folder / "tiny")
    find_gpu("L4").save(folder / "gpu.json")
    typical = Profile.typical("L4", "tiny", "0.32", servecast_version="0.2.0")
    typical.model_copy(update={"front_end": FrontEndCosts()}).save(folder / "profile.json")
    path = folder / "tiny.yaml"
    path.write_text(SCENARIO + "profile: profile.json\n")
    return path


class FakeServer:
    """Answers what a live campaign asks, on a port of its own, for as long as a ``with`` block lasts.

    Args:
        model: the name that it serves. key: that requests to /v1 must carry; another one it tells in its
            refusal. info: its vllm_config, not told if None. version: not told if None. metrics: not told if
            None. also: path -> another answer: a status, or what makes a text of the query.

    Attributes:
        asked: (path, Authorization header) of each request.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        key: str | None = None,
        info: Mapping[str, Any] | None = None,
        version: str | None = "0.32.0+cpu",
        metrics: str | None = METRICS,
        also: Mapping[str, int | Callable[[dict[str, str]], str]] | None = None,
    ) -> None:
        self.asked: list[tuple[str, str | None]] = []
        answers: dict[str, str | int | Callable[[dict[str, str]], str] | None] = {
            "/health": "",
            "/version": None if version is None else json.dumps({"version": version}),
            "/metrics": metrics,
            "/server_info": None if info is None else json.dumps({"vllm_config": info}),
            "/v1/models": json.dumps({"data": [{"id": model, "max_model_len": 1024}]}),
            "/v1/completions": json.dumps({"choices": []}),
            **(also or {}),
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, said = urlsplit(self.path).path, self.headers.get("Authorization")
                outer.asked.append((path, said))
                answer = answers.get(path)
                if callable(answer):
                    answer = answer(
                        {name: each[0] for name, each in parse_qs(urlsplit(self.path).query).items()}
                    )
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if path.startswith("/v1") and key is not None and said != f"Bearer {key}":
                    self.send_response(401, f"no such key: {said}")
                elif answer is None or isinstance(answer, int):
                    self.send_response(answer or 404)
                else:
                    self.send_response(200)
                self.end_headers()
                self.wfile.write(answer.encode() if isinstance(answer, str) else b"")

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Go away, as a server that is killed."""
        self._server.shutdown()
        self._server.server_close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def fake_python(folder: Path) -> Path:
    """A "Python with vLLM" whose ``vllm bench serve`` simulates the trace: see ``bench``.

    It is a program of its own, which lets this process do the work: what it needs is imported here already.
    """
    file = folder / "python"
    file.write_text(
        f"""#!{sys.executable} -IS
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {_benches()})) as here:
    stream = here.makefile("rw")
    print(json.dumps([sys.argv, {{**os.environ}}]), file=stream, flush=True)
    code, said = json.loads(stream.readline())
print(said)
sys.exit(code)
"""
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@cache
def _benches() -> int:
    """The port where this process does what a ``fake_python`` is asked for."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(json.dumps(bench(*json.loads(self.rfile.readline()))).encode() + b"\n")

    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def bench(argv: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Write the result that a server would give that is the scenario $FAKE_SCENARIO, $FAKE_SLOWER times as
    slow, and whose first $FAKE_CUT streams break off; $FAKE_SAYS makes it fail with that text. Exit code and
    what it prints."""
    if "bench" not in argv:
        return 0, "0.32.0"
    if text := environment.get("FAKE_SAYS"):
        return 1, text.replace("KEY", environment.get("OPENAI_API_KEY", ""))

    def option(name: str) -> str:
        return argv[argv.index(name) + 1]

    bound = int(option("--max-concurrency")) if "--max-concurrency" in argv else None
    stages = replayed(read_trace(Path(option("--dataset-path")), FORMATS["timed_trace"]), bound)
    slower = float(environment.get("FAKE_SLOWER", "1"))
    run = simulate(load(environment["FAKE_SCENARIO"]), seed=77, stages=stages)
    requests = run.requests.sort_values("sent")
    sent, tokens = requests["sent"].to_numpy(), requests["output_tokens"].to_numpy(copy=True)
    ttft = slower * (requests["first_token"].to_numpy() - sent)
    rest = slower * (requests["finish"].to_numpy() - requests["first_token"].to_numpy())
    end = float((sent + ttft + rest).max())
    cut = int(environment.get("FAKE_CUT", "0"))
    tokens[:cut], rest[:cut] = 1, 0.0
    result = {
        "completed": len(sent),
        "duration": end,
        "request_throughput": len(sent) / end,
        "output_throughput": float(tokens.sum()) / end,
        "request_rate": "inf",
        "max_concurrency": bound,
        "input_lens": requests["prompt_tokens"].tolist(),
        "output_lens": tokens.tolist(),
        "ttfts": ttft.tolist(),
        "itls": [
            [gap / (n - 1)] * (n - 1) if n > 1 else []
            for gap, n in zip(rest.tolist(), tokens.tolist(), strict=True)
        ],
        "start_times": (time.perf_counter() - end + sent).tolist(),
        "errors": [""] * len(sent),
    }
    (Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result))
    return 0, ""
