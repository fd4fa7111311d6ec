"""What helps to begin: a scenario from a pasted command, completion, text that fits the terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import servecast
from servecast.__main__ import main
from servecast.sim.cli.output import print_text
from servecast.sim.scenario.starter import starter

DOCKER = """docker run --gpus all -p 8000:8000 \\
  vllm/vllm-openai:v0.31.0 \\
  --model org/my-model --max-model-len 4096 --max-num-seqs 64"""


def test_a_pasted_command_becomes_a_scenario_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    words = ["init", "vllm serve Qwen/Qwen3-8B -tp 2 --max-model-len 8192", "--gpu", "h200"]
    assert main([*words, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"Scenario: {path}\n"
    scenario = servecast.load(path)
    assert (scenario.model.config, scenario.gpu.name, scenario.name) == ("Qwen3-8B", "H200", "qwen3-8b")
    assert (scenario.engine.tensor_parallel_size, scenario.engine.max_model_len) == (2, 8192)
    assert servecast.simulate(scenario, request_rate=5, num_requests=20).to_json()["completed"] == 20
    assert path.read_text().count("# <--") == 4
    assert main([*words, "--output", str(path)]) == 2  # nothing is overwritten
    assert "is there. Give another path." in capsys.readouterr().err


@pytest.mark.parametrize("words", [["init", "-", "--gpu", "l40s"], ["init", "--gpu", "l40s", "-"]])
def test_a_dash_reads_the_command_from_standard_input(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("vllm serve Qwen/Qwen3-8B \\\n  -tp 2\n"))
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert 'gpu: {name: "L40S"}' in shown
    assert "vllm serve Qwen/Qwen3-8B" in shown


def test_what_the_command_says_is_taken_from_it() -> None:
    """The release of the image; a model that is not shipped needs its file; lengths fit max_model_len."""
    text = starter(DOCKER)
    assert 'version: "0.31.0"' in text
    assert 'config: "config.json"}  # <-- put the file of org/my-model beside this one' in text
    assert "max_tokens: 3072" in text  # three quarters of 4,096, and a quarter for the answer
    assert "max_tokens: 1000" in text


@pytest.mark.parametrize(
    ("drafts", "line"),
    [
        ({"method": "eagle3", "model": "o/head", "num_speculative_tokens": 3}, "acceptance: {assumed: true}"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
            "acceptance: {assumed: true, proposed: 0.5}",
        ),
    ],
)
def test_drafts_bring_an_acceptance_that_is_a_guess(
    tmp_path: Path, drafts: dict[str, object], line: str
) -> None:
    path = tmp_path / "drafts.yaml"
    path.write_text(starter(f"vllm serve Qwen/Qwen3-8B --speculative-config '{json.dumps(drafts)}'"))
    assert f"\n{line}  # <-- 0.7 a draft, a guess" in path.read_text()
    found = servecast.simulate(servecast.load(path), request_rate=5, num_requests=20)
    assert found.to_json()["completed"] == 20
    assert any("acceptance assumed at 0.7" in note for note in found.to_json()["notes"])


def test_what_cannot_be_simulated_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "vllm serve m --prefill-context-parallel-size 2"]) == 2
    assert "Context parallelism of prompts is not modelled" in capsys.readouterr().err
    assert main(["init", "ls -l"]) == 2
    assert "is not a vllm serve command" in capsys.readouterr().err
    assert main(["init", "vllm serve"]) == 2
    assert "vllm serve: it names no model" in capsys.readouterr().err
    assert main(["init", "vllm serve Qwen/Qwen3-8B -tp 0"]) == 2
    assert "tensor_parallel_size should be greater than or equal to 1, not 0" in capsys.readouterr().err


def test_the_shell_can_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash"]) == 0
    (script,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith("servecast")]
    for word in ("optimize", "--tensor-parallel", "--max-num-batched-tokens"):
        assert word in script.read_text()


def test_text_is_folded_to_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "note: " + "word " * 40 + "--max-num-batched-tokens 2048"
    print_text(line, "a  b")
    assert capsys.readouterr().out == f"{line}\na  b\n"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_text(line, "a  b")
    folded = capsys.readouterr().out.splitlines()
    assert max(map(len, folded)) <= 80
    assert (folded[-1], folded[1][:8]) == ("a  b", "    word")
    assert " ".join(" ".join(folded[:-1]).split()) == line
