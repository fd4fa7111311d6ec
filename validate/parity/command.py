"""``servecast validate parity``: our scheduler against vLLM's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from servecast.sim.cli.output import print_json
from servecast.sim.engine.rules import RULES
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity.parity import Mismatch, ParityResult, Recorded, compare, nearest_rules, record
from servecast.validate.parity.parity import parity as run_parity
from servecast.validate.parity.scenarios import (
    Scenario,
    drafted_scenarios,
    pictured_scenarios,
    random_scenarios,
    read_scenarios,
)
from servecast.validate.parity.vllm_process import VllmProcess, release


def parity(
    *,
    vllm: str | None = None,
    scenarios: Annotated[int, Parameter(alias="-n")] = 150,
    seed: int = 0,
    drafts: bool = False,
    images: bool = False,
    replay: Path | None = None,
    vllm_python: Path | None = None,
    out: Path = Path("out/parity"),
    json: bool = False,
) -> int:
    """Compare our scheduler with vLLM's real one, step by step, over random scenarios.

    Exits 0 when every decision of every step is the same, 1 when not, 3 when there are no rules for
    that vLLM. A scenario that differs is shrunk and written out.

    Args:
        vllm: version of an installed vLLM, like 0.32 (tools/install_vllm.sh installs two); the newest
            known without it.
        scenarios: how many to draw.
        seed: of the draw.
        drafts: draw scenarios with speculative decoding. images: with images in prompts.
        replay: run the scenarios of this file instead.
        vllm_python: Python of your own environment with vLLM.
        out: folder for scenarios that differ.
        json: print one JSON object and nothing else.
    """
    if scenarios < 1:
        raise InputError(f"{scenarios} scenarios", where="--scenarios", fix="Give at least 1.")
    started = time.monotonic()
    draw = drafted_scenarios if drafts else pictured_scenarios if images else random_scenarios
    result, smallest = _compared(vllm, vllm_python, scenarios, seed, replay, draw)
    written = _write(out, result, smallest)
    if json:
        more = {
            "rule_set_known": result.known,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            "differences": result.differences(),
            "notes": result.notes(),
            "replay": [str(file) for file in written],
        }
        print_json(result.counts() | more)
        return result.exit_code
    for name, value in result.counts().items():
        print(f"{name.replace('_', ' '):>20}  {value}")
    for note in result.notes():
        print(note)
    if smallest is not None:
        replay_with = f"servecast validate parity --vllm {result.vllm} --replay {written[0]}"
        print(f"\n{smallest}\n\nReplay: {replay_with}")
    return result.exit_code


def _compared(
    vllm: str | None,
    python: Path | None,
    scenarios: int,
    seed: int,
    replay: Path | None,
    draw: Callable[[str, int, int], Iterator[Scenario]],
) -> tuple[ParityResult, Mismatch | None]:
    """What the comparison finds, and its first mismatch made small; without vLLM, whether it has rules."""
    process = _start(vllm, python)
    if process is None:
        asked = vllm or max(RULES)
        if release(asked) in RULES:
            fix = "Run tools/install_vllm.sh, or name an environment that has it with --vllm-python."
            raise InputError(f"vLLM {asked} is not installed for this", where="--vllm", fix=fix)
        return ParityResult(asked, nearest_rules(asked)), None
    with process:
        version = release(process.version)
        rules = version if version in RULES else nearest_rules(version)
        drawn = read_scenarios(replay) if replay else draw(rules, seed, scenarios)
        total = len(drawn) if isinstance(drawn, list) else scenarios

        def show(sofar: ParityResult) -> None:
            if sys.stderr.isatty():
                end = "\n" if sofar.scenarios == total else ""
                print(f"\r{sofar.scenarios}/{total} scenarios", end=end, file=sys.stderr)

        result = run_parity(process.version, record(process, drawn), rules=rules, progress=show)
        plain = replay is None and draw is random_scenarios
        small = _smallest(process, result, seed, shrink=plain) if result.mismatches else None
        return result, small


def _start(version: str | None, python: Path | None) -> VllmProcess | None:
    if python is None:
        return VllmProcess.installed(version or max(RULES))
    process = VllmProcess(python)
    if version is not None and release(version) != release(process.version):
        process.close()
        fix = "Leave --vllm out, or give the Python of the other one."
        raise InputError(f"{python} has vLLM {process.version}, not {version}", where="--vllm", fix=fix)
    return process


def _smallest(process: VllmProcess, result: ParityResult, seed: int, *, shrink: bool) -> Mismatch:
    """The first mismatch, its scenario shrunk where hypothesis is at hand."""
    first = result.mismatches[0]
    if not shrink:
        return first
    try:
        from servecast.validate.parity.shrink import shrink as smaller  # needs hypothesis
    except ImportError:
        return first

    def difference(scenario: Scenario) -> Mismatch | None:
        return compare(Recorded(scenario, process.decide(scenario)), result.rules)

    def same_difference(scenario: Scenario) -> bool:
        found = difference(scenario)
        return found is not None and found.fields[0] == first.fields[0]

    index = int(first.scenario.name.rpartition("-")[2])
    return difference(smaller(result.rules, seed, index, same_difference)) or first


def _write(out: Path, result: ParityResult, smallest: Mismatch | None) -> list[Path]:
    written = []
    for mismatch in [*([smallest] if smallest else []), *result.mismatches[:20]]:
        file = out / f"{mismatch.scenario.name}.json"
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(mismatch.scenario.to_json() + "\n")
        written.append(file)
    return written
