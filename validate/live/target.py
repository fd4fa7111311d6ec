"""The server under test as its clients see it: where it is, whether it answers, and what a proxy adds."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit

from cyclopts import Parameter

from servecast.calibrate.measure.vllm.bench_serve import Server
from servecast.sim.inputs.errors import InputError
from servecast.validate.live.telemetry import get, post_s

T = TypeVar("T")
_HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


@dataclass(frozen=True, slots=True)
class Target(Server):
    """The server under test: what the load goes to, vLLM itself or a proxy before it.

    Attributes:
        base_url: of the server: vLLM itself, or a proxy in front of it.
        model: the name that it serves.
        tokenizer: the model's, a folder or a name; the model's name without it.
        endpoint: of completions (/v1/completions).
        api_key_env: the variable that holds the server's key.
        engine_url: of vLLM itself behind a proxy: what the proxy adds is then a figure of its own.
        own: whether it was started by us, and so runs here.
    """

    base_url: str = ""
    model: str = ""
    engine_url: str | None = None
    own: Annotated[bool, Parameter(parse=False)] = False

    def __post_init__(self) -> None:
        Server.__post_init__(self)
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


def without(key: str | None, text: str) -> str:
    """A text that does not tell the key."""
    return text.replace(key, "***") if key else text


def list_models(url: str, key: str | None) -> dict[str, dict[str, Any]]:
    """The models that a server lists, by name."""
    return {entry["id"]: entry for entry in json.loads(get(f"{url}/v1/models", key=key))["data"]}


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


def warm_up(target: Target, *, requests: int = 3) -> None:
    """A few short requests, so that no measured one pays for what the server does once.

    Raises:
        InputError: one is not answered.
    """
    for number in range(requests):
        prompt = f"{time.time()} {number}" + " a b" * 20
        _complete(get, target.base_url, target, target.model, prompt, 8, target.key)


def proxy_latency_s(target: Target, served_model: str | None, *, times: int = 15) -> float:
    """What the proxy at base_url adds to a request of one token, by asking it and the engine in turn, s.
    Handshakes are left out: the benchmark keeps its connections.

    Args:
        served_model: the engine's own name of the model, where it has another.

    Raises:
        InputError: one of the two does not answer.
    """
    ways: list[list[float]] = [[], []]
    for number in range(times):
        for way, (url, model, key) in enumerate(
            ((target.base_url, target.model, target.key), (target.engine, served_model or target.model, None))
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
