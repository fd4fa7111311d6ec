"""A campaign on a machine that may be taken away: commands in order of value, each on disk when it ends.

Each stage is a ``servecast`` process of its own. What ran, when, how it ended, what it wrote and the hashes
of its predictions are in stages.json from the moment they are known. A campaign that goes on later runs what
is not done yet: first what nobody has tried, then what was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from servecast.calibrate.ending import GRACE_S, end
from servecast.calibrate.measure.facts import collect, nvidia_smi
from servecast.calibrate.measure.folder import Budget
from servecast.calibrate.measure.vllm.tiny_model import write_tiny_model, write_tokenizer
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.scenario.scenario import shipped_folder
from servecast.validate.campaign.plan import Plan, Stage, share_of

MANIFEST = "stages.json"
MACHINE = "machine.json"
FOLDERS = ("logs", "models", "scenarios")
PREPARED = (*FOLDERS, MACHINE)  # there before any stage has done anything
SERVECAST = (sys.executable, "-m", "servecast.sim.cli")
ENDING_S = GRACE_S + 5.0  # of the time budget, kept for a stage that has to be ended
MARGIN_S = 20.0  # of a stage's time for what a command does not count: imports, the end of a server
USED = 0.7  # of a shortened time: a stage that took more of it, and makes no file, was cut off by it

Row = dict[str, Any]


@dataclass(slots=True)
class Campaign:
    """Runs a plan.

    Args:
        plan: what to run. out: folder for everything. python: that has vLLM.
        budget: of time; a stage that would end later gets less, or is not started. kept_s: of it, for what
            comes after the last stage.
        resume: skip what an earlier run has done; without it a folder with stages is refused.
        only: run these stages and no others. again: stages to run once more.
        command: instead of servecast itself. say: told what is being done.

    Attributes:
        rows: of the manifest, by stage.
    """

    plan: Plan
    out: Path
    python: str = sys.executable
    budget: Budget = field(default_factory=lambda: Budget(None))
    kept_s: float = 0.0
    resume: bool = False
    only: Sequence[str] = ()
    again: Sequence[str] = ()
    command: Sequence[str] = SERVECAST
    say: Callable[[str], None] = lambda _text: None
    rows: dict[str, Row] = field(default_factory=dict)

    def run(self) -> None:
        """Run what is not done. Ctrl-C (or SIGTERM, as KeyboardInterrupt) ends the running stage first.

        Raises:
            InputError: the folder is another plan's, has stages without ``resume``, or a model of the plan
                is not there.
            KeyboardInterrupt: it was stopped; the manifest says where.
        """
        self.out = self.out.absolute()
        self._read()
        self._prepare()
        todo = [stage for stage in self.plan.stages if self._wanted(stage)]
        while (stage := self._next(todo)) is not None:
            todo.remove(stage)
            self._run(stage)
        for stage in todo:
            self.say(f"{stage.name}: not started: {self._why_not(stage)}")

    def _wanted(self, stage: Stage) -> bool:
        if self.only and stage.name not in self.only:
            return False
        if stage.name in self.again or stage.name not in self.rows:
            return True
        return self._state(stage.name) == "cut" and not self._made(stage)

    def _next(self, todo: Sequence[Stage]) -> Stage | None:
        """The first stage that can start; one that was cut off, but left enough, after all others."""
        ready = [stage for stage in todo if self._why_not(stage) is None]
        return min(ready, key=lambda stage: self._left_enough(stage.name), default=None)

    @property
    def _left_s(self) -> float:
        return self.budget.left_s - self.kept_s

    @property
    def left(self) -> list[str]:
        """Stages that are not done."""
        return [stage.name for stage in self.plan.stages if self._state(stage.name) != "done"]

    def _state(self, name: str) -> str | None:
        return self.rows[name]["state"] if name in self.rows else None

    def _left_enough(self, name: str) -> bool:
        """Whether a stage is done, or left what it is for: its file, or, if none is named, any of its own."""
        if self._state(name) in (None, "done"):
            return self._state(name) is not None
        stage = next(stage for stage in self.plan.stages if stage.name == name)
        if stage.makes is not None:
            return self._made(stage)
        own = (Path(file["path"]).parts[0] not in PREPARED for file in self.rows[name].get("files", ()))
        return any(own)

    def _made(self, stage: Stage) -> bool:
        return stage.makes is not None and (self.out / stage.makes).exists()

    def _why_not(self, stage: Stage) -> str | None:
        missing = [name for name in stage.needs if not self._left_enough(name)]
        if missing:
            return f"it needs {', '.join(missing)}"
        least = max(stage.least_s, 1.0)
        if self._left_s < least:
            return f"{max(self._left_s, 0):.0f} s are left, it needs {least:.0f}"
        try:
            for name in stage.shares_of:
                self._rate(name)
        except InputError as error:
            return str(error)
        return None

    def _run(self, stage: Stage) -> None:
        given = min(stage.time_s, self._left_s)
        own = {file["path"] for file in self.rows.get(stage.name, {}).get("files", ())}
        row: Row = {"name": stage.name, "state": "running", "started": _now(), "given_s": round(given, 1)}
        self.rows[stage.name] = row
        if self._made(stage) and stage.name not in self.again:
            row |= {"state": "done", "ended": _now(), "reason": f"{stage.makes} was there"}
            self._write()
            return
        aside = self._set_aside(stage)
        arguments = stage.arguments(lambda name: self._place(name, given))
        row["run"] = [self._plain(word) for word in arguments]
        self._write()
        self.say(f"{stage.name}: {given:.0f} s at most")
        before, began = _stamps(self.out), time.monotonic()
        interrupted = False
        try:
            code, reason = self._process(stage, arguments, given)
        except KeyboardInterrupt:
            code, reason, interrupted = None, "stopped", True
        took = time.monotonic() - began
        unmade = stage.makes is not None and not self._made(stage)
        if unmade and aside is not None:
            aside.replace(self.out / str(stage.makes))
        if reason is None and (code not in stage.good or unmade):
            reason = f"code {code}: {_last_line(self.out / 'logs' / f'{stage.name}.err')}"
            state = "failed"
        elif reason is not None or (stage.makes is None and given < stage.time_s and took > USED * given):
            state = "cut"
        else:
            state = "done"
        left = {name: at for name, at in _stamps(self.out).items() if name in own or before.get(name) != at}
        row |= {
            **{"state": state, "ended": _now(), "seconds": round(took, 1), "code": code, "reason": reason},
            "files": _files(left),
            "predictions": {} if stage.predicts is None else _hashes(self.out, stage.predicts),
        }
        self._write()
        self.say(f"{stage.name}: {state} after {took:.0f} s" + ("" if reason is None else f": {reason}"))
        if interrupted:
            raise KeyboardInterrupt

    def _process(self, stage: Stage, arguments: list[str], given_s: float) -> tuple[int | None, str | None]:
        """Run a stage's process; its exit code, and why it was ended (None: it ended by itself)."""
        logs = self.out / "logs"
        with (logs / f"{stage.name}.out").open("wb") as out, (logs / f"{stage.name}.err").open("ab") as err:
            process = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.out,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.plan.env,
                start_new_session=True,  # so that it can be ended with what it started
            )
            try:
                return process.wait(given_s), None
            except subprocess.TimeoutExpired:
                end(process)
                return process.returncode, f"was not done after {given_s:.0f} s"
            except KeyboardInterrupt:
                end(process)
                raise

    def _set_aside(self, stage: Stage) -> Path | None:
        """Rename the file of a stage that runs again: commands refuse to overwrite results."""
        if not self._made(stage):
            return None
        file = self.out / str(stage.makes)
        number = next(n for n in count(1) if not file.with_name(f"{file.stem}.{n}{file.suffix}").exists())
        return file.rename(file.with_name(f"{file.stem}.{number}{file.suffix}"))

    def _place(self, name: str, given_s: float) -> str:
        share = share_of(name)
        if share is None:
            return {"out": str(self.out), "python": self.python, "time_s": f"{_counted(given_s):.0f}"}[name]
        return f"{share[0] * self._rate(share[1]):.4g}"

    def _rate(self, name: str) -> float:
        """The largest rate that a stage printed."""
        file = self.out / "logs" / f"{name}.out"
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))["max_request_rate"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                "says no max_request_rate", where=f"logs/{file.name}", fix="Look at that stage's log."
            ) from None

    def _read(self) -> None:
        """What an earlier run left; what it was doing when it ended counts as cut off."""
        file = self.out / MANIFEST
        if not file.exists():
            return
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            rows = {str(row["name"]): dict(row) for row in kept["stages"]}
            name = kept["plan"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"is no manifest of a campaign ({error})", where=str(file), fix="Give another --out."
            ) from None
        if name != self.plan.name:
            raise InputError(f"is of plan {name}", where=str(file), fix="Give another --out.")
        if rows and not self.resume:
            raise InputError(
                f"has {len(rows)} stages already", where=str(file), fix="Give --resume, or another --out."
            )
        for row in rows.values():
            if row["state"] == "running":
                since = 1e9 * datetime.fromisoformat(row["started"]).timestamp()
                left = {name: at for name, at in _stamps(self.out).items() if at[0] >= since}
                row |= {"state": "cut", "files": _files(left)}
        self.rows = rows

    def _write(self) -> None:
        document = {
            "schema_version": 1,
            "servecast_version": version("servecast"),
            "plan": self.plan.name,
            "stages": [self.rows[stage.name] for stage in self.plan.stages if stage.name in self.rows],
        }
        text = json.dumps(document, indent=1) + "\n"
        write_whole(self.out / MANIFEST, lambda part: part.write_text(text, encoding="utf-8"))

    def _prepare(self) -> None:
        """The plan's models and scenarios, as files; facts of the machine."""
        for folder in FOLDERS:
            try:
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"cannot be made: {error.strerror}", where=f"--out {self.out}", fix="Give another folder."
                ) from None
        for name, model in self.plan.models.items():
            _write_model(self.out / "models" / name, model)
        for name, fields in self.plan.scenarios.items():
            text = yaml.safe_dump({"schema_version": 1, "name": name, **fields}, sort_keys=False)
            (self.out / "scenarios" / f"{name}.yaml").write_text(text, encoding="utf-8")
        facts = collect() | {"command": None, "nvidia_smi": nvidia_smi()}
        (self.out / MACHINE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _plain(self, word: str) -> str:
        """A word of a command line without folders of this machine."""
        return word.replace(str(self.out), "{out}").replace(self.python, "{python}")


def _counted(given_s: float) -> float:
    """The time budget of a command that has so many seconds."""
    return max(given_s - MARGIN_S, given_s / 2)


def _write_model(folder: Path, model: Any) -> None:
    """A model's folder, from the name or path of a config.json or as a tiny one, with a made-up tokenizer."""
    if not isinstance(model, str):
        write_tiny_model(folder, **model.model_dump())
        return
    file = Path(model) if model.endswith(".json") else shipped_folder() / "models" / f"{model}.json"
    if not file.is_file():
        raise InputError(
            f"there is no {file.name}",
            where=f"models.{folder.name}",
            fix="Give a shipped config's name, or a path.",
        )
    folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / "config.json")
    if not (folder / "tokenizer.json").exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        write_tokenizer(
            folder,
            vocab_size=config.get("vocab_size"),
            model_max_length=config.get("max_position_embeddings", 8192),
        )


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file below a folder was written last (ns), and its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        with suppress(FileNotFoundError):  # the stage that just ended may still be tidying up
            if path.is_file() and name != MANIFEST:
                found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def _files(stamps: Mapping[str, tuple[int, int]]) -> list[Row]:
    return [{"path": name, "bytes": size} for name, (_, size) in stamps.items()]


def _hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else "it said nothing"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
