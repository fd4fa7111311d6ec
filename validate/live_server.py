"""The server under test: started if it is our own, and what it is, read from itself before anything is
predicted of it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit

from servecast.calibrate.measure.bench_serve import api_key
from servecast.calibrate.measure.errors import MeasureError
from servecast.calibrate.measure.server import VllmServer, recording
from servecast.sim.engine_flags import EngineFlags
from servecast.sim.errors import InputError
from servecast.validate.telemetry import cache_config, get, post_s

T = TypeVar("T")
_NOT_FLAGS = ("version", "policy", "assume_rules", "command", "batch_wait_s")
_DEV = {"VLLM_SERVER_DEV_MODE": "1"}  # makes GET /server_info say how all flags were resolved
_HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
_SAID = {  # part of vLLM's configuration -> its fields that are fields of EngineFlags
    "scheduler_config": (
        "policy",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_chunked_prefill",
        "async_scheduling",
        "scheduler_reserve_full_isl",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "watermark",
        "max_num_active_seqs",
        "stream_interval",
    ),
    "cache_config": ("enable_prefix_caching", "cache_dtype"),
    "parallel_config": ("tensor_parallel_size",),
    "model_config": ("enforce_eager", "dtype"),
}
_RENAMED = {"policy": "scheduling_policy", "cache_dtype": "kv_cache_dtype"}  # -> the field of EngineFlags


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is.

    Attributes:
        base_url: what the load goes to, a server or a proxy before it. model: the name that it serves.
        tokenizer: folder or name. endpoint: of completions.
        engine_url: the engine behind a proxy, which is asked what it is and for its /metrics.
        api_key_env: name of the variable with the key of base_url; the key itself is never kept.
        own: whether it was started by us, and so runs here.
    """

    base_url: str
    model: str
    tokenizer: str
    endpoint: str = "/v1/completions"
    engine_url: str | None = None
    api_key_env: str | None = None
    own: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        if self.engine_url is not None:
            object.__setattr__(self, "engine_url", self.engine_url.rstrip("/"))

    @property
    def engine(self) -> str:
        """URL of the engine itself."""
        return self.engine_url or self.base_url

    @property
    def here(self) -> bool:
        """Whether the engine is reached on this machine. It may run elsewhere: ports can be forwarded."""
        return urlsplit(self.engine).hostname in _HERE

    @property
    def key(self) -> str | None:
        """The key of base_url, from the environment.

        Raises:
            InputError: the variable is not set, or holds no key.
        """
        if self.api_key_env is None:
            return None
        try:
            return api_key(self.api_key_env)
        except MeasureError as error:
            raise InputError(error.what, where=error.where, fix=error.fix) from None


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A server to start: folder of the model, further flags of vllm serve, and the Python that has vllm.

    recorder: record each scheduling decision (costs some microseconds a step).
    """

    model: Path
    args: tuple[str, ...] = ()
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    recorder: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A server of our own that runs. recording: its recorder's file. group: of its processes."""

    target: Target
    recording: Path | None
    group: int


@contextmanager
def started(own: OwnServer, engine: EngineFlags, changes: Mapping[str, Any], out: Path) -> Iterator[Started]:
    """Our own server while the block lasts.

    Args:
        engine: whose flags it is started with. changes: fields of it that win over the server's own flags.
        out: folder of its log.

    Raises:
        InputError: it does not come up.
    """
    name = "-".join(["server", *(f"{field}-{value}" for field, value in changes.items())])
    args = [*serve_flags(engine), *own.args, *serve_flags(engine, changes)]
    env, file = _DEV | dict(own.env), None
    if own.recorder:
        file = out / f"{name}-recording.jsonl"
        flags, variables = recording(file)
        args += flags
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [env.get("PYTHONPATH"), variables["PYTHONPATH"]])
        )
        env |= variables
    served = own.model.name
    args += ["--served-model-name", served]
    server = VllmServer(own.model, args, log=out / f"{name}.log", python=own.python, env=env)
    try:
        server.__enter__()
    except MeasureError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from None
    try:
        assert server.pid is not None
        yield Started(Target(server.base_url, served, str(own.model), own=True), file, server.pid)
    finally:
        server.stop()


@dataclass(frozen=True, slots=True)
class Truth:
    """What a server says of itself; None, and a flag that is absent, is not said.

    flags: fields of EngineFlags. gpu: name by the driver, where it runs on this machine ("cpu" without
    one). served_model: the engine's own name of the model, which a proxy may call otherwise.
    not_modelled: flags that a scenario has not, where they are not what vLLM does without them.
    """

    version: str | None
    num_gpu_blocks: int | None
    flags: Mapping[str, Any]
    gpu: str | None
    served_model: str | None
    not_modelled: Mapping[str, Any] = field(default_factory=dict)

    def overrides(self) -> dict[str, Any]:
        """The fields of a scenario that the server's own word replaces."""
        found = {f"engine.{name}": value for name, value in self.flags.items()}
        if self.version is not None:
            found["engine.version"] = ".".join(self.version.split(".")[:2])
        if self.num_gpu_blocks is not None:
            found["engine.num_gpu_blocks_override"] = self.num_gpu_blocks
        return found

    def to_json(self) -> dict[str, Any]:
        """As it is written beside a result."""
        return asdict(self)


