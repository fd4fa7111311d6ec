"""``python -m measure WHAT --out DIR ...``, from the folder that holds this one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import MeasureError

COMMANDS = {  # name -> module with add_arguments(parser) and run(args, other flags); its line in --help
    "kernels": ("kernels.measure", "Times of single kernels, with torch alone."),
    "engine": ("engine.measure", "Step times of a real vLLM engine, in one process."),
    "served": ("served", "What HTTP, API server and client add, from a served model."),
}
BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with one message on stderr."""
    parser = argparse.ArgumentParser(prog="measure", description="Measure the machine at hand.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="Flags that are not listed go to vLLM.",
            allow_abbrev=False,
        )
        import_module(f".{module}", __package__).add_arguments(command)
    args, others = parser.parse_known_args(arguments)
    module, _ = COMMANDS[args.command]
    try:
        code: int = import_module(f".{module}", __package__).run(args, others)
    except MeasureError as error:
        print(f"measure: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("measure: interrupted; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
