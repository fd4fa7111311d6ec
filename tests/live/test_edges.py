"""Servers, proxies, keys and exporters that are not as the usual ones are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from live_fakes import FakeServer, fake_python

from servecast import __main__ as cli
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario, load
from servecast.validate.live import drive as live_drive
from servecast.validate.live import telemetry
from servecast.validate.live.drive import Outcome, drive, predict
from servecast.validate.live.loads import Loads
from servecast.validate.live.misfit import refuse_misfit, replaced
from servecast.validate.live.target import Target, answers, proxy_latency_s, warm_up
from servecast.validate.live.telemetry import Prometheus, Sampler, get, gpu_sampler
from servecast.validate.live.truth import Truth, read_truth
from servecast.validate.parity.vllm_process import VllmProcess

KEY = "sk-very-secret"
CPU = {"gpu": "cpu"}
SCENARIO = """
schema_version: 1
name: tiny
model: {config: tiny/config.json}
gpu: {name: L4}
engine: {version: "0.32", max_num_seqs: 8, max_model_len: 1024, num_gpu_blocks_override: 900}
workload:
  prompt_tokens: 100
  output_tokens: 100
  arrivals: {kind: poisson, request_rate: 10}
  num_requests: 100
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny")
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    return path


# what breaks while it is written to


def test_a_vllm_process_that_has_ended_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"vllm": "0.32.0"}\'\necho out of memory >&2\nexit 3\n')
    python.chmod(0o755)
    with VllmProcess(python) as process:
        process._process.wait()
        scenario: Any = SimpleNamespace(to_json=lambda: "{}")
        with pytest.raises(InputError, match="ended with code 3: out of memory"):
            process.decide(scenario)


