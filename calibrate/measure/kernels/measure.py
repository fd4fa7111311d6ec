"""``measure kernels``: the times of single kernels, with torch alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import MeasureError
from ..folder import add_arguments as add_shared_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        metavar="CONFIG",
        help="config.json (or its folder) of a model whose shapes to measure; typical ones without",
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=[], help="of the matrix products, the model's own first"
    )
    parser.add_argument("--max-tokens", type=int, default=16384, help="most tokens of a call (16384)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement, at least (7)")


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Time the kernels, the most useful first, and return 0; what is left out is said on stderr."""
    if others:
        raise MeasureError(f"unknown: {' '.join(others)}", "measure kernels", "See --help.")
    if args.max_tokens < 1 or args.repeats < 1:
        raise MeasureError("below 1", "--max-tokens, --repeats", "Give whole numbers from 1.")
    try:
        from .timed import time_kernels  # brings torch, which --help does not wait for
    except ImportError as error:
        raise MeasureError("torch is not installed", sys.executable, "Use a Python that has it.") from error
    time_kernels(args)
    return 0
