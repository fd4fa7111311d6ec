"""``measure served``: what stands between client and engine, from requests through a real server."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.measure import FILE, model_config
from .errors import MeasureError
from .facts import collect
from .folder import Budget, Folder, Progress, Row, say
from .folder import add_arguments as add_shared_arguments
from .turns import TURNS, complaints, in_turn
from .vllm.bench_serve import Server, run_bench
from .vllm.recording import parse_recording
from .vllm.server import VllmServer, recording
from .vllm.tiny_model import write_tokenizer

WAVES, LEAST = 3, 12  # requests sent in a turn: per request in progress, and at least
WARM_UP = 4  # requests before a turn that are not counted, at most: connections and what is done once
SHORTEST = 32  # prompt tokens; each request has one more than the one before, which tells them apart
LONGER = 1024  # prompt tokens more than that of the requests that tell what one costs, at most
OUTPUT_TOKENS = 64  # on average, see ``_write_trace``
STRIDE = 7  # from one request's output to the next one's, modulo their range
MOST_VALUES = 2000  # of one row; more are thinned out evenly
FLUSH_S = 1.0  # longer than the recorder waits with writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--name", help="the model's name in the rows; the folder's name without it")
    add_shared_arguments(parser)
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
    with (
        Folder(args.out, FILE, collect(), resume=args.resume) as folder,
        tempfile.TemporaryDirectory() as work,
    ):
        _serve(Path(work), folder, name, args.model, args.concurrency, budget, flags)
    return 0


def _serve(
    work: Path,
    folder: Folder,
    name: str,
    model: Path,
    levels: Sequence[int],
    budget: Budget,
    flags: Sequence[str],
) -> None:
    served, file = _with_tokenizer(model, work / "model"), work / "recording.jsonl"
    recorded, variables = recording(file)
    # like other measurements: no prefix hits. The engine's log is kept for a start that fails
    args = [*flags, "--load-format", "dummy", "--served-model-name", name, *recorded]
    log = folder.path / "served.log"
    turns = _turns(row for row in folder.rows if row.get("model") == name)
    with VllmServer(served, [*args, "--no-enable-prefix-caching"], log=log, env=variables) as server:
        front_end = FrontEnd(Server(server.base_url, name, str(served)), file)
        progress = Progress(TURNS * len(levels) - sum(map(len, turns.values())), budget)
        began = time.monotonic()
        for level, turn, rows in in_turn(levels, lambda c, n: front_end.measure(work, c, n), turns):
            case = f"{name}/served/c{level}/turn{turn}"
            folder.add(*({"model": name, "case": f"{case}/{n}"} | row for n, row in enumerate(rows)))
            turns[level][turn] = rows
            progress.done(f"{level} requests in progress, turn {turn}")
            took, began = time.monotonic() - began, time.monotonic()
            if not budget.fits(took):
                done = sum(map(len, turns.values()))
                say(f"the time budget is spent: {done} turns measured")
                break
        else:
            if not any(row.get("more_tokens") for row in folder.rows if row.get("model") == name):
                rows = front_end.measure_prompts(work, _longer(model_config(model), flags))
                folder.add(
                    *({"model": name, "case": f"{name}/served/prompts/{n}"} | r for n, r in enumerate(rows))
                )
    for complaint in complaints(turns):
        say(f"{complaint}. Measure again on a machine that does nothing else")


def _turns(rows: Iterable[Row]) -> defaultdict[int, dict[int, Sequence[Row]]]:
    """Rows of overheads by requests in progress and turn."""
    found: defaultdict[int, dict[int, Sequence[Row]]] = defaultdict(dict)
    for row in rows:
        if row["row"] == "overhead" and not row.get("more_tokens"):
            of, turn = found[row["concurrency"]], row.get("turn", 0)
            of[turn] = [*of.get(turn, ()), row]
    return found


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What stands before the engine of a server that runs on this machine and writes a recording.

    Attributes:
        server: as ``run_bench`` takes it. recording: its recorder's file.
        output_tokens: of a request, on average. python: that has vllm.
    """

    server: Server
    recording: Path
    output_tokens: int = OUTPUT_TOKENS
    python: str | Path = sys.executable

    def measure(self, work: Path, concurrency: int, turn: int) -> list[Row]:
        """Rows of one turn: a closed loop of ``concurrency`` requests. ``work``: folder for its files."""
        return [row | {"turn": turn} for row in self._closed_loop(work, concurrency, turn, SHORTEST)]

    def measure_prompts(self, work: Path, more_tokens: int) -> list[Row]:
        """Rows of long prompts, one at a time: on their way in they take longer than short ones by what their
        tokens cost. ``more_tokens``: than the others have."""
        rows = self._closed_loop(work, 1, 0, SHORTEST + more_tokens)
        return [row | {"more_tokens": more_tokens} for row in rows if row["kind"] == "request_in"]

    def _closed_loop(self, work: Path, concurrency: int, turn: int, shortest: int) -> list[Row]:
        trace = work / f"closed-{concurrency}-{turn}-{shortest}.jsonl"
        _write_trace(trace, max(LEAST, WAVES * concurrency), self.output_tokens, shortest)
        result = run_bench(
            self.server,
            trace,
            trace.with_suffix(".json"),
            python=self.python,
            args=["--max-concurrency", str(concurrency), "--num-warmups", str(min(concurrency, WARM_UP))],
            hash_seed=1000 * turn + concurrency + shortest - SHORTEST,  # prompts of its own
        )
        time.sleep(FLUSH_S)
        recorded = self.recording.read_text(encoding="utf-8")
        return list(overheads(result, recorded, concurrency))


