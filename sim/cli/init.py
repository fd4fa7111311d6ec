"""``servecast init``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.scenario.starter import starter


def init(
    command: Annotated[str, Parameter(allow_leading_hyphen=True)],  # a dash is no option
    /,
    *,
    gpu: str = "H100",
    output: Path | None = None,
) -> None:
    """Write a commented scenario to begin with, from a pasted command.

    Args:
        command: the command in quotes, as "vllm serve Qwen/Qwen3-8B -tp 2", a docker run line, or a
            container's arguments. A dash reads it from standard input.
        gpu: name of the GPU that it runs on.
        output: YAML file to write; without it the text is printed.
    """
    text = starter(sys.stdin.read() if command == "-" else command, gpu)
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise InputError(f"{str(output)!r} is there", where="--output", fix="Give another path.")
    write_whole(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"Scenario: {output}")