def test_a_pipe_that_is_not_our_output_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_arguments: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "build_app", lambda *_: broken)
    with pytest.raises(BrokenPipeError):
        cli.main([])


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from servecast.__main__ import main; sys.exit(main(['scenarios']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_answer_that_breaks_off_is_an_os_error() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            for _ in range(2):
                client, _address = server.accept()
                with client, client.makefile("rb") as asked:
                    # a socket that is closed before all was read resets the connection
                    header = dict(
                        line.lower().split(b": ") for line in iter(asked.readline, b"\r\n") if b": " in line
                    )
                    asked.read(int(header.get(b"content-length", b"0")))
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nvllm:")

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        with pytest.raises(OSError, match="IncompleteRead"):
            get(url)
        with pytest.raises(OSError, match="IncompleteRead"):
            telemetry.post_s(url, key=None, body=b"{}", timeout_s=5)


# keys and URLs


def test_white_space_around_a_key_is_not_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    with FakeServer(key=KEY) as server:
        target = Target(server.url, "tiny", "tiny", api_key_env="A_KEY")
        assert read_truth(target, CPU).served_model == "tiny"
        warm_up(target)


@pytest.mark.parametrize("text", ["", " \n", "sk-sch\u00e4tzchen", "sk-a\x1bb"])
def test_what_is_no_key_is_refused_and_not_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("A_KEY", text)
    with pytest.raises(InputError, match="A_KEY is empty or has characters") as caught:
        _ = Target("http://127.0.0.1:1", "tiny", "tiny", api_key_env="A_KEY").key
    assert "sk-" not in str(caught.value)


def test_a_refusal_that_tells_the_key_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    with FakeServer(key="sk-another") as server:
        target = Target(server.url, "tiny", "tiny", api_key_env="A_KEY")
        for question in (lambda: read_truth(target, CPU), lambda: warm_up(target)):
            with pytest.raises(InputError, match=r"no such key: Bearer \*\*\*") as caught:
                question()
            assert KEY not in str(caught.value)


def test_a_slash_at_the_end_of_an_url_is_not_doubled() -> None:
    with FakeServer() as server:
        target = Target(f"{server.url}/", "tiny", "tiny", engine_url=f"{server.url}//")
        proxy_latency_s(target, read_truth(target, CPU).served_model, times=1)
        warm_up(target)
    assert target.base_url == target.engine == server.url
    assert not any("//" in path for path, _ in server.asked)


# whether a server is there, and what it is


@pytest.mark.parametrize(
    ("health", "models", "there"),
    [
        *((200, 500, True), (401, 500, True), (403, 500, True), (500, 200, False), (503, 200, False)),
        *((404, 200, True), (404, 401, True), (404, 404, True), (404, 502, False)),
    ],
)
def test_a_server_is_there_when_it_answers(
    monkeypatch: pytest.MonkeyPatch, health: int, models: int, there: bool
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    with FakeServer(also={"/health": health, "/v1/models": models}) as server:
        assert answers(Target(server.url, "tiny", "tiny", api_key_env="A_KEY")) is there
        assert answers(Target("http://127.0.0.1:1", "tiny", "tiny", engine_url=server.url)) is there
    asked = set(server.asked)
    assert asked <= {("/health", None), ("/v1/models", None), ("/v1/models", f"Bearer {KEY}")}
    assert not answers(Target(server.url, "tiny", "tiny"))


def test_an_engine_need_not_list_its_models() -> None:
    with FakeServer() as front, FakeServer(also={"/v1/models": 404}) as engine:
        truth = read_truth(Target(front.url, "tiny", "tiny", engine_url=engine.url), CPU)
    assert (truth.version, truth.num_gpu_blocks, truth.served_model) == ("0.32.0", 900, None)
    with FakeServer() as front, pytest.raises(InputError, match="does not answer"):
        read_truth(Target(front.url, "tiny", "tiny", engine_url=engine.url), CPU)


def test_a_forwarded_port_is_not_taken_for_this_machine(file: Path) -> None:
    scenario = load(file)
    with FakeServer() as server:
        target = Target(server.url, "tiny", "tiny")
        assert read_truth(target, {"gpu": "NVIDIA L4"}).gpu == "NVIDIA L4"
        truth = read_truth(target, CPU)
    notes = refuse_misfit(truth, Deployment.of(scenario), None)
    assert "the server's GPU (not known here) is taken to be the scenario's, L4" in notes
    assert not Target("http://localhost.example.org", "m", "t").here
    assert not Target(server.url, "m", "t", engine_url="http://10.0.0.7:8000").here


def test_what_a_proxy_adds_is_without_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(HTTPConnection):
        def connect(self) -> None:
            time.sleep(0.1)
            super().connect()

    monkeypatch.setattr(telemetry, "HTTPSConnection", Slow)
    with FakeServer() as front, FakeServer() as engine:
        target = Target(front.url.replace("http:", "https:"), "tiny", "tiny", engine_url=engine.url)
        assert abs(proxy_latency_s(target, "tiny", times=5)) < 0.09


# whether a scenario is of a server


def info(**parts: Any) -> dict[str, Any]:
    known = {"model_config": {"dtype": "torch.bfloat16", "quantization": None}, "cache_config": {}}
    return known | {"parallel_config": {"data_parallel_size": 1}, "speculative_config": None} | parts


def truth_of(vllm_config: dict[str, Any]) -> Truth:
    with FakeServer(info=vllm_config) as server:
        return read_truth(Target(server.url, "tiny", "tiny"), CPU)


def met(file: Path, truth: Truth) -> Scenario:
    return load(file, truth.overrides())


def test_number_formats_are_the_servers(file: Path) -> None:
    file.write_text(SCENARIO.replace("engine: {", "engine: {quantization: fp8, dtype: auto, "))
    truth = truth_of(info(cache_config={"cache_dtype": "fp8"}))
    engine = met(file, truth).engine
    assert (engine.quantization, engine.kv_cache_dtype, engine.dtype) == (None, "fp8", "bfloat16")
    assert "the server's quantization is None, the scenario says fp8: the server's was taken" in replaced(
        truth, load(file)
    )
    with pytest.raises(InputError, match="kv_cache_dtype"):
        met(file, truth_of(info(cache_config={"cache_dtype": "nvfp4"})))
    with pytest.raises(InputError, match="quantization 'awq' quantises no weights by itself"):
        Deployment.of(met(file, truth_of(info(model_config={"quantization": "awq"}))))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size 2"),
        ({"parallel_config": {"data_parallel_size": 4}}, "data_parallel_size 4"),
    ],
)
def test_a_server_that_does_what_is_not_modelled_is_refused(
    file: Path, part: dict[str, Any], said: str
) -> None:
    truth = truth_of(info(**part))
    scenario = met(file, truth)
    with pytest.raises(InputError, match=f"runs with {said}, which is not modelled"):
        refuse_misfit(truth, Deployment.of(scenario), None)


def test_a_server_that_drafts_needs_a_scenario_that_does(file: Path) -> None:
    truth = truth_of(info(speculative_config={"method": "ngram"}))
    with pytest.raises(InputError, match=r"the server drafts with .*, the scenario not at all"):
        refuse_misfit(truth, Deployment.of(met(file, truth)), None)


@pytest.fixture
def compared(file: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], str]:
    """The notes on a served model whose config.json is the scenario's, changed."""

    def compare(change: Callable[[dict[str, Any]], Any]) -> str:
        config = json.loads((tmp_path / "tiny" / "config.json").read_text())
        (tmp_path / "served").mkdir(exist_ok=True)
        (tmp_path / "served" / "config.json").write_text(json.dumps(change(config)))
        scenario = load(file)
        truth = Truth("0.32.0", 900, {}, None, "tiny")
        return " ".join(refuse_misfit(truth, Deployment.of(scenario), tmp_path / "served"))

    return compare


