"""Measures a machine by a plan of servecast commands, the most valuable first, for as long as there is time.

    python campaign.py PLAN.yaml OUT SECONDS [--pack FOLDER] [--python PYTHON_WITH_VLLM]

The same once more goes on: first with what nobody tried, then with what was cut off. A plan has
env: variables of all stages; models: name -> a shipped config's name, or fields of a tiny one, which becomes
OUT/models/NAME; scenarios: name -> fields of OUT/scenarios/NAME.yaml; and stages, see ``Stage``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from servecast.calibrate.measure.facts import collect, nvidia_smi
from servecast.calibrate.measure.vllm.ending import heeds_ctrl_c, sigterm_as_ctrl_c
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model, write_tokenizer
from servecast.sim.scenario.scenario import shipped_folder

SERVECAST = (sys.executable, "-m", "servecast")
GRACE_S, PACK_S = 20.0, 15.0  # kept of the time: to end a stage (a vLLM server gets 15 s), to pack
MARGIN_S = 20.0  # of a stage's time for what its --time-budget does not count: imports, the end of a server
PART_BYTES = 15 << 20
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,memory.used"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        run: arguments of ``servecast``. {out} is the campaign's folder, {python} the Python that has vLLM,
            {time_s} the stage's seconds less a margin, and {0.8*NAME} that share of the largest rate that
            the stage NAME printed.
        time_s, least_s: it is ended after so long, and not started with less left.
        needs: a file below OUT without which it is not started.
        makes: the file below OUT that it is for: it is done when that is there, whatever its exit code.
            Without one it is done when it ended well within its own time.
    """

    name: str
    run: str
    time_s: float
    least_s: float = 10.0
    needs: str | None = None
    makes: str | None = None


