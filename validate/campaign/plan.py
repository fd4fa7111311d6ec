"""What a campaign does: a YAML file of stages, each a servecast command, in order of value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, Count, Model, NonNegative, Positive, did_you_mean, parse
from servecast.sim.inputs.yaml_file import read_yaml

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SHARE = re.compile(r"([0-9.]+)\*(\S+)")  # "{0.8*predict}": of the largest rate that a stage printed
PLACES = ("out", "python", "time_s")


class TinyModel(Model):
    """A model to try things with: see ``calibrate.measure.tiny_model.write_tiny_model``."""

    layers: Count = 2
    hidden_size: Count = 128
    heads: Count = 4
    vocab_size: Count | None = None
    max_position_embeddings: Count = 8192


class Stage(Model):
    """One command.

    Attributes:
        run: arguments of ``servecast``. ``{out}`` is the campaign's folder, ``{python}`` the Python that has
            vLLM, ``{time_s}`` the seconds that the stage has, and ``{0.8*NAME}`` that share of the
            ``max_request_rate`` in the JSON that the stage NAME printed.
        time_s: it may take so long. least_s: with less left of the time budget it is not started.
        good: exit codes of a stage that did its work.
        needs: stages that must be done before it, or have left enough: what they make, or any file of theirs
            if nothing is named.
        makes: a file that it is for. Where it is there already, the stage is done; where it is not there
            after it, the stage failed.
        predicts: pattern of files below the campaign's folder whose hashes are kept.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    run: str
    time_s: Positive
    least_s: NonNegative = 0.0
    good: tuple[Amount, ...] = (0,)
    needs: tuple[str, ...] = ()
    makes: str | None = None
    predicts: str | None = None

    def arguments(self, place: Callable[[str], str]) -> list[str]:
        """``run`` in words, with every placeholder replaced by what ``place`` gives for its name."""
        return [_PLACEHOLDER.sub(lambda found: place(found[1]), word) for word in shlex.split(self.run)]

    @property
    def shares_of(self) -> tuple[str, ...]:
        """Stages whose rate this one takes a share of."""
        names = (_SHARE.fullmatch(found) for found in _PLACEHOLDER.findall(self.run))
        return tuple(dict.fromkeys(found[2] for found in names if found))


class Plan(Model):
    """See the module.

    Attributes:
        env: environment variables of all stages.
        models: name -> a shipped config.json's name, a path (relative to the plan's folder), or a tiny model.
            Each becomes a folder with config.json and tokenizer, ``{out}/models/NAME``.
        scenarios: name -> the fields of a scenario, which becomes ``{out}/scenarios/NAME.yaml``.
    """

    schema_version: Literal[1]
    name: str
    description: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    models: dict[str, str | TinyModel] = Field(default_factory=dict)
    scenarios: dict[str, dict[str, Any]] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = Field(min_length=1)


def read_plan(name_or_path: str) -> Plan:
    """A shipped plan by its name, or a YAML file.

    Raises:
        InputError: there is none, or something in it is wrong.
    """
    path = Path(name_or_path)
    if not path.suffix:
        shipped = {file.stem: file for file in shipped_plans()}
        if name_or_path not in shipped:
            fix = did_you_mean(name_or_path, shipped) or f"Shipped are {', '.join(shipped)}."
            raise InputError(f"there is no plan {name_or_path!r}", where="PLAN", fix=fix)
        path = shipped[name_or_path]
    plan = parse(Plan, read_yaml(path), source=str(path))
    configs = {
        name: str(path.absolute().parent / model)
        for name, model in plan.models.items()
        if isinstance(model, str) and model.endswith(".json")
    }
    plan = plan.model_copy(update={"models": plan.models | configs})
    earlier: list[str] = []
    for index, stage in enumerate(plan.stages):
        _check(stage, earlier, f"{path}: stages.{index}")
        earlier.append(stage.name)
    return plan


def shipped_plans() -> list[Path]:
    """The files of the shipped plans."""
    folder = Path(str(resources.files("servecast.validate.campaign").joinpath("campaigns")))
    return sorted(folder.glob("*.yaml"))


def _check(stage: Stage, earlier: list[str], where: str) -> None:
    if stage.name in earlier:
        raise InputError(f"a second stage {stage.name!r}", where=f"{where}.name", fix="Name it otherwise.")
    for name in stage.needs:
        if name not in earlier:
            raise InputError(
                f"no stage {name!r} before this one",
                where=f"{where}.needs",
                fix=did_you_mean(name, earlier) or "Name an earlier stage.",
            )
    try:
        words = shlex.split(stage.run)
    except ValueError as error:
        raise InputError(f"is no command line: {error}", where=f"{where}.run", fix="Correct it.") from None
    for found in _PLACEHOLDER.findall(" ".join(words)):
        share = _SHARE.fullmatch(found)
        if found not in PLACES and (share is None or share[2] not in stage.needs):
            raise InputError(
                f"{{{found}}} stands for nothing",
                where=f"{where}.run",
                fix="Use {out}, {python}, {time_s}, or {SHARE*STAGE} with a stage of its needs.",
            )


def share_of(found: str) -> tuple[float, str] | None:
    """(0.8, "predict") of "0.8*predict"; None of another placeholder."""
    share = _SHARE.fullmatch(found)
    return None if share is None else (float(share[1]), share[2])