def test_sizes_that_a_config_leaves_to_the_default_are_compared(
    file: Path, tmp_path: Path, compared: Callable[..., str]
) -> None:
    ours = tmp_path / "tiny" / "config.json"
    config = json.loads(ours.read_text())
    ours.write_text(json.dumps(config | {"num_key_value_heads": config["num_attention_heads"]}))
    assert "was compared" not in compared(
        lambda same: {name: value for name, value in same.items() if name != "num_key_value_heads"}
    )


def test_a_model_of_more_than_text_is_compared_by_its_text(compared: Callable[..., str]) -> None:
    def beside_vision(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
        named = {name: text[name] for name in ("hidden_size", "num_hidden_layers")}
        return {"model_type": "llava", "text_config": {**named, **changes}, "vision_config": {}}

    assert "text_config was compared" in compared(beside_vision)
    assert "model_type 'of_vl'" in compared(lambda text: beside_vision(text, model_type="of_vl"))
    with pytest.raises(InputError, match=r"in layers \(2, not 40\)"):
        compared(lambda text: beside_vision(text, num_hidden_layers=40))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"weight_bytes_each \(2, not 0\.515625\), linear_format \(, not int4\)",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weight_bytes_each \(2, not 1\)"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
    ],
)
def test_other_weights_of_the_same_sizes_are_refused(
    compared: Callable[..., str], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        compared(lambda config: config | change)


def test_a_served_config_that_is_cut_off_is_one_message(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"model_ty')
    scenario = load(file)
    with pytest.raises(InputError, match="cannot be read"):
        refuse_misfit(Truth("0.32.0", 900, {}, None, "tiny"), Deployment.of(scenario), tmp_path / "cut")


# GPUs


class FakeDriver(SimpleNamespace):
    """pynvml on a machine with four GPUs."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM = 1

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index > 3:
            raise self.NVMLError
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not uuid.startswith("GPU-"):
            raise self.NVMLError
        return uuid

    def __getattr__(self, name: str) -> Any:
        def read(handle: str, *_: Any) -> Any:
            self.read = handle
            many = SimpleNamespace(used=1 << 20, gpu=50)
            return many if name.endswith(("MemoryInfo", "Rates")) else 1000

        return read


@pytest.mark.parametrize(
    ("visible", "read"),
    [(None, "0"), ("2,3", "2"), ("GPU-abc", "GPU-abc"), ("", None), ("-1", None), ("7", None)],
)
def test_the_gpu_that_is_visible_is_read(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, read: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver := FakeDriver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sampler = gpu_sampler()
    if sampler is not None:
        sampler._read()
    assert (None if sampler is None else driver.read) == read


@pytest.fixture
def driven(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """A short load, driven against a server that is not vLLM."""
    monkeypatch.setenv("FAKE_SCENARIO", str(file))
    monkeypatch.setattr(live_drive, "gpu_sampler", lambda: Sampler(lambda: {"power_w": 70.0}, 0.001))
    scenario = load(file)
    deployment = Deployment.of(scenario)
    asked = Loads(deployment, max_rate=10.0, duration_s=3.0).at_rate(10.0, "rate")
    prediction = predict(asked, deployment, range(1), tmp_path / "out")

    def run(url: str, **options: Any) -> Outcome:
        target = Target(url, "tiny", str(tmp_path / "tiny"))
        return drive(asked, prediction, target, python=str(fake_python(tmp_path)), **options)

    return run


def test_the_gpu_of_this_machine_is_read_where_the_server_is_here(
    driven: Callable[..., Outcome], tmp_path: Path
) -> None:
    with FakeServer() as server:
        outcome = driven(server.url)
    assert outcome.problem is None
    assert outcome.gpu == {"power_w": 70.0}
    file = tmp_path / "out" / "rate-10" / "gpu.csv"
    assert len(pd.read_csv(file)) > 1
    file.unlink()
    assert driven("http://host.invalid:8000").gpu == {}
    assert not file.exists()


def test_means_are_of_the_time_in_between() -> None:
    frame = pd.DataFrame({"time_s": [0.0, 1.0, 2.0, 9.0], "a": [0.0, 4.0, 6.0, 0.0], "b": float("nan")})
    assert live_drive._means(frame, 0.5, 2.0) == {"a": 5.0}
    assert live_drive._means(frame, float("nan"), float("nan")) == {}


def test_a_load_that_takes_too_long_says_so(driven: Callable[..., Outcome]) -> None:
    with FakeServer() as server:
        outcome = driven(server.url, most_s=0.001)
        assert outcome.timed_out
        assert "not done after 0.001 s" in str(outcome.problem)
        assert not driven(server.url, most_s=600.0).timed_out


# Prometheus

GPU = {"gpu_util_pct": 37.0, "gpu_memory_mib": 1234.0}


class FakePrometheus(FakeServer):
    """Has one engine, scraped every ``every_s``, and GPUs, which the labels find or not."""

    def __init__(self, *, gpus: int = 1, labelled: bool = False, every_s: float = 1.0) -> None:
        self.gpus, self.labelled, self.every_s = gpus, labelled, every_s
        names = ("query", "query_range")
        super().__init__(also={f"/api/v1/{name}": self._answer for name in names})

    def _answer(self, query: dict[str, str]) -> str:
        name, scraped = query["query"], time.time() // self.every_s * self.every_s
        if "timestamp" in name:
            result = [{"value": [0, str(scraped)]}]
        elif "start" not in query:
            result = [{"value": [0, "1"]}]
        else:
            first, last = float(query["start"]), float(query["end"])
            times = [first + step for step in range(int(last - first) + 1)]
            if name.startswith("DCGM"):
                values = [
                    [at, str(GPU["gpu_util_pct" if "UTIL" in name else "gpu_memory_mib"])] for at in times
                ]
                result = [{"values": values}] * (self.gpus if self.labelled or "{" not in name else 0)
            else:  # its value is the time of its scrape
                values = [[at, str(min(at, scraped) // self.every_s * self.every_s)] for at in times]
                result = [{"values": values}]
        return json.dumps({"data": {"result": result}})


@pytest.mark.parametrize("labelled", [True, False])
def test_the_gpu_is_found_with_the_engines_labels_or_without(labelled: bool) -> None:
    with FakePrometheus(labelled=labelled) as server:
        frame = Prometheus(server.url, {"job": "vllm"}).frame(1000.0, 1002.0)
    assert {name: set(frame[name]) for name in GPU} == {name: {value} for name, value in GPU.items()}


def test_several_gpus_are_left_out_and_said() -> None:
    with FakePrometheus(gpus=2) as server:
        frame, notes = Prometheus(server.url, {"job": "vllm"}).of_load(time.time() - 3, time.time() - 2)
    assert not GPU.keys() & set(frame)
    assert notes == ["left out, since Prometheus knows several GPUs: gpu_util_pct, gpu_memory_mib"]


def test_counters_are_read_when_they_are_scraped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakePrometheus(every_s=2.0) as server:
        prometheus, over = Prometheus(server.url), time.time()
        frame, notes = prometheus.of_load(over - 5, over)
        assert notes == []
        assert len(frame) > 5
        before, after = frame[frame["time_s"] <= over], frame[frame["time_s"] > over]
        assert (before["queued"] <= over).all()
        assert (after["queued"] > over).all()
        monkeypatch.setattr(telemetry, "SCRAPED_WITHIN_S", 0.0)
        server.every_s = 1e6
        _, notes = prometheus.of_load(over - 5, time.time())
        assert notes == ["Prometheus did not scrape the engine after the load: its counters lack the end"]


def test_an_exporters_gpu_is_of_the_outcome(driven: Callable[..., Outcome]) -> None:
    with FakeServer() as server, FakePrometheus() as asked:
        outcome = driven(server.url, prometheus=Prometheus(asked.url))
    assert outcome.problem is None
    assert outcome.gpu == {**GPU, "power_w": 70.0}