@dataclass
class Campaign:
    """A plan on this machine. What was begun and how it ended is in OUT/stages.jsonl at once."""

    plan: dict[str, Any]
    out: Path
    deadline: float  # of time.monotonic()
    python: str = sys.executable
    packed: Path | None = None

    def run(self) -> None:
        """Run what is not done and fits. Ctrl-C ends the running stage first."""
        self._prepare()
        todo = [stage for stage in (Stage(**row) for row in self.plan["stages"]) if not self.done(stage)]
        while ready := [stage for stage in todo if self._fits(stage)]:
            stage = min(ready, key=lambda stage: bool(self.rows(stage)))
            todo.remove(stage)
            try:
                self._run(stage)
            finally:
                if self.packed is not None:
                    pack(self.out, self.packed)
        for stage in todo:
            why = "time" if stage.needs is None or _has(self.out / stage.needs) else stage.needs
            say(f"{stage.name}: not started, for want of {why}")

    def rows(self, stage: Stage) -> list[dict[str, Any]]:
        """What is known of a stage."""
        file = self.out / "stages.jsonl"
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        return [row for row in map(json.loads, lines) if row["stage"] == stage.name]

    def done(self, stage: Stage) -> bool:
        """Whether nothing is left to do of it."""
        return self._made(stage) if stage.makes else any(row.get("done") for row in self.rows(stage))

    def _made(self, stage: Stage) -> bool:
        return bool(stage.makes) and _has(self.out / str(stage.makes))

    def _fits(self, stage: Stage) -> bool:
        return self._left_s >= stage.least_s and (stage.needs is None or _has(self.out / stage.needs))

    @property
    def _left_s(self) -> float:
        return self.deadline - time.monotonic() - GRACE_S - PACK_S

    def _run(self, stage: Stage) -> None:
        given, logs = min(stage.time_s, self._left_s), self.out / "logs"
        try:
            words = [re.sub("{(.+?)}", lambda m: self._place(m[1], given), w) for w in shlex.split(stage.run)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{stage.name}: not started, for want of a rate: {error!r}")
            return
        plain = [word.replace(str(self.out), "{out}").replace(self.python, "{python}") for word in words]
        self._note(stage, began=time.time(), given_s=round(given, 1), run=plain)
        say(f"{stage.name}: {given:.0f} s at most")
        began, ended = time.monotonic(), "by itself"
        with (logs / f"{stage.name}.out").open("wb") as out, (logs / f"{stage.name}.err").open("ab") as err:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.plan.get("env", {})
            process = subprocess.Popen(
                [*SERVECAST, *words],
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
                preexec_fn=heeds_ctrl_c,  # also where a shell started us in the background, without one
            )
            try:
                process.wait(given)
            except subprocess.TimeoutExpired:
                ended = "after its time"
                end(process)
            except KeyboardInterrupt:
                ended = "by hand"
                end(process)
                raise
            finally:
                took, code = round(time.monotonic() - began, 1), process.returncode
                whole = ended == "by itself" and code == 0 and given == stage.time_s
                said = hashlib.sha256((logs / f"{stage.name}.out").read_bytes()).hexdigest()
                done = self._made(stage) if stage.makes else whole
                self._note(stage, ended=ended, seconds=took, code=code, done=done, said_sha256=said)
                left = "" if done else ", not done"
                say(f"{stage.name}: ended {ended} after {took:.0f} s, code {code}{left}")

    def _note(self, stage: Stage, **what: Any) -> None:
        with (self.out / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage.name, **what}) + "\n")

    def _place(self, name: str, given_s: float) -> str:
        if name in (places := {"out": str(self.out), "python": self.python}):
            return places[name]
        if name == "time_s":
            return f"{max(given_s - MARGIN_S, given_s / 2):.0f}"
        share, _, stage = name.partition("*")
        said = json.loads((self.out / "logs" / f"{stage}.out").read_text("utf-8"))
        return f"{float(share) * said['max_request_rate']:.4g}"

    def _prepare(self) -> None:
        for folder in ("logs", "models", "scenarios"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        for name, model in self.plan["models"].items():
            folder = self.out / "models" / name
            if isinstance(model, dict):
                write_tiny_model(folder, **model)
            elif not (folder / "tokenizer.json").exists():
                folder.mkdir(exist_ok=True)
                shutil.copyfile(shipped_folder() / "models" / f"{model}.json", folder / "config.json")
                config = json.loads((folder / "config.json").read_text("utf-8"))
                longest = config["max_position_embeddings"]
                write_tokenizer(folder, vocab_size=config["vocab_size"], model_max_length=longest)
        for name, fields in self.plan["scenarios"].items():
            text = yaml.safe_dump({"schema_version": 1, "name": name, **fields}, sort_keys=False)
            (self.out / "scenarios" / f"{name}.yaml").write_text(text, "utf-8")
        facts = collect() | {"command": None, "nvidia_smi": nvidia_smi()}
        (self.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process as by Ctrl-C, and then whatever is left of what it started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def pack(out: Path, folder: Path) -> None:
    """The whole campaign as FOLDER/campaign.tar.xz.00, .01, ..., which ``cat`` and ``tar xJ`` unpack."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "campaign.tar.xz"
    with tarfile.open(whole, "w:xz", preset=1) as archive:
        archive.add(out, ".", filter=lambda entry: None if entry.name.endswith("tokenizer.json") else entry)
    content = whole.read_bytes()
    for at in range(0, len(content), PART_BYTES):
        part = folder / f"campaign.tar.xz.{at // PART_BYTES:02}"
        part.with_suffix(".part").write_bytes(content[at : at + PART_BYTES])
        part.with_suffix(".part").replace(part)
    whole.unlink()


def _has(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float, help="that all of it may take")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="for all there is, after each stage")
    parser.add_argument("--python", default=sys.executable, help="that has vLLM (the one that runs this)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    plan = yaml.safe_load(args.plan.read_text("utf-8"))
    campaign = Campaign(plan, args.out.absolute(), deadline, os.path.abspath(args.python), args.pack)
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_ctrl_c())
        if shutil.which("nvidia-smi"):  # the GPU's clocks, each second
            (campaign.out / "logs").mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((campaign.out / "logs" / "clocks.csv").open("ab"))
            query = [f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "-l", "1"]
            logger = subprocess.Popen(["nvidia-smi", *query], stdout=file, start_new_session=True)
            stack.callback(logger.kill)
        campaign.run()


if __name__ == "__main__":
    main()
