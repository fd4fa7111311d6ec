"""Kernel microbenchmarks, run for real on this machine's CPU with the torch of vLLM's environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from places import REPOSITORY as ROOT
from places import VLLM

PYTHON = VLLM / "bin" / "python"
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}

pytestmark = pytest.mark.vllm  # its torch


def measure(*flags: str) -> subprocess.CompletedProcess[str]:
    """The bare form, as it runs on a machine without servecast."""
    command = [str(PYTHON), "-m", "measure", "kernels", *flags]
    return subprocess.run(command, cwd=ROOT / "calibrate", capture_output=True, text=True, check=False)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    out = folder / "out"
    flags = ("--model", str(config), "--max-tokens", "32", "--dtypes", "fp32", "--repeats", "3")
    done = measure("--out", str(out), *flags, "--time-budget", "12")
    assert done.returncode == 0, done.stderr
    done = measure("--out", str(out), *flags, "--resume")
    assert done.returncode == 0, done.stderr
    return out


def test_every_kind_of_kernel_is_timed_once(measured: Path) -> None:
    rows = rows_in(measured)
    kinds = {row["row"] for row in rows}
    assert {"copy", "host_to_device", "launch", "gemm", "elementwise", "sampler"} <= kinds
    assert {"attention_decode", "attention_prefill"} <= kinds
    cases = [row["case"] for row in rows]
    assert len(set(cases)) == len(cases)
    assert all(len(row["times_s"]) >= 3 and min(row["times_s"]) > 0 for row in rows)
    shapes = {(row["n"], row["k"]) for row in rows if row["row"] == "gemm"}
    assert shapes == {(384, 256), (256, 256), (1024, 256), (256, 512), (1000, 256)}


def test_times_are_those_of_the_work(measured: Path) -> None:
    """By the fastest repeat, since other work on this machine only adds: a copy of 512 MiB takes longer than
    one of 1 MiB by far more than that, and no product is faster than 4 TFLOP/s, which no such CPU has."""
    rows = rows_in(measured)
    copies = {row["bytes"]: min(row["times_s"]) for row in rows if row["row"] == "copy"}
    assert copies[512 << 20] > 20 * copies[1 << 20]
    for row in rows:
        if row["row"] == "gemm":
            assert 2 * row["m"] * row["n"] * row["k"] / min(row["times_s"]) < 4e12


def test_the_facts_name_the_machine(measured: Path) -> None:
    facts = json.loads((measured / "facts.json").read_text())
    assert facts["gpu"] == "cpu"
    assert facts["torch"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dtypes", "fp7"), "--dtypes: 'fp7' is no dtype"),
        (("--model", "absent.json"), "absent.json: cannot be read"),
        (("--max-tokens", "0"), "below 1"),
        (("--time-budget", "-1"), "--time-budget"),
        (("--warp", "9"), "unknown: --warp 9"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    done = measure("--out", str(out), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not out.exists()


def test_a_folder_that_has_rows_is_left_as_it_is(measured: Path) -> None:
    before = (measured / "kernels.jsonl").read_bytes()
    done = measure("--out", str(measured))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (measured / "kernels.jsonl").read_bytes() == before
