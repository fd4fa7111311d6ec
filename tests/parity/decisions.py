"""What vLLM decides on the scenarios of a test module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from servecast.validate.parity.parity import Mismatch, Recorded, compare, record
from servecast.validate.parity.scenarios import Scenario
from servecast.validate.parity.vllm_process import ENVIRONMENT, VllmProcess


def record_all(
    counts: Mapping[str, int], draw: Callable[[str, int], Iterable[Scenario]]
) -> dict[str, list[Recorded]]:
    """By release, vLLM's decisions on what ``draw`` makes of a release and its count in ``counts``."""
    answers = {}
    for version, count in counts.items():
        process = VllmProcess.installed(version)
        assert process is not None, f"vLLM {version} is missing from {ENVIRONMENT}"
        with process:
            answers[version] = list(record(process, draw(version, count)))
    return answers


def mismatches(recorded: Iterable[Recorded], version: str) -> list[Mismatch]:
    """The first difference of each scenario in which ours, by the rules of a release, decides otherwise."""
    return [found for one in recorded if (found := compare(one, version)) is not None]
