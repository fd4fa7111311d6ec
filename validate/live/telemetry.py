"""What a server and its GPU say of themselves while they are driven: scraped from /metrics, asked from a
Prometheus server that scrapes it already, or read from the GPU's driver."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import pandas as pd
from prometheus_client.parser import text_string_to_metric_families

from servecast.sim.inputs.errors import InputError

# column -> vLLM's names of it, the newest first
METRICS: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "preemptions": ("vllm:num_preemptions_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    "queue_s": ("vllm:request_queue_time_seconds_sum",),
    "queued": ("vllm:request_queue_time_seconds_count",),
}
DCGM = {"gpu_util_pct": "DCGM_FI_DEV_GPU_UTIL", "gpu_memory_mib": "DCGM_FI_DEV_FB_USED"}
TIMEOUT_S = 5.0
SCRAPED_WITHIN_S = 60.0  # Prometheus' own default from scrape to scrape


def get(url: str, *, key: str | None = None, body: bytes | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """The text at a URL.

    Args:
        key: sent as a bearer token, and not to where the server may redirect. body: JSON to post.

    Raises:
        OSError: it cannot be had (urllib's errors are such).
        ValueError: the URL is none.
    """
    request = Request(url, body, {} if body is None else {"Content-Type": "application/json"})
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urlopen(request, timeout=timeout_s) as answer:
            text: str = answer.read().decode()
    except HTTPException as error:  # an answer that breaks off, or is none
        raise OSError(repr(error)) from None
    return text


def post_s(url: str, *, key: str | None, body: bytes, timeout_s: float) -> float:
    """How long the answer to JSON takes on a connection that is there already, s: one to the URL's own host,
    whatever proxies the environment names.

    Raises:
        OSError: there is no good answer. ValueError: the URL is none.
    """
    parts = urlsplit(url)
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection = connect(parts.netloc, timeout=timeout_s)
    try:
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", parts._replace(scheme="", netloc="").geturl(), body, headers)
        answer = connection.getresponse()
        answer.read()
        seconds = time.perf_counter() - began
    except HTTPException as error:
        raise OSError(repr(error)) from None
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"HTTP Error {answer.status}: {answer.reason}")
    return seconds


def parse_metrics(text: str) -> dict[str, float]:
    """The columns of METRICS in an exposition text, summed over engines; KV usage as their mean. NaN: absent.

    Raises:
        ValueError: it is no such text.
    """
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.value)
    known = {c: next((found[n] for n in names if n in found), [math.nan]) for c, names in METRICS.items()}
    return {c: sum(values) / (len(values) if c == "kv_usage" else 1) for c, values in known.items()}


def cache_config(text: str) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info``: num_gpu_blocks, block_size, ... Empty where it is absent."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return dict(sample.labels)
    return {}


class Sampler:
    """Calls ``read`` again and again from a thread of its own, for as long as a ``with`` block lasts.

    Attributes:
        rows: what ``read`` gave, each with ``time_s`` of time.perf_counter. failures: calls that failed.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]], interval_s: float) -> None:
        self._read, self._interval_s = read, interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.rows: list[dict[str, float]] = []
        self.failures = 0

    def _loop(self) -> None:
        while True:
            began = time.perf_counter()
            try:
                values = self._read()
            except (OSError, ValueError):
                self.failures += 1
            else:
                self.rows.append({"time_s": (began + time.perf_counter()) / 2, **values})
            if self._over.wait(max(0.0, began + self._interval_s - time.perf_counter())):
                return

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join(2 * TIMEOUT_S)

    def frame(self) -> pd.DataFrame:
        """The rows, by ``time_s``."""
        return pd.DataFrame(self.rows)


def scraper(metrics_url: str, *, interval_s: float = 0.25) -> Sampler:
    """Samples the columns of METRICS from a server's /metrics."""
    return Sampler(lambda: parse_metrics(get(metrics_url)), interval_s)


