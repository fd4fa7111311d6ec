"""``vllm bench serve`` over a timed trace, as a subprocess: the load generator is vLLM's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MeasureError
from .ending import last_lines, signal_group, start
from .server import vllm_environment

BLOCK_TOKENS = 16  # of the traces that are written


class TookTooLongError(MeasureError):
    """The benchmark was ended since its time was up."""


def api_key(variable: str) -> str:
    """The key that an environment variable holds, without white space around it.

    Raises:
        MeasureError: it is not set, or a header cannot carry it. The message does not tell it.
    """
    key = os.environ.get(variable)
    if key is None:
        raise MeasureError(
            f"the environment has no {variable}", "--api-key-env", "Set it to the server's key."
        )
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        fix = "Set it to the server's key."
        raise MeasureError(f"{variable} is empty or has characters that no key has", "--api-key-env", fix)
    return key


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server as its clients reach it.

    Attributes:
        base_url: as http://127.0.0.1:8000. model: the name that it serves.
        tokenizer: the model's, a folder or a name; the model's name without it.
        endpoint: of completions.
        api_key_env: name of the variable that holds the server's key; the key itself is never kept.
    """

    base_url: str
    model: str
    tokenizer: str = ""
    endpoint: str = "/v1/completions"
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "tokenizer", self.tokenizer or self.model)

    @property
    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            MeasureError: the variable is not set, or holds no key.
        """
        return None if self.api_key_env is None else api_key(self.api_key_env)


def bench_command(
    server: Server,
    trace: Path,
    result_path: Path,
    *,
    python: str | Path = sys.executable,
    args: Sequence[str] = (),
) -> list[str]:
    """The command line that ``run_bench`` runs."""
    requests = sum(1 for line in trace.read_text(encoding="utf-8").splitlines() if line.strip())
    return [
        *(str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"),
        *("--base-url", server.base_url, "--endpoint", server.endpoint),
        *("--model", server.model, "--tokenizer", server.tokenizer),
        *("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--num-prompts", str(requests)),
        *("--timed-trace-chunk-hash-size", str(BLOCK_TOKENS), "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,95,99"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result_path.parent), "--result-filename", result_path.name, *args),
    ]


def run_bench(
    server: Server,
    trace: Path,
    result_path: Path,
    *,
    python: str | Path = sys.executable,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    hash_seed: int = 0,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Send the trace's requests at their times and return what vLLM's benchmark saved.

    Args:
        server: its key reaches the benchmark by environment, not by command line.
        trace: timed_trace JSONL, as sim.trace_writers.write_timed_trace writes it.
        result_path: where the result's JSON is written.
        python: interpreter of the environment that has vllm. args: further flags of ``vllm bench serve``.
        env: variables set on top of our own.
        hash_seed: PYTHONHASHSEED; vLLM draws the prompts from it, so that one trace and seed give one set
            of prompts, and another seed prompts that no server has cached.
        timeout_s: how long the whole benchmark may take.

    Raises:
        TookTooLongError: it is not done in time. It is ended, with all that it started.
        MeasureError: it cannot start, fails, or completes no request; the message ends with what it said
            last.
    """
    command = bench_command(server, trace, result_path, python=python, args=args)
    variables = vllm_environment(env, offline=Path(server.tokenizer).is_dir())
    variables["PYTHONHASHSEED"] = str(hash_seed)
    if server.key is not None:
        variables["OPENAI_API_KEY"] = server.key
    result_path.unlink(missing_ok=True)
    where = f"vllm bench serve against {server.base_url}"
    try:
        code, said = _run(command, variables, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TookTooLongError(
            f"not done after {timeout_s:g} s; its last words:\n{last_lines(error.output)}\n",
            where,
            "Is the server alive and the load below what it can serve?",
        ) from error
    if code or not result_path.exists():
        fix = "Does the server answer, and are model and tokenizer its own?"
        raise MeasureError(f"ended with code {code}; its last words:\n{last_lines(said)}\n", where, fix)
    try:
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MeasureError(
            f"its result cannot be read ({error})", where, "Is there space left on the disk?"
        ) from None
    if not result.get("completed"):
        errors = [text for text in result.get("errors", []) if text]
        raise MeasureError(
            f"no request completed; the first error: {errors[0].strip()[-500:] if errors else 'none given'}",
            where,
            "Are endpoint, model name and key right, and do the prompts fit max_model_len?",
        )
    return result


def _run(command: Sequence[str], env: Mapping[str, str], timeout_s: float | None) -> tuple[int, bytes]:
    """Exit code and output of a command. Whatever ends the wait for it ends all that it started, too."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with start(command, env=env, **streams) as process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            signal_group(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said
