"""The ``servecast`` command. Each subcommand is imported when it is asked for."""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from importlib.util import find_spec

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError, UnknownCommandError

from servecast.sim.inputs.errors import InputError

COMMANDS = {  # name -> where it is, and its line in --help
    "simulate": ("servecast.sim.cli.simulate:simulate", "Run a scenario once, in simulated time."),
    "plan": ("servecast.sim.cli.plan:plan", "Find the largest request rate that meets the SLOs."),
    "reproduce": ("servecast.sim.cli.reproduce:reproduce", "Compare predictions with a reported benchmark."),
    "compare": ("servecast.sim.cli.compare:compare", "Put two results, scenarios or routers side by side."),
    "sweep": ("servecast.sim.cli.sweep:sweep", "Run a grid of what-ifs, in parallel."),
    "optimize": (
        "servecast.sim.cli.optimize:optimize",
        "Find the cheapest deployment for a rate within the SLOs.",
    ),
    "day": ("servecast.sim.cli.day:day", "A day by the hour: latency, replicas, autoscalers."),
    "check": ("servecast.validate.check.command:check", "Can this benchmark report be true?"),
    "explain": ("servecast.sim.cli.explain:explain", "Why is the first token slow?"),
    "init": ("servecast.sim.cli.init:init", "Write a scenario to begin with, from a pasted command."),
    "scenarios": ("servecast.sim.cli.lists:scenarios", "List the shipped scenarios."),
    "gpus": ("servecast.sim.cli.lists:gpus", "List the GPUs, and what is known of each."),
    "models": ("servecast.sim.cli.lists:models", "List the models and families."),
    "profiles": ("servecast.sim.cli.lists:profiles", "List the shipped profiles."),
    "calibrate": ("servecast.calibrate.cli:app", "Turn measurements or reports into a profile."),
    "validate": ("servecast.validate.cli:app", "Judge the simulator against vLLM itself."),
}

BAD_INPUT, INTERRUPTED = 2, 130


def build_app(told: Collection[str] = ()) -> App:
    """The command line as cyclopts sees it.

    Args:
        told: commands whose help is their own, whole; of the others it is a line, which imports nothing.
    """
    app = App(
        name="servecast",
        help="Forecast LLM serving: what a model, a GPU and vLLM's flags can serve, and at what latency.",
        version=_version,
        help_formatter="default" if sys.stdout.isatty() else "plain",
        help_format="markdown",
        default_parameter=Parameter(negative=()),
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_int_as_exit_code_else_zero",
    )
    for name, (path, text) in COMMANDS.items():
        app.command(path, name=name, help=None if name in told else text)
    app.register_install_completion_command(
        help="Let the shell complete commands and flags (bash, zsh, fish)."
    )
    return app


def _version() -> str:
    """The version, and whether the engine was compiled where it is installed."""
    engine = find_spec("servecast.sim.engine.scheduler")
    compiled = engine is not None and str(engine.origin).endswith(tuple(EXTENSION_SUFFIXES))
    return f"{version('servecast')} (engine {'compiled' if compiled else 'interpreted: slower'})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: good; 1: the verdict is a fail; 2: bad input, with one message on stderr; 3: inconclusive.

    Args:
        arguments: instead of the process's own.
    """
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        told = COMMANDS if words[:1] == ["--install-completion"] else words[:1]
        if arguments is None:
            _import(words[:1])
        code: int = build_app(told)(words)
        sys.stdout.flush()
        return code
    except (CycloptsError, InputError) as error:
        print(f"servecast: {_message(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("servecast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _import(names: Sequence[str]) -> None:
    """What the commands need, without looking through it for garbage, now or later: a tenth of the start."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # 2**16 cycles: idle threads burn 2**26 without
    gc.disable()
    for name in names:
        if name in COMMANDS:
            import_module(COMMANDS[name][0].partition(":")[0])
    gc.freeze()
    gc.enable()


def _nobody_reads() -> bool:
    """Whether the reader of our output went away, as head does."""
    output = select.poll()
    output.register(sys.stdout, 0)  # what is broken is told unasked
    return bool(output.poll(0))


def _message(error: CycloptsError | InputError) -> str:
    """One message. cyclopts would import every command to suggest one."""
    if isinstance(error, UnknownCommandError) and not error.command_chain:
        from servecast.sim.inputs.schema import did_you_mean  # only now: it brings pydantic

        word = (error.unused_tokens or [""])[0]
        known = f"Known are {', '.join(COMMANDS)}."
        return f"there is no command {word!r}. {did_you_mean(word, COMMANDS) or known}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