def gpu_sampler() -> Sampler | None:
    """Samples clocks, power, memory and use, by its driver and each second, of the first GPU that
    CUDA_VISIBLE_DEVICES leaves to us; None where there is none."""
    import pynvml  # only where a server is driven

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if first.isdecimal():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(first)
    except pynvml.NVMLError:
        return None

    def read() -> dict[str, float]:
        try:
            return {
                "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "gpu_memory_mib": pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
                "gpu_util_pct": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            }
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error

    return Sampler(read, 1.0)


class Prometheus:
    """A Prometheus server that scrapes the engine already.

    Args:
        url: of the server. labels: that pick the engine's series, as {"job": "vllm"}.

    Attributes:
        ambiguous: columns that the last frame leaves out, since several GPUs match.

    Raises:
        InputError: it does not answer as Prometheus does.
    """

    def __init__(self, url: str, labels: Mapping[str, str] | None = None) -> None:
        self._url = url.rstrip("/")
        pairs = ",".join(f"{name}={json.dumps(value)}" for name, value in (labels or {}).items())
        self._labels = "{" + pairs + "}"
        self.ambiguous: list[str] = []
        self._query("query", {"query": "vector(1)"})

    def _query(self, kind: str, parameters: Mapping[str, str]) -> list[Any]:
        try:
            answer = json.loads(get(f"{self._url}/api/v1/{kind}?{urlencode(parameters)}"))
            return list(answer["data"]["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"does not answer as Prometheus does ({error})",
                where=f"--prometheus-url {self._url}",
                fix="Give the URL of a Prometheus server, as http://127.0.0.1:9090.",
            ) from None

    def frame(self, start_unix_s: float, end_unix_s: float, step_s: float = 1.0) -> pd.DataFrame:
        """The columns of METRICS and DCGM that it has, by ``time_s`` in Unix time; NaN where it has nothing.

        The labels are the engine's: where they pick no series of a GPU, the GPU is looked for without them.

        Raises:
            InputError: it does not answer any more.
        """
        span = {"start": f"{start_unix_s:.3f}", "end": f"{end_unix_s:.3f}", "step": f"{step_s:g}"}
        columns: dict[str, pd.Series[float]] = {}
        for column, names in METRICS.items():
            of_all = "avg" if column == "kv_usage" else "sum"
            for name in names:
                found = self._query("query_range", {"query": f"{of_all}({name}{self._labels})", **span})
                if found:
                    columns[column] = _series(found[0])
                    break
        self.ambiguous = []
        for column, name in DCGM.items():
            for query in (name + self._labels, name):
                if found := self._query("query_range", {"query": query, **span}):
                    break
            if len(found) == 1:
                columns[column] = _series(found[0])
            elif found:
                self.ambiguous.append(column)
        return pd.DataFrame(columns).rename_axis("time_s").reset_index()

    def of_load(self, start_unix_s: float, end_unix_s: float) -> tuple[pd.DataFrame, list[str]]:
        """The frame of a load that is over, and behind it what was scraped later: counters at their last.
        Waits for that scrape. Second: what is missing, in words.

        Raises:
            InputError: it does not answer any more.
        """
        notes = []
        if not self._scraped_since(end_unix_s):
            notes.append("Prometheus did not scrape the engine after the load: its counters lack the end")
        now = time.time()
        frame = self.frame(start_unix_s, now + 1.0)
        if self.ambiguous:
            notes.append(f"left out, since Prometheus knows several GPUs: {', '.join(self.ambiguous)}")
        kept = frame[(frame["time_s"] <= end_unix_s) | (frame["time_s"] >= now)]
        return kept.reset_index(drop=True), notes

    def _scraped_since(self, unix_s: float) -> bool:
        """Whether it has scraped all engines since then, or does so in time."""
        query = {"query": f"min(timestamp(vllm:num_requests_running{self._labels}))"}
        deadline = time.monotonic() + SCRAPED_WITHIN_S
        while found := self._query("query", query):
            if float(found[0]["value"][1]) > unix_s:
                return True
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return False


def _series(found: Mapping[str, Any]) -> pd.Series[float]:
    return pd.Series({float(at): float(value) for at, value in found["values"]})
