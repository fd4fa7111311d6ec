"""``measure served``: what stands between client and engine, from requests through a real server."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .engine.measure import FILE, model_config
from .errors import MeasureError
from .facts import collect
from .folder import Budget, Folder, Progress, Row
from .vllm.bench_serve import Server, run_bench
from .vllm.recording import parse_recording
from .vllm.server import VllmServer, recording
from .vllm.tiny_model import write_tokenizer

WAVES = 4  # requests sent per request in progress
SHORTEST = 32  # prompt tokens; each request has one more than the one before, which tells them apart
OUTPUT_TOKENS = 64
MOST_VALUES = 2000  # of one row; more are thinned out evenly
FLUSH_S = 1.0  # longer than the recorder waits with writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--name", help="the model's name in the rows; the folder's name without it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the measurements")
    parser.add_argument("--time-budget", type=float, metavar="S", help="stop cleanly after S seconds")
    parser.add_argument("--resume", action="store_true", help="go on in a folder, skipping what it has")
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128],
        help="requests in progress (1 8 32 128)",
    )


def run(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Measure and return 0. ``flags`` are all that the parser did not know, for ``vllm serve``."""
    if min(args.concurrency) < 1:
        raise MeasureError(f"{min(args.concurrency)} requests", "--concurrency", "Give at least 1.")
    budget = Budget(args.time_budget)
    model_config(args.model)
    name = args.name or args.model.resolve().name
    with Folder(args.out, FILE, collect(), resume=args.resume) as folder:
        todo = [c for c in args.concurrency if _case(name, c) not in folder.cases]
        with tempfile.TemporaryDirectory() as work:
            _serve(Path(work), folder, name, args.model, todo, budget, flags)
    return 0


def _serve(
    work: Path,
    folder: Folder,
    name: str,
    model: Path,
    todo: Sequence[int],
    budget: Budget,
    flags: Sequence[str],
) -> None:
    served, file = _with_tokenizer(model, work / "model"), work / "recording.jsonl"
    recorded, variables = recording(file)
    # like other measurements: no prefix hits. The engine's log is kept for a start that fails
    args = [*flags, "--load-format", "dummy", "--served-model-name", name, *recorded]
    log = folder.path / "served.log"
    with VllmServer(served, [*args, "--no-enable-prefix-caching"], log=log, env=variables) as server:
        progress = Progress(len(todo), budget)
        took = 0.0
        for index, concurrency in enumerate(todo):
            if not budget.fits(took):
                print(
                    f"the time budget is spent: {index} of {len(todo)} concurrencies measured",
                    file=sys.stderr,
                )
                return
            begin = time.monotonic()
            trace = work / f"trace-{concurrency}.jsonl"
            _write_trace(trace, WAVES * max(4, concurrency))
            result = run_bench(
                Server(server.base_url, name, str(served)),
                trace,
                work / f"result-{concurrency}.json",
                args=["--max-concurrency", str(concurrency)],
            )
            time.sleep(FLUSH_S)
            rows = list(overheads(result, file.read_text(encoding="utf-8"), concurrency))
            folder.add(
                *(
                    {"model": name, "case": f"{_case(name, concurrency)}/{n}"} | row
                    for n, row in enumerate(rows[1:])
                ),
                {"model": name, "case": _case(name, concurrency)} | rows[0],
            )
            took = time.monotonic() - begin
            progress.done(f"{concurrency} requests in progress")


def _case(name: str, concurrency: int) -> str:
    return f"{name}/served/c{concurrency}"


def _with_tokenizer(model: Path, folder: Path) -> Path:
    """The model's folder, or one with its config and a made-up tokenizer if it has none."""
    if (model / "tokenizer.json").exists() or (model / "tokenizer.model").exists():
        return model
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    config = model_config(model)
    write_tokenizer(folder, vocab_size=config.get("vocab_size"))
    return folder


def _write_trace(file: Path, requests: int) -> None:
    """Requests that are all there at once, each with a length and content of its own."""
    with file.open("w", encoding="utf-8") as out:
        fresh = 0
        for number in range(requests):
            prompt = SHORTEST + number
            blocks = -(-prompt // 16)
            row = {
                "timestamp": 0.0,
                "input_length": prompt,
                "output_length": OUTPUT_TOKENS,
                "hash_ids": list(range(fresh, fresh + blocks)),
            }
            fresh += blocks
            out.write(json.dumps(row) + "\n")


def overheads(result: dict[str, Any], recorded: str, concurrency: int) -> Iterator[Row]:
    """Rows from a benchmark's detailed result and the recording of its server, both on one clock.

    A recording may hold earlier runs; the last requests are taken to be this one's. Requests are told apart
    by their prompt's length. The first row is that of request_in; then one row of token_out for each number
    of tokens that left the engine in a step, first tokens and later ones apart. Requests whose tokens did
    not come one in an event (the server merges them when the client lags) count with their first only.

    Raises:
        MeasureError: the two do not belong together.
    """
    requests = len(result["start_times"])
    received, delivered = _engine_side(recorded, requests)
    into, out = [], defaultdict[tuple[bool, int], list[float]](list)
    details = zip(result["input_lens"], result["start_times"], result["ttfts"], result["itls"], strict=True)
    for prompt, start, ttft, itls in details:
        if prompt not in received or not ttft:
            continue  # failed
        into.append(received[prompt] - start)
        clock = start + ttft
        tokens = delivered[prompt]
        out[True, tokens[0][1]].append(clock - tokens[0][0])
        if len(itls) == len(tokens) - 1:
            for gap, (left, burst) in zip(itls, tokens[1:], strict=True):
                clock += gap
                out[False, burst].append(clock - left)
    if not into or min(into) < 0 or min(min(times) for times in out.values()) < 0:
        raise MeasureError(
            "a request reached the engine before it was sent, or none did",
            "the server's recording",
            "Run client and server on one machine.",
        )
    yield {"row": "overhead", "kind": "request_in", "concurrency": concurrency, "times_s": _thin(into)}
    for (first, burst), times in sorted(out.items(), key=lambda item: (not item[0][0], item[0][1])):
        yield {
            "row": "overhead",
            "kind": "token_out",
            "concurrency": concurrency,
            "first": first,
            "burst": burst,
            "times_s": _thin(times),
        }


def _engine_side(recorded: str, requests: int) -> tuple[dict[int, float], dict[int, list[tuple[float, int]]]]:
    """Of the last requests by prompt length: when each was received, and when each token left, s.

    Tokens come with how many left in the same step.
    """
    run = parse_recording(recorded)
    delivered = defaultdict[int, list[tuple[float, int]]](list)
    for step in run.steps:
        if step.ended is not None:
            done = [
                n for n, tokens, before in step.scheduled if before + tokens >= run.requests[n].prompt_tokens
            ]
            for n in done:
                delivered[n].append((step.ended / 1e9, len(done)))
    last = {n: added for n, added in run.requests.items() if n >= len(run.requests) - requests}
    return (
        {added.prompt_tokens: added.received / 1e9 for added in last.values()},
        {added.prompt_tokens: delivered[n] for n, added in last.items()},
    )


def _thin(times: list[float]) -> list[float]:
    step = -(-len(times) // MOST_VALUES)
    return [round(value, 7) for value in times[::step]]
