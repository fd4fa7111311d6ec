"""A server of our own: started for a live run, and ended with it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servecast.calibrate.measure.vllm.server import VllmServer, recording
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Model
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.validate.live.target import Target

_NOT_FLAGS = ("version", "policy", "assume_rules", "command", "batch_wait_s")
_DEV = {"VLLM_SERVER_DEV_MODE": "1"}  # makes GET /server_info say how all flags were resolved


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


def model_folder(serve: Path) -> Path:
    """The folder of a model to serve, from wherever the server is started.

    Raises:
        InputError: it has no config.json.
    """
    if not (serve / "config.json").is_file():
        raise InputError("has no config.json", where=f"--serve {serve}", fix="Give the folder of a model.")
    return serve.absolute()


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
    with server:
        assert server.pid is not None
        yield Started(Target(server.base_url, served, str(own.model), own=True), file, server.pid)


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
        elif isinstance(value, Model):
            flags += [f"--{flag}", value.model_dump_json(exclude_unset=True)]
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
