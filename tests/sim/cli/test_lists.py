"""The lists of what a scenario may name: `servecast gpus`, `models`, `profiles`, and the face's tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

import servecast
from servecast.__main__ import main
from servecast.sim.hardware.model_families import FAMILIES
from servecast.sim.scenario.scenario import load, shipped_scenarios


def listed(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """The rows of a list in JSON by what they name."""
    assert main([command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[command]
    return {row[command.removesuffix("s")]: row for row in rows}


def test_gpus_say_their_sheet_and_what_an_answer_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed("gpus", capsys)
    h100, a100, a6000 = found["H100"], found["A100"], found["A6000"]
    assert (h100["capability"], h100["bandwidth_gb_s"], h100["fp8_tflops"]) == ("9.0", 3350, 1979)
    assert h100["constants"] == "measured kernels"
    assert (a100["fp8_tflops"], a100["link_gb_s"]) == (None, 300)
    assert a6000["constants"] == "kernels of the L40S, compute times 0.88"
    assert a6000["source"].startswith("NVIDIA RTX A6000 datasheet, https://")


def test_models_have_the_kv_bytes_of_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """2 x layers x KV heads x head size x 2 bytes: 2 x 24 x 2 x 64 x 2, and 2 x 80 x 8 x 128 x 2."""
    found = listed("models", capsys)
    assert found["Qwen2.5-0.5B-Instruct"]["kv_bytes_per_token"] == 12_288
    assert found["Llama-3.1-70B-Instruct"]["kv_bytes_per_token"] == 327_680
    assert found["Qwen3-30B-A3B"]["experts"] == 128
    assert found["Qwen3-32B"]["experts"] is None
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert "deepseek_v3       latent" in text
    assert "t5, mt5, " in text
    assert main(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {family["model_type"] for family in told["families"]} == set(FAMILIES)
    assert told["refused"]["mamba2"] == "state-space layers alone"


def test_profiles_are_those_that_scenarios_may_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed("profiles", capsys)
    named = {load(name).profile for name in shipped_scenarios()} - {None, "kernels"}
    assert named <= set(found)
    llmd = found["llmd-4x-llama-3.1-70b-tp4-h100"]
    assert (llmd["gpu"], llmd["tensor_parallel_size"], llmd["server"]) == ("H100", 4, "vLLM 0.10")
    assert llmd["basis"] == "fitted to a report"


@pytest.mark.parametrize("command", ["gpus", "models", "profiles"])
def test_the_face_has_the_same_rows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    frame = getattr(servecast, command)()
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == frame.columns[0] == command.removesuffix("s")
    assert [line[: len(name)] for line, name in zip(lines[1:], frame.iloc[:, 0], strict=False)] == [
        *frame.iloc[:, 0]
    ]
