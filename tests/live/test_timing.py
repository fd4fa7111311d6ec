"""Timing verdicts: a wrong one fails where the machine was quiet, and is told where it was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timing
from places import HELPERS

TESTS = HELPERS.parent
BURN = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
JUDGED = """
from timing import judge
def test_right(): judge("right", True, quiet=True); judge("right beside other work", True, quiet=False)
def test_disturbed(): judge("TTFT is 65 % off", False, quiet=False)
def test_wrong(): judge("TTFT is 66 % off", False, quiet=True)
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_wrong_verdict_fails_where_it_was_quiet_and_is_counted_where_not(
    tmp_path: Path, workers: str
) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_judged.py").write_text(JUDGED)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers, str(tmp_path)]
    env = {"PYTHONPATH": str(HELPERS), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "AssertionError: TTFT is 66 % off" in done.stdout
    said = done.stdout[done.stdout.index("1 timing verdict inconclusive: this machine was disturbed") :]
    assert "TTFT is 65 % off" in said


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_children_are_ours_and_what_was_here_before_is_others() -> None:
    at_least = 0.4 * os.sysconf("SC_CLK_TCK")
    _, own_before, _ = timing._used()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    everything, own, _ = timing._used()
    assert own - own_before > at_least
    leave = f"import os\nif os.fork() == 0:\n    os.setsid()\n    exec({BURN!r})\n    print('done')"
    alone = subprocess.run([sys.executable, "-c", leave], stdout=subprocess.PIPE, check=True)
    assert alone.stdout == b"done\n"
    after, own_after, _ = timing._used()
    assert (after - everything) - (own_after - own) > at_least
    assert 0 <= timing.Machine().others() <= 1


def test_what_is_wrong_once_is_run_again_and_what_is_wrong_each_time_fails() -> None:
    tries = iter([False, True])
    timing.until_right(lambda again: (f"try {again}", next(tries), True))
    assert not list(tries)
    with pytest.raises(AssertionError, match="try 2"):
        timing.until_right(lambda again: (f"try {again}", False, True))


def test_wrong_each_time_says_nothing_where_one_was_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "inconclusive", told := [])
    timing.until_right(lambda again: (f"try {again}", False, again != 1))
    assert told == ["try 2"]


def test_a_machine_whose_cpus_became_slower_is_not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_paces", [1e-9])
    monkeypatch.setattr(timing.Machine, "others", lambda _: 0.0)
    assert not timing.Machine().quiet()
    monkeypatch.setattr(timing, "_paces", [1e9])
    monkeypatch.setattr(timing, "_pace", lambda: 1e9)
    assert timing.Machine().quiet()
