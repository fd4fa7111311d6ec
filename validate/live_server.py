"""The server under test: started if it is our own, and what it is, read from itself before anything is
predicted of it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from servecast.calibrate.measure.errors import MeasureError
from servecast.calibrate.measure.server import VllmServer, recording
from servecast.sim.engine_flags import EngineFlags
from servecast.sim.errors import InputError
from servecast.validate.telemetry import cache_config, get

_NOT_FLAGS = ("version", "policy", "assume_rules", "command", "batch_wait_s")
_DEV = {"VLLM_SERVER_DEV_MODE": "1"}  # makes GET /server_info say how all flags were resolved
_SAID = {  # part of vLLM's configuration -> its fields that are fields of EngineFlags
    "scheduler_config": (
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
    "cache_config": ("enable_prefix_caching",),
    "parallel_config": ("tensor_parallel_size",),
    "model_config": ("enforce_eager",),
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is.

    Attributes:
        base_url: what the load goes to, a server or a proxy before it. model: the name that it serves.
        tokenizer: folder or name. endpoint: of completions.
        engine_url: the engine behind a proxy, which is asked what it is and for its /metrics.
        api_key_env: name of the variable with the key of base_url; the key itself is never kept.
    """

    base_url: str
    model: str
    tokenizer: str
    endpoint: str = "/v1/completions"
    engine_url: str | None = None
    api_key_env: str | None = None

    @property
    def engine(self) -> str:
        """URL of the engine itself."""
        return (self.engine_url or self.base_url).rstrip("/")

    @property
    def key(self) -> str | None:
        """The key of base_url, from the environment.

        Raises:
            InputError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        try:
            return os.environ[self.api_key_env]
        except KeyError:
            raise InputError(
                f"the environment has no {self.api_key_env}",
                where="--api-key-env",
                fix="Set it to the server's key.",
            ) from None


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
        yield Started(Target(server.base_url, served, str(own.model)), file, server.pid)
    finally:
        server.stop()


@dataclass(frozen=True, slots=True)
class Truth:
    """What a server says of itself; None, and a flag that is absent, is not said.

    flags: fields of EngineFlags. gpu: name by the driver, where it runs on this machine ("cpu" without
    one). served_model: the engine's own name of the model, which a proxy may call otherwise.
    """

    version: str | None
    num_gpu_blocks: int | None
    flags: Mapping[str, Any]
    gpu: str | None
    served_model: str | None

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
    served = _models(target.base_url, target.key)
    if target.model not in served:
        raise InputError(
            f"serves {', '.join(map(str, served)) or 'no model'}, not {target.model!r}",
            where=target.base_url,
            fix="Give one of them with --model.",
        )
    if target.engine_url is not None:
        served = _models(target.engine_url, None)
    one = target.model if target.model in served else next(iter(served), None)
    labels = _ask(lambda: cache_config(get(f"{target.engine}/metrics")), {})
    about = f"{target.engine}/server_info?config_format=json"  # it also lists packages and asks the driver
    info = _ask(lambda: json.loads(get(about, timeout_s=60))["vllm_config"], {})
    version = _ask(lambda: str(json.loads(get(f"{target.engine}/version"))["version"]).split("+")[0], None)
    flags = {
        name: value
        for part, names in _SAID.items()
        for name in names
        if (value := info.get(part, {}).get(name)) is not None
    }
    if policy := info.get("scheduler_config", {}).get("policy"):
        flags["scheduling_policy"] = policy
    if one is not None and served[one].get("max_model_len"):
        flags["max_model_len"] = int(served[one]["max_model_len"])
    if labels.get("block_size", "").isdecimal():
        flags["block_size"] = int(labels["block_size"])
    if labels.get("enable_prefix_caching") in ("True", "False"):
        flags["enable_prefix_caching"] = labels["enable_prefix_caching"] == "True"
    blocks = labels.get("num_gpu_blocks", "")
    here = any(f"//{host}" in target.engine for host in ("127.0.0.1", "localhost"))
    return Truth(
        version=version,
        num_gpu_blocks=int(blocks) if blocks.isdecimal() else None,
        flags=flags,
        gpu=str(facts["gpu"]) if here else None,
        served_model=one,
    )


def _models(url: str, key: str | None) -> dict[str, dict[str, Any]]:
    """The models that a server lists, by name."""
    where = f"{url.rstrip('/')}/v1/models"
    try:
        return {entry["id"]: entry for entry in json.loads(get(where, key=key))["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"does not answer as a server of models ({error})",
            where=where,
            fix="Is the server up, is the URL its own, and is the key right?",
        ) from None


def _ask(question: Any, otherwise: Any) -> Any:
    """What the server says, or ``otherwise``: not every release and proxy answers each question."""
    try:
        return question()
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def answers(target: Target) -> bool:
    """Whether the engine is still there."""
    try:
        get(f"{target.engine}/health")
    except (OSError, ValueError):
        return False
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
        _complete(
            target.base_url, target, target.model, f"{time.time()} {number}" + " a b" * 20, 8, target.key
        )


def proxy_latency_s(target: Target, truth: Truth, *, times: int = 15) -> float:
    """What the proxy at base_url adds to a request of one token, by asking it and the engine in turn, s.

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
            began = time.perf_counter()
            _complete(url, target, model, f"{time.time()} {number} {way}", 1, key)
            ways[way].append(time.perf_counter() - began)
    return statistics.median(ways[0]) - statistics.median(ways[1])


def _complete(url: str, target: Target, model: str, prompt: str, max_tokens: int, key: str | None) -> None:
    where = url.rstrip("/") + target.endpoint
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens}).encode()
    try:
        get(where, key=key, body=body, timeout_s=120)
    except (OSError, ValueError) as error:
        raise InputError(
            f"a short request failed ({error})",
            where=where,
            fix="Are model name, endpoint and key right? The endpoint is one of completions, not of chats.",
        ) from None