def read_truth(target: Target, facts: Mapping[str, Any]) -> Truth:
    """Ask a server what it is.

    Args:
        facts: of this machine (see calibrate.measure.facts.collect).

    Raises:
        InputError: the server does not answer, or does not serve that model.
    """
    try:
        served = _models(target.base_url, target.key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"does not answer as a server of models ({without(target.key, str(error))})",
            where=f"{target.base_url}/v1/models",
            fix="Is the server up, is the URL its own, and is the key right?",
        ) from None
    if target.model not in served:
        raise InputError(
            f"serves {', '.join(map(str, served)) or 'no model'}, not {target.model!r}",
            where=target.base_url,
            fix="Give one of them with --model.",
        )
    if target.engine_url is not None:
        if not answers(target):
            raise InputError("does not answer", where=target.engine_url, fix="Is it up, and the URL its own?")
        served = _ask(lambda: _models(target.engine, None), {})
    one = target.model if target.model in served else next(iter(served), None)
    labels = _ask(lambda: cache_config(get(f"{target.engine}/metrics")), {})
    about = f"{target.engine}/server_info?config_format=json"  # it also lists packages and asks the driver
    info = _ask(lambda: json.loads(get(about, timeout_s=60))["vllm_config"], {})
    version = _ask(lambda: str(json.loads(get(f"{target.engine}/version"))["version"]).split("+")[0], None)
    flags = _flags(info)
    if one is not None and served[one].get("max_model_len"):
        flags["max_model_len"] = int(served[one]["max_model_len"])
    if labels.get("block_size", "").isdecimal():
        flags["block_size"] = int(labels["block_size"])
    if labels.get("enable_prefix_caching") in ("True", "False"):
        flags["enable_prefix_caching"] = labels["enable_prefix_caching"] == "True"
    blocks = labels.get("num_gpu_blocks", "")
    known = target.own or (target.here and facts["gpu"] != "cpu")  # a port may be forwarded
    return Truth(
        version=version,
        num_gpu_blocks=int(blocks) if blocks.isdecimal() else None,
        flags=flags,
        gpu=str(facts["gpu"]) if known else None,
        served_model=one,
        not_modelled=_not_modelled(info),
    )


def _flags(info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of EngineFlags in vLLM's configuration."""
    flags = {
        _RENAMED.get(name, name): value
        for part, names in _SAID.items()
        for name in names
        if (value := info.get(part, {}).get(name)) is not None
    }
    if "dtype" in flags:
        flags["dtype"] = str(flags["dtype"]).removeprefix("torch.")
    model = info.get("model_config", {})
    if "quantization" in model:
        flags["quantization"] = model["quantization"]  # None says that the weights are as they are
    return flags


def _not_modelled(info: Mapping[str, Any]) -> dict[str, Any]:
    """Truth.not_modelled in vLLM's configuration."""
    sizes = ("pipeline_parallel_size", "data_parallel_size")
    parallel, speculative = info.get("parallel_config", {}), info.get("speculative_config")
    found = {name: size for name in sizes if (size := parallel.get(name, 1)) != 1}
    return found | ({"speculative_config": speculative.get("method")} if speculative else {})


def without(key: str | None, text: str) -> str:
    """A text that does not tell the key."""
    return text.replace(key, "***") if key else text


def _models(url: str, key: str | None) -> dict[str, dict[str, Any]]:
    """The models that a server lists, by name."""
    return {entry["id"]: entry for entry in json.loads(get(f"{url}/v1/models", key=key))["data"]}


def _ask(question: Any, otherwise: Any) -> Any:
    """What the server says, or ``otherwise``: not every release and proxy answers each question."""
    try:
        return question()
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def answers(target: Target) -> bool:
    """Whether the engine is still there: vLLM answers 503 where its engine is dead, others have no /health or
    do not open it to us."""
    for path, key in (("health", None), ("v1/models", target.key if target.engine_url is None else None)):
        try:
            get(f"{target.engine}/{path}", key=key)
        except HTTPError as error:
            if error.code != 404:
                return error.code < 500
        except (OSError, ValueError):
            return False
        else:
            return True
    return True


def serve_flags(engine: EngineFlags, fields: Iterable[str] | None = None) -> list[str]:
    """The command line flags of ``vllm serve`` that make a server what a scenario's engine says.

    Args:
        fields: of it; those that the scenario sets if None.
    """
    flags: list[str] = []
    for name in sorted(set(engine.model_fields_set if fields is None else fields) - set(_NOT_FLAGS)):
        value, flag = getattr(engine, name), name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def warm_up(target: Target, *, requests: int = 3) -> None:
    """A few short requests, so that no measured one pays for what the server does once.

    Raises:
        InputError: one is not answered.
    """
    for number in range(requests):
        prompt = f"{time.time()} {number}" + " a b" * 20
        _complete(get, target.base_url, target, target.model, prompt, 8, target.key)


def proxy_latency_s(target: Target, truth: Truth, *, times: int = 15) -> float:
    """What the proxy at base_url adds to a request of one token, by asking it and the engine in turn, s.
    Handshakes are left out: the benchmark keeps its connections.

    Raises:
        InputError: one of the two does not answer.
    """
    ways: list[list[float]] = [[], []]
    for number in range(times):
        for way, (url, model, key) in enumerate(
            (
                (target.base_url, target.model, target.key),
                (target.engine, truth.served_model or target.model, None),
            )
        ):
            prompt = f"{time.time()} {number} {way}"
            ways[way].append(_complete(post_s, url, target, model, prompt, 1, key))
    return statistics.median(ways[0]) - statistics.median(ways[1])


def _complete(
    ask: Callable[..., T], url: str, target: Target, model: str, prompt: str, max_tokens: int, key: str | None
) -> T:
    """A short request, sent by ``get`` or ``post_s``."""
    where = url + target.endpoint
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens}).encode()
    try:
        return ask(where, key=key, body=body, timeout_s=120)
    except (OSError, ValueError) as error:
        raise InputError(
            f"a short request failed ({without(key, str(error))})",
            where=where,
            fix="Are model name, endpoint and key right? The endpoint is one of completions, not of chats.",
        ) from None