def _longer(config: Mapping[str, Any], flags: Sequence[str]) -> int:
    """How many tokens more a long prompt may have: a quarter of what the server takes, at most ``LONGER``."""
    longest = config.get("max_position_embeddings") or 4 * LONGER
    if "--max-model-len" in flags[:-1]:
        longest = flags[flags.index("--max-model-len") + 1]
    return min(LONGER, int(longest) // 4)


def _with_tokenizer(model: Path, folder: Path) -> Path:
    """The model's folder, or one with its config and a made-up tokenizer if it has none."""
    if (model / "tokenizer.json").exists() or (model / "tokenizer.model").exists():
        return model
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    config = model_config(model)
    write_tokenizer(folder, vocab_size=config.get("vocab_size"))
    return folder


def _write_trace(file: Path, requests: int, output_tokens: int, shortest: int) -> None:
    """Requests that are all there at once, each with a length (from ``shortest`` on) and content of its own.

    Their outputs differ too, by up to half either way: a closed loop of equal requests stays in lockstep, in
    which all of them are prepared, and get their first tokens, at a time, while the engine is idle. Traffic
    does not come so: what requests then queue for is no cost of one, and what an engine that runs takes from
    the front end is not seen.
    """
    with file.open("w", encoding="utf-8") as out:
        fresh = 0
        for number in range(requests):
            prompt = shortest + number
            blocks = -(-prompt // 16)
            row = {
                "timestamp": 0.0,
                "input_length": prompt,
                "output_length": output_tokens // 2 + number * STRIDE % (output_tokens + 1),
                "hash_ids": list(range(fresh, fresh + blocks)),
            }
            fresh += blocks
            out.write(json.dumps(row) + "\n")


def overheads(result: dict[str, Any], recorded: str, concurrency: int) -> Iterator[Row]:
    """Rows from a benchmark's detailed result and the recording of its server, both on one clock.

    A recording may hold earlier runs; the last requests are taken to be this one's. Requests are told apart
    by their prompt's length. There is a row of request_in for each number of requests that were on their way
    in at a time, and one of token_out for each number of tokens (and of first ones among them) that left the
    engine in a step, first tokens and later ones apart. Requests whose tokens did not come one in an event
    (the server merges them when the client lags) count with their first only.

    Raises:
        MeasureError: the two do not belong together.
    """
    requests = len(result["start_times"])
    received, delivered = _engine_side(recorded, requests)
    ways, out = list[tuple[float, float]](), defaultdict[tuple[bool, int, int], list[float]](list)
    lumped = 0
    details = zip(result["input_lens"], result["start_times"], result["ttfts"], result["itls"], strict=True)
    for prompt, start, ttft, itls in details:
        if prompt not in received or not ttft:
            continue  # failed
        ways.append((start, received[prompt]))
        clock = start + ttft
        tokens = delivered[prompt]
        out[True, *tokens[0][1:]].append(clock - tokens[0][0])
        if len(itls) == len(tokens) - 1:
            for gap, (left, burst, firsts) in zip(itls, tokens[1:], strict=True):
                clock += gap
                out[False, burst, firsts].append(clock - left)
        else:
            lumped += 1
    if not ways or min(end - start for start, end in ways) < 0 or min(map(min, out.values())) < 0:
        raise MeasureError(
            "a request reached the engine before it was sent, or none did",
            "the server's recording",
            "Run client and server on one machine.",
        )
    shared = {"row": "overhead", "concurrency": concurrency, "lumped": round(lumped / len(ways), 3)}
    into = defaultdict[int, list[float]](list)
    starts, ends = sorted(start for start, _ in ways), sorted(end for _, end in ways)
    for start, end in ways:
        into[bisect_left(starts, end) - bisect_right(ends, start)].append(end - start)
    for burst, times in sorted(into.items()):
        yield shared | {"kind": "request_in", "burst": burst, "times_s": _thin(times)}
    for (first, burst, firsts), times in sorted(out.items(), key=lambda item: (not item[0][0], item[0][1:])):
        of = {"first": first, "burst": burst, "firsts": firsts}
        yield shared | {"kind": "token_out"} | of | {"times_s": _thin(times)}


def _engine_side(
    recorded: str, requests: int
) -> tuple[dict[int, float], dict[int, list[tuple[float, int, int]]]]:
    """Of the last requests by prompt length: when each was received, and when each token left, s.

    Tokens come with how many left in the same step, and how many of these were a request's first.
    """
    run = parse_recording(recorded)
    delivered = defaultdict[int, list[tuple[float, int, int]]](list)
    for step in run.steps:
        if step.ended is None:
            continue
        done = [n for n, tokens, before in step.scheduled if before + tokens >= run.requests[n].prompt_tokens]
        firsts = sum(n not in delivered for n in done)
        for n in done:
            delivered[n].append((step.ended / 1e9, len(done), firsts))
    last = {n: added for n, added in run.requests.items() if n >= len(run.requests) - requests}
    return (
        {added.prompt_tokens: added.received / 1e9 for added in last.values()},
        {added.prompt_tokens: delivered[n] for n, added in last.items()},
    )


def _thin(times: list[float]) -> list[float]:
    step = -(-len(times) // MOST_VALUES)
    return [round(value, 7) for value in times[::step]]
